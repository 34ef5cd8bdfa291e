"""Links over loopback: up and down, simultaneous dials, tensors, bulk, hostile peers."""

from __future__ import annotations

import os
import ssl

import pytest
import trio
import trio.testing

from p2ptrain import limits
from p2ptrain.errors import ConfigError, PeerLost, PortInUse
from p2ptrain.net.listener import connect
from p2ptrain.net.tls_link import LinkBroken, TlsLink
from p2ptrain.training.messages import BlobMissing, Finish, Stamp
from p2ptrain.wire import frames
from p2ptrain.wire.flows import NO_RUN, Flow
from p2ptrain.wire.frames import FrameType
from tests.linked_peers import (
    BUILD,
    MintGroup,
    Note,
    Peer,
    bulk,
    flood,
    hello_of,
    hostile_pair,
    linked,
    raw_connection,
    running,
    tensor,
)
from tests.memory_group import until

BULK = Flow(tensor(0).run, "state")


@pytest.mark.parametrize("dials", ["low", "high", "both", "both and twice"])
async def test_two_peers_come_up_once_whoever_dials(mint_group: MintGroup, dials: str) -> None:
    async with running(*mint_group(2)) as (low, high):
        if dials != "high":
            low.links.dial(high.address)
        if dials != "low":
            high.links.dial(low.address)
        if dials == "both and twice":
            low.links.dial(high.address.replace("127.0.0.1", "localhost"))
        up = await low.up()
        assert (up.device, up.hello.build) == (high.device, BUILD)
        assert up.address.endswith(high.address.rpartition(":")[2])
        assert abs(up.clock_ahead_s) < 5
        assert (await high.up()).device == low.device
        low.links.send_control(high.device, Note(number=1))
        high.links.send_control(low.device, Note(number=2))
        assert await high.links.inbox.receive() == (low.device, Note(number=1))
        assert await low.links.inbox.receive() == (high.device, Note(number=2))
        # Whatever else was dialled has been put aside by now, and nothing flapped.
        await trio.testing.wait_all_tasks_blocked(0.05)
        for peer in (low, high):
            with pytest.raises(trio.WouldBlock):
                peer.links.events.receive_nowait()
        assert low.links.devices() == (high.device,)


async def test_five_peers_that_all_dial_each_other_come_up_once(mint_group: MintGroup) -> None:
    async with running(*mint_group(5)) as peers:
        for peer in peers:
            for other in peers:
                peer.links.dial(other.address)
        for peer in peers:
            seen = {(await peer.up()).device for _ in range(4)}
            assert seen == {other.device for other in peers} - {peer.device}
        await trio.testing.wait_all_tasks_blocked(0.05)
        for peer in peers:
            with pytest.raises(trio.WouldBlock):
                peer.links.events.receive_nowait()
            assert list(peer.links.refusals().values()) == ["this device itself"]


async def test_large_tensors_arrive_equal_and_are_counted(mint_group: MintGroup) -> None:
    async with linked(mint_group) as (low, high):
        bodies = [os.urandom(size) for size in (0, 1, 70_000, 5_000_003)]
        for step, body in enumerate(bodies):
            await low.links.send_tensor(high.device, tensor(step), body[:1], body[1:])
        await high.wait_arrived(len(bodies))
        assert [header.step for header, _ in high.tensors] == [0, 1, 2, 3]
        assert [body for _, body in high.tensors] == bodies
        sent = low.links.statistics().peers[high.device]
        received = high.links.statistics().peers[low.device]
        assert sent.data_bytes_sent == received.data_bytes_received > sum(map(len, bodies))
        assert low.links.statistics().bytes_sent > sent.data_bytes_sent
        assert (sent.local_host, received.local_host) == ("127.0.0.1", "127.0.0.1")


