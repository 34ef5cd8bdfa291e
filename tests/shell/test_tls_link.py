"""TlsLink over a socket pair: content, ends, cancellation, and every refusal of TLS."""

from __future__ import annotations

import dataclasses
import os
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from p2ptrain import limits
from p2ptrain.errors import TrustError
from p2ptrain.net.tls_link import (
    LinkBroken,
    LinkRefused,
    TlsLink,
    client_context,
    server_context,
)
from p2ptrain.store.groups import Group, load_issuer
from p2ptrain.trust import certificates as certs
from p2ptrain.trust.credentials import Credentials

MintGroup = Callable[..., list[Group]]


def socket_pair() -> tuple[trio.socket.SocketType, trio.socket.SocketType]:
    return trio.socket.socketpair()


async def outcome(link: TlsLink, *, read: bool) -> LinkBroken | None:
    """How a handshake ends; with `read`, as TLS 1.3 needs, at the first read after it."""
    try:
        await link.handshake()
        if read:
            await link.recv_frame_start(memoryview(bytearray(1)))
    except LinkBroken as error:
        return error
    return None


async def judge(
    server: ssl.SSLContext, client: ssl.SSLContext
) -> tuple[LinkBroken | None, LinkBroken | None]:
    """What server and client say when they meet."""
    results: dict[str, LinkBroken | None] = {}

    async def one(name: str, link: TlsLink, read: bool) -> None:
        results[name] = await outcome(link, read=read)
        if name == "server" and results[name] is None:
            await link.aclose()
        link.close()

    left, right = socket_pair()
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, "server", TlsLink(left, server, server_side=True), False)
            nursery.start_soon(one, "client", TlsLink(right, client, server_side=False), True)
    return results["server"], results["client"]


@asynccontextmanager
async def linked(mint_group: MintGroup) -> AsyncIterator[tuple[TlsLink, TlsLink]]:
    first, second = mint_group(2)
    left, right = socket_pair()
    a = TlsLink(left, server_context(first.credentials), server_side=True)
    b = TlsLink(right, client_context(second.credentials), server_side=False)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.handshake)
            nursery.start_soon(b.handshake)
        assert a.peer_device(first.credentials) == second.device
        assert b.peer_device(second.credentials) == first.device
        try:
            yield a, b
        finally:
            a.close()
            b.close()


def with_leaf(
    group: Group, *, name: str, sign: Callable[[certs.Issuer, Ed25519PrivateKey], bytes]
) -> Credentials:
    """Credentials with a chain of the test's own making and a fresh key."""
    key = Ed25519PrivateKey.generate()
    chain_file, key_file = group.folder / f"{name}.pem", group.folder / f"{name}.key"
    chain_file.write_bytes(sign(load_issuer(group), key))
    key_file.write_bytes(certs.key_to_pem(key))
    return dataclasses.replace(
        group.credentials, chain_file=str(chain_file), key_file=str(key_file)
    )


def signed_leaf(group: Group, name: str, *, now: float, gid: str | None = None) -> Credentials:
    def sign(issuer: certs.Issuer, key: Ed25519PrivateKey) -> bytes:
        request = certs.request_certificate(key, name="x")
        leaf = certs.issue_leaf(issuer, request, gid=gid or group.id, name="x", now=now)  # type: ignore[arg-type]  # another group's id on purpose
        return certs.to_pem(leaf, *issuer.chain)

    return with_leaf(group, name=name, sign=sign)


async def test_members_of_a_group_meet(mint_group: MintGroup) -> None:
    first, second = mint_group(2)
    server, client = await judge(
        server_context(first.credentials), client_context(second.credentials)
    )
    assert (server, client) == (None, None)


async def test_client_without_certificate_is_refused(mint_group: MintGroup) -> None:
    first, second = mint_group(2)
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname = False
    bare.load_verify_locations(cadata=second.credentials.root_pem)
    server, client = await judge(server_context(first.credentials), bare)
    assert isinstance(server, LinkRefused)
    assert "peer did not return a certificate" in server.reason
    assert isinstance(client, LinkRefused)
    assert "certificate required" in client.reason


async def test_tls_1_2_is_refused(mint_group: MintGroup) -> None:
    first, second = mint_group(2)
    old = client_context(second.credentials)
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    server, client = await judge(server_context(first.credentials), old)
    for side in (server, client):
        assert isinstance(side, LinkRefused)
        assert "does not speak TLS 1.3" in side.reason


async def test_another_group_is_refused_on_both_sides(mint_group: MintGroup) -> None:
    (ours,), (theirs,) = mint_group(1), mint_group(1)
    server, client = await judge(
        server_context(ours.credentials), client_context(theirs.credentials)
    )
    assert isinstance(client, LinkRefused)
    assert "another group" in client.reason
    assert isinstance(server, LinkRefused)
    # A client that trusts our root all the same is refused by us.
    blind = dataclasses.replace(theirs.credentials, root_pem=ours.credentials.root_pem)
    server, client = await judge(server_context(ours.credentials), client_context(blind))
    assert isinstance(server, LinkRefused)
    assert "another group" in server.reason
    assert isinstance(client, LinkRefused)
    assert "unknown ca" in client.reason


