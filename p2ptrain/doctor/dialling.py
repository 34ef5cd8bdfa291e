"""Dial other peers and ask what they speak, without becoming linked."""

from __future__ import annotations

import errno
import random
import ssl
import time

import trio

from p2ptrain import limits
from p2ptrain.diagnosis.observations import Dial, DialEnd
from p2ptrain.engine.build import instruction_set_class, machine_name, read_cpuinfo
from p2ptrain.errors import ConfigError, RemoteProtocolError
from p2ptrain.net.connection import Connection
from p2ptrain.net.listener import connect
from p2ptrain.net.tls_link import LinkBroken, LinkRefused, TlsLink, client_context
from p2ptrain.training.contract import RuntimeBuild
from p2ptrain.trust.credentials import Credentials
from p2ptrain.wire import hello as wire_hello
from p2ptrain.wire.hello import Hello

_ENDS = {
    errno.ECONNREFUSED: DialEnd.NOTHING_LISTENS,
    errno.EHOSTUNREACH: DialEnd.NO_ROUTE,
    errno.ENETUNREACH: DialEnd.NO_ROUTE,
}


async def dial_all(addresses: dict[str, str], credentials: Credentials) -> tuple[Dial, ...]:
    """Dial every address at the same time; in the order given, `known_from` by address.

    TrustError when our own key and certificates do not fit together.
    """
    context = client_context(credentials)
    found: dict[str, Dial] = {}

    async def one(address: str, known_from: str) -> None:
        with trio.move_on_after(2 * limits.DOCTOR_DIAL_TIMEOUT_S):
            found[address] = await _dial(address, known_from, credentials, context)

    async with trio.open_nursery() as nursery:
        for address, known_from in addresses.items():
            nursery.start_soon(one, address, known_from)
    return tuple(
        found.get(at, Dial(address=at, known_from=known, end=DialEnd.NO_ANSWER))
        for at, known in addresses.items()
    )


async def _dial(
    address: str, known_from: str, credentials: Credentials, context: ssl.SSLContext
) -> Dial:
    began_s = trio.current_time()
    try:
        with trio.fail_after(limits.DOCTOR_DIAL_TIMEOUT_S):
            sock = await connect(address)
    except trio.TooSlowError:
        return Dial(address=address, known_from=known_from, end=DialEnd.NO_ANSWER)
    except (OSError, ConfigError) as error:
        number = error.errno if isinstance(error, OSError) else None
        end = _ENDS.get(number or 0, DialEnd.NO_ANSWER)
        return Dial(address=address, known_from=known_from, end=end, detail=str(error))
    connect_s = trio.current_time() - began_s
    link = TlsLink(sock, context, server_side=False)
    try:
        return await _question(link, address, known_from, credentials, connect_s)
    except LinkRefused as error:
        end = DialEnd.CERTIFICATES
        return Dial(address=address, known_from=known_from, end=end, detail=error.reason)
    except (LinkBroken, RemoteProtocolError) as error:
        end = DialEnd.NOT_A_PEER
        return Dial(address=address, known_from=known_from, end=end, detail=str(error))
    finally:
        link.close()


async def _question(
    link: TlsLink, address: str, known_from: str, credentials: Credentials, connect_s: float
) -> Dial:
    await link.handshake()
    device = link.peer_device(credentials)
    if device == credentials.device:
        return Dial(address=address, known_from=known_from, end=DialEnd.IS_SELF, device=device)
    connection = Connection(link, device=device, kind="control", dialled_here=True)
    await connection.send_hello(_hello(credentials))
    theirs = await connection.receive_hello()
    refused = theirs.refusal not in (None, wire_hello.REFUSE_VERSION)
    return Dial(
        address=address,
        known_from=known_from,
        end=DialEnd.REFUSED if refused else DialEnd.ANSWERED,
        detail=(theirs.refusal or "") if refused else "",
        connect_s=connect_s,
        device=device,
        protocol=(theirs.protocol_min, theirs.protocol_max),
        clock_ahead_s=connection.clock_ahead_s,
    )


def _hello(credentials: Credentials) -> Hello:
    """A HELLO of protocol 0, which nobody speaks: a question without a link (PROTOCOL.md 3.1)."""
    machine = machine_name()
    isa = instruction_set_class(machine, read_cpuinfo())
    return Hello(
        protocol_min=wire_hello.QUESTION_PROTOCOL,
        protocol_max=wire_hello.QUESTION_PROTOCOL,
        features=(),
        group=credentials.group,
        device=credentials.device,
        instance=random.SystemRandom().getrandbits(62),
        kind="control",
        build=RuntimeBuild(runtime="none", version="0", numpy="0", machine=machine, isa=isa),
        clock_s=time.time(),
        listen_port=0,
    )
