"""Links are replaced before they are worn out; no frame is lost and nobody seems dead."""

from __future__ import annotations

import os

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from p2ptrain import limits
from p2ptrain.net.connection import Connection
from p2ptrain.wire.flows import NO_RUN, Flow
from p2ptrain.wire.frames import FrameType, encode_frame_head
from p2ptrain.wire.hello import Spoken
from tests.linked_peers import (
    MintGroup,
    Note,
    Peer,
    bulk,
    hello_of,
    hostile_pair,
    linked,
    raw_connection,
    running,
    tensor,
)

CHUNK = os.urandom(100_000)
FLOW = Flow(NO_RUN, "state")
MOVED = encode_frame_head(FrameType.MOVED, b"", 0)


@pytest.fixture(autouse=True)
def short_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LINK_RENEW_AGE_S", 2.0)
    monkeypatch.setattr(limits, "LINK_AGE_MAX_S", 4.0)
    monkeypatch.setattr(limits, "LINK_RENEW_RETRY_S", 0.5)


def slot(peer: Peer, other: Peer, kind: str) -> Connection:
    return peer.links._sessions.live(other.device).slots[kind]


def renewed(peer: Peer) -> int:
    return peer.links.statistics().renewed_count


async def wait_settled(*peers: Peer, renewals: int) -> None:
    connections = [
        connection
        for peer in peers
        for device in peer.links.devices()
        for connection in peer.links._sessions.live(device).slots.values()
    ]
    for _ in range(1000):  # the clock stands still, so no deadline would end this
        enough = all(renewed(peer) >= renewals for peer in peers)
        if enough and all(connection.settled for connection in connections):
            return
        await trio.testing.wait_all_tasks_blocked(0.005)
    pytest.fail(f"not renewed {renewals} times: {[renewed(peer) for peer in peers]}")


def assert_nothing_happened(*peers: Peer) -> None:
    for peer in peers:
        with pytest.raises(trio.WouldBlock):
            peer.links.events.receive_nowait()


async def test_old_links_are_renewed_and_nobody_notices(
    mint_group: MintGroup, mock_clock: MockClock
) -> None:
    async with linked(mint_group) as (low, high):
        before = [slot(low, high, kind).link for kind in ("control", "data")]
        mock_clock.jump(1.9)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert renewed(low) == 0
        mock_clock.jump(0.2)
        await wait_settled(low, high, renewals=2)
        after = [slot(low, high, kind).link for kind in ("control", "data")]
        assert not set(before) & set(after)
        low.links.send_control(high.device, Note(number=1))
        high.links.send_control(low.device, Note(number=2))
        assert await high.links.inbox.receive() == (low.device, Note(number=1))
        assert await low.links.inbox.receive() == (high.device, Note(number=2))
        await low.links.send_tensor(high.device, tensor(1), b"there")
        await high.links.send_tensor(low.device, tensor(2), b"back")
        await high.wait_arrived(1)
        await low.wait_arrived(1)
        assert_nothing_happened(low, high)
        mock_clock.jump(2.1)  # and again
        await wait_settled(low, high, renewals=4)
        assert_nothing_happened(low, high)


async def test_frames_keep_their_order_while_busy_links_are_renewed(
    mint_group: MintGroup, mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "LINK_RENEW_BYTES", 3_000_000)
    monkeypatch.setattr(limits, "LINK_CARRIED_BYTES_MAX", 300_000_000)
    count, header = 150, bulk(CHUNK)

    async def send_all(sender: Peer, receiver: Peer) -> None:
        for step in range(count):
            await sender.links.send_tensor(receiver.device, tensor(step), CHUNK)
            await sender.links.send_bulk(receiver.device, header, CHUNK, FLOW)

    async def talk(sender: Peer, receiver: Peer) -> None:
        for number in range(count):
            sender.links.send_control(receiver.device, Note(number=number, filling=CHUNK))
            assert await receiver.links.inbox.receive() == (
                sender.device, Note(number=number, filling=CHUNK)
            )  # fmt: skip

    async with linked(mint_group) as (low, high):
        async with trio.open_nursery() as nursery:
            for one, other in ((low, high), (high, low)):
                nursery.start_soon(send_all, one, other)
                nursery.start_soon(talk, one, other)
                nursery.start_soon(other.wait_arrived, 2 * count)
        for peer in (low, high):
            assert [header.step for header, _ in peer.tensors] == list(range(count))
            assert all(body == CHUNK for _, body in peer.tensors)
            assert len(peer.chunks) == count
            assert renewed(peer) >= 6
            assert_nothing_happened(peer)