async def test_bytes_are_counted_by_run_and_kind(mint_group: MintGroup) -> None:
    async with linked(mint_group) as (low, high):
        head, chunk = tensor(0), os.urandom(300_000)
        run = head.run
        stamp = Stamp(run=run, lineage=head.lineage, view=head.view, plan=head.plan)
        hello = low.links.statistics().peers[high.device]
        await low.links.send_tensor(high.device, tensor(0), bytes(1_000_000))
        await low.links.send_tensor(high.device, tensor(1, "input"), bytes(50_000))
        await low.links.send_bulk(high.device, bulk(chunk), chunk, BULK)
        low.links.send_control(high.device, Finish(stamp=stamp))
        low.links.send_control(high.device, BlobMissing(request=1))
        await until(lambda: "control" in low.links.sent(NO_RUN).get(high.device, {}))
        of_run = low.links.sent(run)[high.device]
        of_none = low.links.sent(NO_RUN)[high.device]
        assert set(of_run) == {"activation", "input", "state", "control"}
        assert set(of_none) == {"control"}
        for kind, body in (("activation", 1_000_000), ("input", 50_000), ("state", len(chunk))):
            assert body < of_run[kind] < 1.02 * body + 600, kind
        after = low.links.statistics().peers[high.device]
        data = sum(of_run.values()) - of_run["control"]
        assert after.data_bytes_sent - hello.data_bytes_sent == data
        control = of_run["control"] + of_none["control"]
        assert after.control_bytes_sent - hello.control_bytes_sent == control
        low.links.close(high.device, "a test")
        assert low.links.sent(run)[high.device] == of_run


async def test_tensor_of_another_view_is_discarded_and_the_next_one_read(
    mint_group: MintGroup,
) -> None:
    async with linked(mint_group) as (low, high):
        await low.links.send_tensor(high.device, tensor(0, "input"), bytes(300_000))
        await low.links.send_tensor(high.device, tensor(1), b"good")
        await high.wait_arrived(1)
        assert [(h.step, body) for h, body in high.tensors] == [(1, b"good")]


async def test_bulk_waits_for_tensors(mint_group: MintGroup) -> None:
    chunk = os.urandom(limits.BULK_CHUNK_BYTES_MAX)
    async with linked(mint_group) as (low, high):
        high.gate = trio.Event()  # high takes nothing, so that low's sends pile up
        async with trio.open_nursery() as nursery:
            for step in range(3):
                body = bytes(16 << 20)
                nursery.start_soon(low.links.send_tensor, high.device, tensor(step), body)
            await trio.testing.wait_all_tasks_blocked(0.05)
            for _ in range(2):
                nursery.start_soon(low.links.send_bulk, high.device, bulk(chunk), chunk, BULK)
            await trio.testing.wait_all_tasks_blocked(0.05)
            for step in range(3, 5):
                nursery.start_soon(low.links.send_tensor, high.device, tensor(step), b"late")
            await trio.testing.wait_all_tasks_blocked(0.05)
            high.gate.set()
            while len(high.tensors) < 5:
                assert not high.chunks
                await high.arrived.wait()
        await high.wait_arrived(7)
        assert [body for _, body in high.chunks] == [chunk, chunk]


async def test_stalled_receiver_holds_the_sender_without_growing(mint_group: MintGroup) -> None:
    async with linked(mint_group) as (low, high):
        high.gate = trio.Event()
        body = bytes(1 << 20)
        sent = 0
        with trio.move_on_after(0.5):
            while True:
                await low.links.send_tensor(high.device, tensor(sent), body)
                sent += 1
        assert sent < 64  # what the kernel's buffers hold, not more


async def test_cancelled_send_takes_the_link_down_and_it_comes_back(
    mint_group: MintGroup,
) -> None:
    async with linked(mint_group) as (low, high):
        high.gate = trio.Event()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(low.links.send_tensor, high.device, tensor(0), bytes(64 << 20))
                await trio.testing.wait_all_tasks_blocked(0.05)
                scope.cancel()
        assert "cut short" in (await low.down()).reason
        high.gate.set()
        assert not (await high.down()).refused
        await low.up()
        await high.up()