@pytest.mark.parametrize(
    ("offset_s", "problem"), [(-31 * 86_400, "expired"), (3_600, "not yet valid")]
)
async def test_certificate_out_of_date_is_refused(
    mint_group: MintGroup, offset_s: float, problem: str
) -> None:
    first, second = mint_group(2, now=time.time() - 60 * 86_400)
    wrong = signed_leaf(second, "dated", now=time.time() + offset_s)
    good = signed_leaf(first, "good", now=time.time())
    server, client = await judge(server_context(good), client_context(wrong))
    assert isinstance(server, LinkRefused)
    assert problem in server.reason
    assert "clocks" in server.reason
    assert isinstance(client, LinkRefused)


async def test_self_signed_leaf_is_refused(mint_group: MintGroup) -> None:
    first, second = mint_group(2)

    def sign(issuer: certs.Issuer, key: Ed25519PrivateKey) -> bytes:
        alone = dataclasses.replace(issuer, key=key)
        request = certs.request_certificate(key, name="x")
        made = certs.issue_leaf(alone, request, gid=second.id, name="x", now=time.time())
        return certs.to_pem(made)

    wrong = with_leaf(second, name="self", sign=sign)
    server, _ = await judge(server_context(first.credentials), client_context(wrong))
    assert isinstance(server, LinkRefused)


async def test_leaf_used_as_issuer_is_refused(mint_group: MintGroup) -> None:
    first, second = mint_group(2)
    device_key = certs.key_from_pem((second.folder / "device.key").read_bytes())

    def sign(issuer: certs.Issuer, key: Ed25519PrivateKey) -> bytes:
        false_issuer = certs.Issuer(
            key=device_key, certificate=second.chain[0], above=second.chain[1:]
        )
        request = certs.request_certificate(key, name="x")
        made = certs.issue_leaf(false_issuer, request, gid=second.id, name="x", now=time.time())
        return certs.to_pem(made, *false_issuer.chain)

    wrong = with_leaf(second, name="false", sign=sign)
    server, _ = await judge(server_context(first.credentials), client_context(wrong))
    assert isinstance(server, LinkRefused)
    assert "invalid CA" in server.reason


async def test_name_outside_the_group_is_refused(mint_group: MintGroup) -> None:
    first, second = mint_group(2)
    wrong = signed_leaf(second, "outside", now=time.time(), gid="a" * 16)
    server, _ = await judge(server_context(first.credentials), client_context(wrong))
    assert isinstance(server, LinkRefused)
    assert "permitted subtree" in server.reason


async def test_chain_without_its_issuer_is_refused(mint_group: MintGroup) -> None:
    first, second = mint_group(2)
    chain = second.folder / "chain.pem"
    chain.write_bytes(certs.to_pem(second.chain[0]))
    server, _ = await judge(server_context(first.credentials), client_context(second.credentials))
    assert isinstance(server, LinkRefused)


async def test_leaf_that_does_not_name_its_key_is_refused(mint_group: MintGroup) -> None:
    first, second = mint_group(2)

    def sign(issuer: certs.Issuer, key: Ed25519PrivateKey) -> bytes:
        uri = x509.UniformResourceIdentifier(certs.leaf_uri(first.device, second.id))
        real = certs.issue_leaf(
            issuer, certs.request_certificate(key, name="x"), gid=second.id, name="x",
            now=time.time(),
        )  # fmt: skip
        builder = x509.CertificateBuilder(
            issuer_name=real.issuer,
            subject_name=real.subject,
            public_key=key.public_key(),
            serial_number=7,
            not_valid_before=real.not_valid_before_utc,
            not_valid_after=real.not_valid_after_utc,
        )
        for extension in real.extensions:
            is_name = isinstance(extension.value, x509.SubjectAlternativeName)
            value = x509.SubjectAlternativeName([uri]) if is_name else extension.value
            builder = builder.add_extension(value, critical=extension.critical)
        return certs.to_pem(builder.sign(issuer.key, algorithm=None), *issuer.chain)

    wrong = with_leaf(second, name="liar", sign=sign)
    left, right = socket_pair()
    link = TlsLink(left, server_context(first.credentials), server_side=True)
    other = TlsLink(right, client_context(wrong), server_side=False)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.handshake)
            nursery.start_soon(other.handshake)
    with pytest.raises(LinkRefused, match="does not name its key"):
        link.peer_device(first.credentials)
    other.close()


def test_damaged_key_of_our_own_is_told(mint_group: MintGroup) -> None:
    (group,) = mint_group(1)
    (group.folder / "device.key").write_bytes(b"nothing")
    for make in (server_context, client_context):
        with pytest.raises(TrustError, match="our own"):
            make(group.credentials)


