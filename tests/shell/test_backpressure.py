"""A receiver that takes nothing never makes a sender grow: tensors, chunks, messages, real TLS."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from p2ptrain import limits
from p2ptrain.errors import PeerLost
from p2ptrain.ids import DeviceId
from p2ptrain.wire.codec import encode
from p2ptrain.wire.flows import NO_RUN, Flow
from p2ptrain.wire.frames import FrameType, encode_frame_head
from tests.linked_peers import MintGroup, Note, Peer, bulk, hostile_pair, running, tensor

KERNEL_BYTES_MAX = 64 << 20
"""More than both sockets' buffers ever hold on loopback."""
CHUNK = os.urandom(limits.BULK_CHUNK_BYTES_MAX)
FLOW = Flow(NO_RUN, "state")


@asynccontextmanager
async def stalled(mint_group: MintGroup) -> AsyncIterator[tuple[Peer, DeviceId]]:
    """A peer, and a member that said HELLO and then reads nothing any more."""
    first, second = mint_group(2)
    async with running(first) as (peer,):
        made = await hostile_pair(peer, second)
        await peer.up()
        yield peer, second.device
        for connection in made.values():
            connection.link.close()


def queued_bytes(peer: Peer, device: DeviceId) -> int:
    return peer.links.statistics().peers[device].queued_bytes


async def blocked_bytes(send: Callable[[int], Awaitable[None]], size: int) -> int:
    """Send until nothing moves any more; the bytes that were taken."""
    sent = 0
    with trio.move_on_after(2) as scope:
        while sent <= KERNEL_BYTES_MAX:
            scope.deadline = trio.current_time() + 0.3  # that long without progress
            await send(sent)
            sent += size
    assert scope.cancelled_caught, "the sender was never held"
    return sent


async def test_tensors_wait_in_their_owners_memory(mint_group: MintGroup) -> None:
    body = bytes(4 << 20)
    async with stalled(mint_group) as (peer, device), trio.open_nursery() as nursery:
        for step in range(8):
            for _ in range(3):
                nursery.start_soon(peer.links.send_tensor, device, tensor(step), body)
        most = 0
        for _ in range(10):
            await trio.testing.wait_all_tasks_blocked(0.02)
            most = max(most, queued_bytes(peer, device))
        assert 0 < most <= limits.LINK_UNSENT_BYTES_MAX
        assert peer.links.devices() == (device,)
        nursery.cancel_scope.cancel()
    async with stalled(mint_group) as (peer, device):

        async def send(sent: int) -> None:
            await peer.links.send_tensor(device, tensor(sent), body)

        assert await blocked_bytes(send, len(body)) < KERNEL_BYTES_MAX


async def test_chunks_wait_in_their_owners_memory(mint_group: MintGroup) -> None:
    header = bulk(CHUNK)
    async with stalled(mint_group) as (peer, device):

        async def send(sent: int) -> None:
            await peer.links.send_bulk(device, header, CHUNK, FLOW)
            assert queued_bytes(peer, device) <= limits.LINK_UNSENT_BYTES_MAX

        assert await blocked_bytes(send, len(CHUNK)) < KERNEL_BYTES_MAX


@pytest.mark.parametrize("size", [0, 1000, 200_000])
async def test_messages_wait_under_their_bound_and_then_the_link_ends(
    mint_group: MintGroup, size: int
) -> None:
    async with stalled(mint_group) as (peer, device):
        most = count = 0

        async def flood() -> None:
            nonlocal most, count
            while count * size <= KERNEL_BYTES_MAX + limits.LINK_QUEUED_BYTES_MAX:
                peer.links.send_control(device, Note(number=count, filling=bytes(size)))
                most, count = max(most, queued_bytes(peer, device)), count + 1
                await trio.lowlevel.checkpoint()

        with pytest.raises(PeerLost, match="takes no control"):
            await flood()
        assert most <= limits.LINK_QUEUED_BYTES_MAX
        assert "takes no control" in (await peer.down()).reason
        assert queued_bytes(peer, device) == 0


async def test_peer_that_reads_no_messages_is_not_read_from_either(mint_group: MintGroup) -> None:
    """Its inbox full, a slow owner holds its senders back instead of storing what they send."""
    first, second = mint_group(2)
    async with running(first) as (peer,):
        made = await hostile_pair(peer, second)
        await peer.up()
        note = Note(number=1, filling=bytes(100_000))
        body = note_frame(note)

        async def send(sent: int) -> None:
            await made["control"].link.send_all(body)

        taken = await blocked_bytes(send, len(body))
        waiting = peer.links.inbox.statistics().current_buffer_used
        assert waiting == limits.INBOX_MESSAGES_MAX
        assert taken < KERNEL_BYTES_MAX
        for connection in made.values():
            connection.link.close()


def note_frame(note: Note) -> bytes:
    body = encode(note)
    return encode_frame_head(FrameType.CONTROL, b"", len(body)) + body