async def test_full_control_queue_closes_the_link(mint_group: MintGroup) -> None:
    async with linked(mint_group) as (low, high):
        with pytest.raises(PeerLost, match="takes no control"):
            flood(low, high, limits.CONTROL_QUEUE_MAX + 2, b"")
        assert "takes no control" in (await low.down()).reason
        assert (await high.down()).closed_by_peer
    async with linked(mint_group) as (low, high):
        with pytest.raises(PeerLost, match="takes no control"):
            flood(low, high, 200, bytes(200_000))


async def test_control_messages_keep_their_order(mint_group: MintGroup) -> None:
    async with linked(mint_group) as (low, high):
        for number in range(500):
            low.links.send_control(high.device, Note(number=number))
        for number in range(500):
            assert await high.links.inbox.receive() == (low.device, Note(number=number))


async def test_peer_that_ends_is_down_and_refused_at_once(mint_group: MintGroup) -> None:
    async with linked(mint_group) as (low, high):
        begun = trio.current_time()
        high.scope.cancel()
        down = await low.down()
        assert trio.current_time() - begun < 1
        assert (down.device, down.closed_by_peer, down.refused) == (high.device, True, True)
        with pytest.raises(PeerLost):
            low.links.send_control(high.device, Note(number=1))
        with pytest.raises(PeerLost):
            await low.links.send_tensor(high.device, tensor(0), b"x")
        with pytest.raises(PeerLost):
            await low.links.send_bulk(high.device, bulk(b"x"), b"x", BULK)


async def test_peer_that_starts_again_at_its_address_is_dialled_again(
    mint_group: MintGroup,
) -> None:
    async with linked(mint_group) as (low, high), trio.open_nursery() as nursery:
        port = high.links.address[1]
        high.scope.cancel()
        assert (await low.down()).refused
        again = Peer(high.group, port=port)
        await nursery.start(again.run)
        again.links.dial(low.address)
        assert (await low.up()).hello.instance != 0
        await again.up()
        nursery.cancel_scope.cancel()


async def test_closing_here_tells_both_and_dials_again(mint_group: MintGroup) -> None:
    async with linked(mint_group) as (low, high):
        high.links.close(low.device, "revoked")
        ours, theirs = await high.down(), await low.down()
        assert (ours.reason, ours.closed_by_peer, ours.refused) == ("revoked", False, False)
        assert (theirs.closed_by_peer, theirs.refused) == (True, False)
        await low.up()
        await high.up()


async def test_another_group_is_not_dialled_again(mint_group: MintGroup) -> None:
    (ours,), (theirs,) = mint_group(1), mint_group(1)
    async with running(ours, theirs) as (a, b):
        a.links.dial(b.address)
        while not a.links.refusals():
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert "another group" in a.links.refusals()[b.address]
        while b.links.statistics().refused_count < 1:
            await trio.testing.wait_all_tasks_blocked(0.01)
        a.links.dial(b.address)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert b.links.statistics().refused_count == 1
        assert b.links.statistics().last_refusal is not None


async def test_address_where_nobody_listens_is_kept_with_its_reason(
    mint_group: MintGroup,
) -> None:
    async with running(*mint_group(1)) as (peer,):
        peer.links.dial("127.0.0.1:1")
        while not peer.links.failures():
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert "refused" in peer.links.failures()["127.0.0.1:1"]
        assert peer.links.refusals() == {}
        for bad in ("127.0.0.1", ":1", "x:0", "x:99999", "x:1x"):
            with pytest.raises(ConfigError):
                peer.links.dial(bad)


async def test_port_in_use_is_told(mint_group: MintGroup) -> None:
    first, second = mint_group(2)
    async with running(first) as (peer,):
        other = Peer(second, port=peer.links.address[1])
        with pytest.raises(PortInUse, match=str(other.port)):
            await other.links.run()
    other = Peer(second)
    other.links._listen_at = ("192.0.2.1", 0)
    with pytest.raises(ConfigError, match="cannot listen"):
        await other.links.run()


