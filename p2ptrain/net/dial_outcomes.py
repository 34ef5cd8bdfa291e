"""How a dial ended, and what that says about whoever should be there."""

from __future__ import annotations

import errno
import socket
from typing import Final

import trio

from p2ptrain import limits
from p2ptrain.errors import RemoteProtocolError
from p2ptrain.ids import DeviceId
from p2ptrain.net.dialler import Attempt
from p2ptrain.net.listener import connect
from p2ptrain.net.tls_link import CLOCKS_DIFFER, LinkBroken, LinkRefused
from p2ptrain.wire import hello as wire_hello
from p2ptrain.wire.hello import Hello

_PROBE_PAUSE_S: Final = 0.01
_RESET: Final = (errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN)


async def is_refused(address: str) -> bool:
    """Whether nothing listens at an address; False when somebody does, or nobody says anything.

    A process that dies closes its sockets one after the other, and on a busy machine slowly: a
    connection made in between is reset, which says nothing yet, so the next one is tried. A peer
    that lives ends a connection over which nothing comes.
    """
    with trio.move_on_after(limits.REFUSED_PROBE_TIMEOUT_S):
        while True:
            try:
                await _be_sent_away(address)
            except OSError as error:
                if error.errno not in _RESET:
                    return error.errno == errno.ECONNREFUSED
                await trio.sleep(_PROBE_PAUSE_S)
            else:
                return False
    return False


async def _be_sent_away(address: str) -> None:
    """Connect, say nothing, and wait until the other side closes in order; OSError if it fails."""
    with await connect(address) as sock:
        sock.shutdown(socket.SHUT_WR)
        await sock.recv(1)


def failed(error: LinkBroken | RemoteProtocolError, device: DeviceId | None) -> Attempt:
    """A dial that broke: pointless to repeat when a certificate was not accepted.

    One that is out of date is renewed by itself, and a wrong clock may be set right.
    """
    if isinstance(error, LinkRefused) and not error.reason.endswith(CLOCKS_DIFFER):
        return Attempt(device=device, refusal=error.reason)
    return Attempt(device=device, failure=str(error))


def refused_by_hello(ours: Hello, theirs: Hello) -> Attempt:
    """A dial that the other side answered with a refusal."""
    if theirs.refusal == wire_hello.REFUSE_VERSION:
        reason = wire_hello.version_gap(ours, theirs) or "it refuses our protocol version"
        return Attempt(device=theirs.device, refusal=reason)
    if theirs.refusal == wire_hello.REFUSE_REVOKED:
        return Attempt(device=theirs.device, refusal=wire_hello.REVOKED)
    if theirs.refusal == wire_hello.REFUSE_DATES:
        return Attempt(device=theirs.device, failure=f"{wire_hello.OUT_OF_DATE}; {CLOCKS_DIFFER}")
    if theirs.refusal == wire_hello.REFUSE_DUPLICATE:
        return Attempt(device=theirs.device)  # the other connection is on its way
    return Attempt(device=theirs.device, failure=f"the peer refused: {theirs.refusal:.40}")
