"""Enrolment over real loopback TCP: who gets in, who does not, and that nothing hangs."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable

import pytest
import trio
import trio.testing

from p2ptrain import limits
from p2ptrain.errors import ConfigError, RemoteProtocolError, TrustError
from p2ptrain.net import enrol_stream
from p2ptrain.net.connection import BodyReader
from p2ptrain.net.enrol import enrol
from p2ptrain.net.links import Links
from p2ptrain.net.listener import connect, join_address
from p2ptrain.net.sponsor import EnrolmentServer, serve_enrolment
from p2ptrain.net.tls_link import TlsLink, client_context, server_context
from p2ptrain.store.groups import Group, create_invite, known_groups, load_issuer
from p2ptrain.store.home import Home
from p2ptrain.training.contract import RuntimeBuild
from p2ptrain.trust.invite import Invite, read_invite
from p2ptrain.wire.frames import BulkHeader, TensorHeader

BUILD = RuntimeBuild(
    runtime="onnxruntime", version="1.20", numpy="2.1", machine="x86_64", isa="avx2"
)
MintGroup = Callable[..., list[Group]]
MakeHome = Callable[[str], Home]


async def no_tensor(device: str, header: TensorHeader, length: int, reader: BodyReader) -> None:
    raise RemoteProtocolError("no tensor is expected")


async def no_bulk(device: str, header: BulkHeader, chunk: bytes) -> None:
    raise RemoteProtocolError("no chunk is expected")


@contextlib.asynccontextmanager
async def sponsoring(group: Group) -> AsyncIterator[str]:
    """A peer of this group that admits; gives its address."""
    links = Links(
        credentials=group.credentials,
        build=BUILD,
        listen_host="127.0.0.1",
        listen_port=0,
        on_tensor=no_tensor,
        on_bulk=no_bulk,
        enrolment=EnrolmentServer(group),
    )
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            await nursery.start(links.run)
            yield join_address(*links.address)
            nursery.cancel_scope.cancel()


def invited(group: Group, address: str, ttl_s: float = 60.0) -> Invite:
    return read_invite(create_invite(group, [address], ttl_s))


async def test_joiner_becomes_a_member_that_others_trust(
    mint_group: MintGroup, make_home: MakeHome
) -> None:
    (sponsor,) = mint_group(1)
    async with sponsoring(sponsor) as address:
        enrolled = await enrol(
            invited(sponsor, address), home=make_home("joiner"), device_name="beta"
        )
    group = enrolled.group
    assert not enrolled.clock_is_wrong
    assert (group.id, group.name, group.device_name) == (sponsor.id, sponsor.name, "beta")
    assert group.device != sponsor.device
    left, right = trio.socket.socketpair()
    server = TlsLink(left, server_context(sponsor.credentials), server_side=True)
    client = TlsLink(right, client_context(group.credentials), server_side=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.handshake)
        nursery.start_soon(client.handshake)
    assert server.peer_device(sponsor.credentials) == group.device
    server.close()
    client.close()


async def test_joiner_may_admit_the_next_one(mint_group: MintGroup, make_home: MakeHome) -> None:
    (group,) = mint_group(1)
    depths = [len(load_issuer(group).chain)]
    for index in range(3):
        async with sponsoring(group) as address:
            invite = invited(group, address)
            enrolled = await enrol(invite, home=make_home(f"j{index}"), device_name=f"j{index}")
        group = enrolled.group
        depths.append(len(load_issuer(group).chain))
    assert depths == [1, 2, 3, 4]


async def test_no_private_key_travels(
    mint_group: MintGroup, make_home: MakeHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sponsor,) = mint_group(1)
    seen = bytearray()
    receive = enrol_stream.receive_exactly

    async def spy(stream: trio.abc.Stream, length: int) -> bytes:
        received = await receive(stream, length)
        seen.extend(received)
        return received

    monkeypatch.setattr(enrol_stream, "receive_exactly", spy)
    async with sponsoring(sponsor) as address:
        invite = invited(sponsor, address)
        group = (await enrol(invite, home=make_home("j"), device_name="beta")).group
    assert len(seen) > 1000
    assert b"beta" not in seen  # names and requests are sealed too
    for name in ("device.key", "issuer.key"):
        assert (group.folder / name).read_bytes() != (sponsor.folder / name).read_bytes()


async def test_invite_works_once(mint_group: MintGroup, make_home: MakeHome) -> None:
    (sponsor,) = mint_group(1)
    async with sponsoring(sponsor) as address:
        invite = invited(sponsor, address)
        await enrol(invite, home=make_home("first"), device_name="beta")
        with pytest.raises(TrustError, match="was used"):
            await enrol(invite, home=make_home("second"), device_name="gamma")
    assert known_groups(make_home("second")) == ()


async def test_invite_with_another_secret_is_unknown(
    mint_group: MintGroup, make_home: MakeHome
) -> None:
    (sponsor,) = mint_group(1)
    async with sponsoring(sponsor) as address:
        invite = dataclasses.replace(invited(sponsor, address), secret="00" * 16)
        with pytest.raises(TrustError, match="does not know this invite"):
            await enrol(invite, home=make_home("j"), device_name="beta")


async def test_expired_invite_is_refused_by_the_sponsor_whatever_our_clock_says(
    mint_group: MintGroup, make_home: MakeHome
) -> None:
    (sponsor,) = mint_group(1)
    async with sponsoring(sponsor) as address:
        for claimed_s in (-1.0, 60.0):
            invite = invited(sponsor, address, ttl_s=-1)
            edited = dataclasses.replace(invite, expires_at_s=time.time() + claimed_s)
            with pytest.raises(TrustError, match="the invite has expired"):
                await enrol(edited, home=make_home("j"), device_name="beta")
        late = dataclasses.replace(invited(sponsor, address), expires_at_s=1.0)
        await enrol(late, home=make_home("j"), device_name="beta")


async def test_sponsor_of_another_group_is_noticed(
    mint_group: MintGroup, make_home: MakeHome
) -> None:
    (sponsor,) = mint_group(1)
    async with sponsoring(sponsor) as address:
        invite = dataclasses.replace(invited(sponsor, address), root_hash="ab" * 32)
        with pytest.raises(TrustError, match="does not know the invite's secret"):
            await enrol(invite, home=make_home("j"), device_name="beta")
        # The sponsor did not let the invite go for that.
        again = dataclasses.replace(invite, root_hash=invited(sponsor, address).root_hash)
        await enrol(again, home=make_home("j"), device_name="beta")


async def test_sponsor_that_cannot_be_reached_is_named(
    mint_group: MintGroup, make_home: MakeHome
) -> None:
    (sponsor,) = mint_group(1)
    with pytest.raises(TrustError, match=r"127\.0\.0\.1:1 "):
        await enrol(invited(sponsor, "127.0.0.1:1"), home=make_home("j"), device_name="beta")
    async with sponsoring(sponsor) as address:
        invite = invited(sponsor, "127.0.0.1:1")
        enrolled = await enrol(
            invite, home=make_home("j"), device_name="beta", addresses=["127.0.0.1:2", address]
        )
    assert enrolled.group.id == sponsor.id


async def test_member_and_bad_names_are_told(mint_group: MintGroup, make_home: MakeHome) -> None:
    (sponsor,) = mint_group(1)
    async with sponsoring(sponsor) as address:
        with pytest.raises(ConfigError, match="name of a device"):
            await enrol(invited(sponsor, address), home=make_home("j"), device_name="\x1b")
        await enrol(invited(sponsor, address), home=make_home("j"), device_name="beta")
        with pytest.raises(ConfigError, match="already is a member"):
            await enrol(invited(sponsor, address), home=make_home("j"), device_name="beta")


async def test_member_that_may_not_admit_says_so(
    mint_group: MintGroup, make_home: MakeHome
) -> None:
    (sponsor,) = mint_group(1)
    async with sponsoring(sponsor) as address:
        invite = invited(sponsor, address)
        (sponsor.folder / "issuer.key").unlink()
        with pytest.raises(TrustError, match="may not admit"):
            await enrol(invite, home=make_home("j"), device_name="beta")


@pytest.mark.parametrize(
    "garbage",
    [
        b"P",
        b"P2TE\x01\x01\x30\x00" + bytes(48),
        b"P2TE\x01\x01\x30\x00" + bytes(20),
        b"P2TE\x01\x03\x00\x00",
        b"P2TE\x01\x01\xff\xff" + bytes(100),
        b"PUT / HTTP/1.1\r\n\r\n",
    ],
    ids=["one byte", "unknown", "cut", "out of order", "too large", "http"],
)
async def test_garbage_ends_at_once_and_the_next_joiner_gets_in(
    mint_group: MintGroup, make_home: MakeHome, garbage: bytes
) -> None:
    (sponsor,) = mint_group(1)
    async with sponsoring(sponsor) as address:
        sock = await connect(address)
        await sock.send(garbage)
        sock.shutdown(trio.socket.SHUT_WR)
        received = 0
        with contextlib.suppress(ConnectionResetError):
            while chunk := await sock.recv(4096):
                received += len(chunk)
        assert received < 100
        sock.close()
        await enrol(invited(sponsor, address), home=make_home("j"), device_name="beta")


async def test_joiner_that_stops_is_given_up(
    mint_group: MintGroup, autojump_clock: trio.testing.MockClock
) -> None:
    (sponsor,) = mint_group(1)
    ours, theirs = trio.testing.memory_stream_pair()
    begun = trio.current_time()
    with pytest.raises(RemoteProtocolError, match="too slow"):
        await serve_enrolment(theirs, sponsor, trio.Lock())
    assert trio.current_time() - begun == pytest.approx(limits.ENROL_TIMEOUT_S)
    with pytest.raises(trio.BrokenResourceError):
        await ours.send_all(b"late")


async def test_joiners_at_once_are_bounded(
    mint_group: MintGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "ENROLMENTS_MAX", 1)
    (sponsor,) = mint_group(1)
    async with sponsoring(sponsor) as address:
        slow = await connect(address)
        await slow.send(b"P2TE")
        await trio.testing.wait_all_tasks_blocked(0.05)
        second = await connect(address)
        await second.send(b"P2TE")
        with contextlib.suppress(ConnectionResetError):
            assert await second.recv(1) == b""
        slow.close()
        second.close()


async def test_sponsor_that_hangs_up_leaves_nothing(
    mint_group: MintGroup, make_home: MakeHome
) -> None:
    (sponsor,) = mint_group(1)
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    address = join_address("127.0.0.1", listeners[0].socket.getsockname()[1])

    async def hang_up(stream: trio.SocketStream) -> None:
        await stream.receive_some(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, hang_up, listeners)
        with pytest.raises(TrustError, match="did not complete"):
            await enrol(invited(sponsor, address), home=make_home("j"), device_name="beta")
        nursery.cancel_scope.cancel()
    assert known_groups(make_home("j")) == ()