async def test_garbage_instead_of_a_handshake_is_refused(mint_group: MintGroup) -> None:
    (group,) = mint_group(1)
    left, right = socket_pair()
    link = TlsLink(left, server_context(group.credentials), server_side=True)
    await right.send(b"\x16" + os.urandom(4000))
    right.shutdown(trio.socket.SHUT_WR)
    assert isinstance(await outcome(link, read=False), LinkBroken)
    right.close()


async def test_silent_peer_times_out(
    mint_group: MintGroup, autojump_clock: trio.testing.MockClock
) -> None:
    (group,) = mint_group(1)
    left, right = socket_pair()
    link = TlsLink(left, server_context(group.credentials), server_side=True)
    begun = trio.current_time()
    error = await outcome(link, read=False)
    assert error is not None
    assert "too long" in error.reason
    assert trio.current_time() - begun == pytest.approx(limits.HANDSHAKE_TIMEOUT_S)
    right.close()


async def test_content_is_equal_both_ways_at_once(mint_group: MintGroup) -> None:
    sizes = (1, 16, 16_384, 262_144, 3_000_001)
    sent = [os.urandom(size) for size in sizes]

    async def send(link: TlsLink) -> None:
        for data in sent:
            await link.send_all(data[:5], memoryview(data)[5:])

    async def receive(link: TlsLink) -> None:
        for data in sent:
            target = bytearray(len(data))
            await link.recv_exactly(memoryview(target))
            assert target == data

    async with linked(mint_group) as (a, b):
        async with trio.open_nursery() as nursery:
            for link in (a, b):
                nursery.start_soon(send, link)
                nursery.start_soon(receive, link)
        ours, theirs = a.statistics(), b.statistics()
    assert ours.plaintext_bytes_sent == theirs.plaintext_bytes_received == sum(sizes)
    assert ours.socket_bytes_sent == theirs.socket_bytes_received
    assert ours.socket_bytes_sent > ours.plaintext_bytes_sent


async def test_concurrent_senders_do_not_mix(mint_group: MintGroup) -> None:
    async with linked(mint_group) as (a, b), trio.open_nursery() as nursery:
        for value in range(4):
            nursery.start_soon(a.send_all, bytes([value]) * 10, bytes([value]) * 600_000)
        for _ in range(4):
            target = bytearray(600_010)
            await b.recv_exactly(memoryview(target))
            assert len(set(target)) == 1


async def test_goodbye_between_frames_is_an_end_and_within_one_a_break(
    mint_group: MintGroup,
) -> None:
    async with linked(mint_group) as (a, b):
        await a.send_all(b"ab")
        await a.aclose()
        await b.recv_exactly(memoryview(bytearray(2)))
        assert not await b.recv_frame_start(memoryview(bytearray(4)))
    async with linked(mint_group) as (a, b):
        await a.send_all(b"ab")
        a.close()  # no close_notify
        with pytest.raises(LinkBroken, match="middle of a frame") as caught:
            await b.recv_frame_start(memoryview(bytearray(4)))
        assert caught.value.closed_by_peer
    async with linked(mint_group) as (a, b):
        a.close()
        assert not await b.recv_frame_start(memoryview(bytearray(4)))


async def test_cancelled_send_breaks_the_link(mint_group: MintGroup) -> None:
    async with linked(mint_group) as (a, b):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(a.send_all, bytearray(32 << 20))  # more than any buffer
                await b.recv_exactly(memoryview(bytearray(100_000)))
                scope.cancel()
        with pytest.raises(LinkBroken, match="cut short"):
            await a.send_all(b"more")
        with pytest.raises(LinkBroken, match="middle of a frame"):
            await b.recv_exactly(memoryview(bytearray(32 << 20)))


async def test_closing_wakes_a_reader(mint_group: MintGroup) -> None:
    async def wait_broken(link: TlsLink) -> None:
        with pytest.raises(LinkBroken, match="closed here"):
            await link.recv_frame_start(memoryview(bytearray(1)))

    async with linked(mint_group) as (a, _), trio.open_nursery() as nursery:
        nursery.start_soon(wait_broken, a)
        await trio.testing.wait_all_tasks_blocked()
        a.close()


async def test_receiver_that_takes_nothing_breaks_the_link_in_time(
    mint_group: MintGroup, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "LINK_STALL_TIMEOUT_S", 1.0)
    async with linked(mint_group) as (a, _):
        begun = trio.current_time()
        with pytest.raises(LinkBroken, match="takes no data"):
            await a.send_all(bytearray(32 << 20))
        assert 1.0 <= trio.current_time() - begun < 3.0


async def test_sender_that_stops_within_a_frame_breaks_the_link_in_time(
    mint_group: MintGroup, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "LINK_STALL_TIMEOUT_S", 1.0)
    async with linked(mint_group) as (a, b):
        with trio.move_on_after(2.5):
            await b.recv_frame_start(memoryview(bytearray(16)))  # between frames: no hurry
        await a.send_all(b"half")
        with pytest.raises(LinkBroken, match="stopped in the middle"):
            await b.recv_frame_start(memoryview(bytearray(16)))
        with pytest.raises(LinkBroken):
            await a.recv_exactly(memoryview(bytearray(1)))