@pytest.mark.parametrize(
    "garbage", [b"\x16" + bytes(200), b"GET / HTTP/1.1\r\n\r\n", b"P2TE", b"", b"\x80" * 9]
)
async def test_garbage_at_the_port_is_hung_up_on(mint_group: MintGroup, garbage: bytes) -> None:
    async with linked(mint_group) as (low, high):
        sock = await connect(low.address)
        if garbage:
            await sock.send(garbage)
        sock.shutdown(trio.socket.SHUT_WR)
        try:
            while await sock.recv(1024):
                pass
        except ConnectionResetError:
            pass
        sock.close()
        low.links.send_control(high.device, Note(number=1))
        await high.links.inbox.receive()


@pytest.mark.parametrize(
    ("kind", "frame"),
    [
        ("control", frames.PREFIX.pack(b"P2T1", FrameType.CONTROL, 0, 0, 1 << 40)),
        ("control", frames.PREFIX.pack(b"P2T1", FrameType.CONTROL, 0, 0, 3) + b"\xc1\xc1\xc1"),
        ("control", frames.PREFIX.pack(b"P2T1", FrameType.BULK, 0, 5, 0) + bytes(5)),
        ("control", frames.PREFIX.pack(b"P2T1", FrameType.HELLO, 0, 0, 0)),
        ("control", b"\xff" * 16),
        ("data", frames.PREFIX.pack(b"P2T1", FrameType.TENSOR, 0, 5000, 0)),
        ("data", frames.PREFIX.pack(b"P2T1", FrameType.TENSOR, 0, 10, 1 << 62)),
        ("data", frames.PREFIX.pack(b"P2T1", FrameType.TENSOR, 0, 3, 9) + b"\x81\xa1a"),
        ("data", frames.PREFIX.pack(b"P2T1", FrameType.BULK, 0, 3, (1 << 20) + 1)),
        ("data", frames.PREFIX.pack(b"P2T1", FrameType.CONTROL, 0, 0, 1) + b"\x80"),
    ],
)
async def test_member_that_breaks_the_protocol_is_dropped_and_nobody_else(
    mint_group: MintGroup, kind: str, frame: bytes
) -> None:
    first, second, third = mint_group(3)
    async with running(first, third) as (peer, other):
        peer.links.dial(other.address)
        await peer.up()
        made = await hostile_pair(peer, second)
        await peer.up()
        await made[kind].link.send_all(frame)
        down = await peer.down()
        assert down.device == second.device
        assert "broke the protocol" in down.reason
        assert not down.closed_by_peer
        assert peer.links.devices() == (third.device,)
        for connection in made.values():
            connection.link.close()


async def test_chunk_with_a_wrong_digest_and_refusing_handler_close_the_link(
    mint_group: MintGroup,
) -> None:
    async with linked(mint_group) as (low, high):
        await low.links.send_bulk(high.device, bulk(b"one"), b"two", BULK)
        assert "digest" in (await high.down()).reason
        await high.up()
        assert not high.chunks
        await low.down()
        await low.up()
        await low.links.send_tensor(high.device, tensor(0, "labels"), b"")
        assert "not expected" in (await high.down()).reason


async def test_end_in_the_middle_of_a_tensor_is_a_loss(mint_group: MintGroup) -> None:
    first, second = mint_group(2)
    async with running(first) as (peer,):
        made = await hostile_pair(peer, second)
        await peer.up()
        header = frames.encode_header(tensor(0))
        head = frames.encode_frame_head(FrameType.TENSOR, header, 100_000)
        await made["data"].link.send_all(head, bytes(50_000))
        made["data"].link.close()
        down = await peer.down()
        assert "middle of a frame" in down.reason
        assert down.closed_by_peer
        made["control"].link.close()


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [({"protocol_min": 1, "protocol_max": 1}, "version"), ({"device": "c" * 26}, None)],
)
async def test_hello_that_does_not_fit_is_refused(
    mint_group: MintGroup, changes: dict[str, object], refusal: str | None
) -> None:
    first, second = mint_group(2)
    async with running(first) as (peer,):
        connection = await raw_connection(peer, second, "control")
        await connection.send_hello(hello_of(second, "control", **changes))
        if refusal is not None:
            assert (await connection.receive_hello()).refusal == refusal
        assert not await connection.link.recv_frame_start(memoryview(bytearray(1)))
        connection.link.close()
        assert peer.links.devices() == ()