async def test_bytes_of_former_links_stay_counted(
    mint_group: MintGroup, mock_clock: MockClock
) -> None:
    async with linked(mint_group) as (low, high):
        await low.links.send_tensor(high.device, tensor(0), CHUNK)
        await high.wait_arrived(1)
        before = low.links.statistics().peers[high.device]
        mock_clock.jump(2.1)
        await wait_settled(low, high, renewals=2)
        after = low.links.statistics().peers[high.device]
        assert after.data_bytes_sent > before.data_bytes_sent > len(CHUNK)
        assert after.control_bytes_sent > before.control_bytes_sent


async def test_tensor_under_way_is_finished_on_the_old_link(
    mint_group: MintGroup, mock_clock: MockClock
) -> None:
    async with linked(mint_group) as (low, high), trio.open_nursery() as nursery:
        high.gate = trio.Event()
        body = bytes(32 << 20)
        nursery.start_soon(low.links.send_tensor, high.device, tensor(0), body)
        await trio.testing.wait_all_tasks_blocked(0.05)
        mock_clock.jump(2.1)
        nursery.start_soon(low.links.send_tensor, high.device, tensor(1), b"next")
        await trio.testing.wait_all_tasks_blocked(0.05)
        high.gate.set()
        await high.wait_arrived(2)
        assert [len(body) for _, body in high.tensors] == [len(body), 4]
        await wait_settled(low, high, renewals=2)
        assert_nothing_happened(low, high)


async def test_link_that_cannot_be_renewed_ends_at_its_limit(
    mint_group: MintGroup, mock_clock: MockClock
) -> None:
    async with linked(mint_group) as (low, high):
        dialler = low if slot(low, high, "data").dialled_here else high
        other = high if dialler is low else low
        slot(dialler, other, "data").address = "127.0.0.1:1"
        mock_clock.jump(2.1)
        await wait_settled(low, high, renewals=1)  # the control link
        for _ in range(3):
            mock_clock.jump(0.6)
            await trio.testing.wait_all_tasks_blocked(0.02)
            assert_nothing_happened(low, high)
        mock_clock.jump(0.2)
        for peer in (low, high):
            down = await peer.down()
            assert "not renewed" in down.reason or down.closed_by_peer
            assert not down.refused


async def test_peers_of_which_one_cannot_renew_dial_again_at_the_limit(
    mint_group: MintGroup, mock_clock: MockClock
) -> None:
    first, second = mint_group(2)
    async with running(first, Peer(second, spoken=Spoken(features=()))) as (new, old):
        new.links.dial(old.address)
        await new.up()
        await old.up()
        mock_clock.jump(3.9)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert_nothing_happened(new, old)
        assert renewed(new) == renewed(old) == 0
        mock_clock.jump(0.2)
        for peer in (new, old):
            await peer.down()
        mock_clock.jump(1.0)  # the pause before the next dial
        for peer in (new, old):
            await peer.up()


async def test_move_to_nowhere_breaks_the_protocol(mint_group: MintGroup) -> None:
    first, second = mint_group(2)
    async with running(first) as (peer,):
        made = await hostile_pair(peer, second)
        await peer.up()
        await made["data"].link.send_all(MOVED)
        assert "moved to nowhere" in (await peer.down()).reason
        for connection in made.values():
            connection.close()


@pytest.mark.parametrize("changes", [{"instance": 2}, {"features": ()}, {"features": ("renew",)}])
async def test_renewal_that_does_not_fit_is_refused(
    mint_group: MintGroup, changes: dict[str, object]
) -> None:
    """Of another process, unknown when the links came up, or of no links at all."""
    first, second = mint_group(2)
    async with running(first) as (peer,):
        made = await hostile_pair(peer, second)
        await peer.up()
        fresh = await raw_connection(peer, second, "data")
        await fresh.send_hello(hello_of(second, "data", renews=True, **changes))
        assert (await fresh.receive_hello()).refusal == "duplicate"
        assert peer.links.devices() == (second.device,)
        for connection in (*made.values(), fresh):
            connection.close()
    async with running(first) as (peer,):
        fresh = await raw_connection(peer, second, "control")
        await fresh.send_hello(hello_of(second, "control", renews=True))
        assert (await fresh.receive_hello()).refusal == "duplicate"
        assert peer.links.devices() == ()
        fresh.close()