async def test_silent_member_is_hung_up_on(
    mint_group: MintGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HELLO_TIMEOUT_S", 0.05)
    monkeypatch.setattr(limits, "FIRST_BYTE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(limits, "LINK_PAIR_TIMEOUT_S", 0.05)
    first, second = mint_group(2)
    async with running(first) as (peer,):
        mute = await connect(peer.address)
        assert await mute.recv(1) == b""  # it said nothing at all
        mute.close()
        connection = await raw_connection(peer, second, "control")
        assert not await connection.link.recv_frame_start(memoryview(bytearray(1)))
        connection.link.close()
        half = await raw_connection(peer, second, "control")
        await half.send_hello(hello_of(second, "control"))
        await half.receive_hello()  # the data link never comes
        assert not await half.link.recv_frame_start(memoryview(bytearray(1)))
        half.link.close()
        with pytest.raises(trio.WouldBlock):
            peer.links.events.receive_nowait()


async def test_restarted_peer_replaces_the_process_that_is_gone(mint_group: MintGroup) -> None:
    first, second = mint_group(2)
    async with running(first) as (peer,):
        old = await hostile_pair(peer, second)
        await peer.up()
        control = await raw_connection(peer, second, "control")
        await control.send_hello(hello_of(second, "control", instance=2))
        assert (await control.receive_hello()).refusal is None
        assert "restarted" in (await peer.down()).reason
        data = await raw_connection(peer, second, "data")
        await data.send_hello(hello_of(second, "data", instance=2))
        assert (await data.receive_hello()).refusal is None
        assert (await peer.up()).hello.instance == 2
        for connection in (*old.values(), control, data):
            connection.link.close()


async def test_lower_device_refuses_a_second_connection_of_the_same_process(
    mint_group: MintGroup,
) -> None:
    low, high = mint_group(2)
    async with running(low) as (peer,):
        made = await hostile_pair(peer, high)
        await peer.up()
        twin = await raw_connection(peer, high, "data")
        await twin.send_hello(hello_of(high, "data"))
        assert (await twin.receive_hello()).refusal == "duplicate"
        assert peer.links.devices() == (high.device,)
        for connection in (*made.values(), twin):
            connection.link.close()


async def test_peers_beyond_the_limit_are_refused(
    mint_group: MintGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "LINK_PEERS_MAX", 1)
    first, second, third = mint_group(3)
    async with running(first) as (peer,):
        made = await hostile_pair(peer, second)
        await peer.up()
        late = await raw_connection(peer, third, "control")
        await late.send_hello(hello_of(third, "control"))
        assert (await late.receive_hello()).refusal == "full"
        for connection in (*made.values(), late):
            connection.link.close()


async def test_peer_with_links_enough_dials_nobody_and_still_takes_newcomers(
    mint_group: MintGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "LINK_PEERS_WANTED", 1)
    first, second, third = mint_group(3)
    async with running(first) as (peer,):
        made = await hostile_pair(peer, second)
        await peer.up()
        nowhere = "127.0.0.1:9"
        peer.links.dial(nowhere)
        while nowhere not in peer.links.failures():
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert peer.links.failures()[nowhere].startswith("there are links enough")
        newcomer = await hostile_pair(peer, third)
        await peer.up()
        assert peer.links.devices() == tuple(sorted((second.device, third.device)))
        for connection in (*made.values(), *newcomer.values()):
            connection.link.close()


async def test_client_without_certificate_never_counts_as_a_peer(mint_group: MintGroup) -> None:
    (group,) = mint_group(1)
    async with running(group) as (peer,):
        bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        bare.check_hostname = False
        bare.verify_mode = ssl.CERT_NONE
        link = TlsLink(await connect(peer.address), bare, server_side=False)
        await link.handshake()  # TLS 1.3: the client learns at its first read only
        with pytest.raises(LinkBroken):
            await link.recv_exactly(memoryview(bytearray(1)))
        while peer.links.statistics().refused_count < 1:
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert peer.links.devices() == ()
