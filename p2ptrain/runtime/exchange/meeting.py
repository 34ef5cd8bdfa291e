"""Meetings of the peers of one stage: send this rank's pieces, await the others'.

What is sent, awaited and added in which order says `training.collectives`. Every rank of a stage
makes one `Meetings` for a view, and calls the same operations with the same keys; different
meetings may be under way at once. A rank that comes early waits in its call; what it has sent
waits at the others in buffers of their own, because a frame that were held back could keep the
inputs behind it from who must compute first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import trio

from p2ptrain.energy.phases import Phase
from p2ptrain.errors import InvariantBroken, RemoteProtocolError
from p2ptrain.ids import DeviceId
from p2ptrain.runtime.exchange.bodies import BodyReader
from p2ptrain.runtime.signal import Signal
from p2ptrain.training.collectives import (
    Array,
    Meeting,
    MeetingKey,
    Operation,
    add_by_rank,
    pieces_of,
)
from p2ptrain.wire.frames import TensorHeader

ADDED_IN_PLACE_BYTES = 256 * 1024
"""Less than this is added at once, more in a thread."""


class SendPiece(Protocol):
    """Sends one frame of a meeting of the item that is open."""

    async def __call__(self, device: DeviceId, kind: str, key: MeetingKey, piece: Array) -> None:
        """PeerLost when the link breaks. Cancelled: a frame that has begun ends as a whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """The peers of a stage, and which of them this one is."""

    devices: tuple[DeviceId, ...]
    own: int

    @property
    def others(self) -> tuple[int, ...]:
        return tuple(rank for rank in range(len(self.devices)) if rank != self.own)


_Frame = tuple[str, MeetingKey, int]
"""Kind, meeting and the rank that sent it."""


class Meetings:
    """All meetings of one rank in a view; those of one item at a time."""

    def __init__(
        self,
        ranks: Ranks,
        *,
        expected: Callable[[str, MeetingKey], Meeting | None],
        held_bytes_max: int,
        send: SendPiece,
        phase: Callable[[Phase], AbstractContextManager[None]],
        signal: Signal,
    ) -> None:
        """Nothing is expected before `open`.

        Args:
            ranks: Of the stage.
            expected: By phase and key, the meetings of an item; None: there is none such.
            held_bytes_max: What may wait here that nobody has asked for yet, as the plan has it.
            send: Sends a piece to another rank.
            phase: Where time is booked.
            signal: Told of everything that arrives.
        """
        self._ranks, self._expected, self._held_bytes_max = ranks, expected, held_bytes_max
        self._send, self._phase, self._signal = send, phase, signal
        self._item = 0
        self._item_phase: str | None = None
        self._held_bytes = 0
        self._joined: set[MeetingKey] = set()
        self._begun: set[_Frame] = set()
        self._arrived: dict[_Frame, Array] = {}

    @property
    def begun(self) -> bool:
        """Whether anything of the open item has come."""
        return bool(self._begun)

    @property
    def held_bytes(self) -> int:
        """What has come and is not taken yet, or is on its way in."""
        return self._held_bytes

    def open(self, phase: str) -> None:
        """Meetings of the next item, `train` or `evaluate`; what is left of others is forgotten."""
        self._item += 1
        self._item_phase, self._held_bytes = phase, 0
        self._joined.clear()
        self._begun.clear()
        self._arrived.clear()

    # What this rank does.

    async def reduce(self, key: MeetingKey, vector: Array) -> None:
        """Replace a flat vector by the sum of all ranks' vectors.

        Cancelled: the vector holds terms and sums mixed; abandon the step.

        Raises:
            PeerLost: another rank is gone; the view must change.
        """
        meeting = self._join(key, "reduce")
        pieces = pieces_of(vector, meeting.lengths)
        await self._add(meeting, key, pieces, tell=True)
        for rank, total in (await self._await("total", meeting, key)).items():
            np.copyto(pieces[rank], total)

    async def scatter(self, key: MeetingKey, pieces: Sequence[Array]) -> Array:
        """This rank's piece of the sum: `pieces` are its terms by rank, flat and contiguous.

        The sum takes the place of its own term. Raises as `reduce`.
        """
        meeting = self._join(key, "scatter")
        await self._add(meeting, key, pieces, tell=False)
        return pieces[self._ranks.own]

    async def gather(self, key: MeetingKey, own: Array) -> tuple[Array, ...]:
        """Everybody's pieces by rank, flat; `own` is this rank's, flat and contiguous.

        Raises as `reduce`.
        """
        meeting = self._join(key, "gather")
        async with trio.open_nursery() as nursery:
            self._send_to_all(nursery, "slice", key, own)
            got = await self._await("slice", meeting, key)
        empty = np.empty(0, np.float32)
        got[self._ranks.own] = own
        return tuple(got.get(rank, empty) for rank in range(len(meeting.lengths)))

    async def _add(
        self, meeting: Meeting, key: MeetingKey, pieces: Sequence[Array], *, tell: bool
    ) -> None:
        own = self._ranks.own
        async with trio.open_nursery() as nursery:
            for rank in self._ranks.others:
                if pieces[rank].size:
                    nursery.start_soon(self._send_one, rank, "part", key, pieces[rank])
            terms = await self._await("part", meeting, key)
            if terms:
                await self._add_up(pieces[own], terms)
            if tell:
                self._send_to_all(nursery, "total", key, pieces[own])

    async def _add_up(self, piece: Array, terms: dict[int, Array]) -> None:
        with self._phase("compute"):
            if piece.nbytes < ADDED_IN_PLACE_BYTES:
                add_by_rank(piece, self._ranks.own, terms)
            else:
                await trio.to_thread.run_sync(add_by_rank, piece, self._ranks.own, terms)

    def _join(self, key: MeetingKey, operation: Operation) -> Meeting:
        meeting = self._expected(self._item_phase or "", key)
        if meeting is None or meeting.operation != operation or key in self._joined:
            raise InvariantBroken(f"{operation} {key} is no meeting of this item, or is over")
        self._joined.add(key)
        return meeting

    def _send_to_all(self, nursery: trio.Nursery, kind: str, key: MeetingKey, piece: Array) -> None:
        if piece.size:
            for rank in self._ranks.others:
                nursery.start_soon(self._send_one, rank, kind, key, piece)

    async def _send_one(self, rank: int, kind: str, key: MeetingKey, piece: Array) -> None:
        with self._phase("communicate"):
            await self._send(self._ranks.devices[rank], kind, key, piece)

    async def _await(self, kind: str, meeting: Meeting, key: MeetingKey) -> dict[int, Array]:
        """Every other rank's frame of a meeting, once all are here."""
        awaited = {rank: (kind, key, rank) for rank in meeting.senders(kind, self._ranks.own)}
        with self._phase("wait"):
            await self._signal.wait_until(lambda: self._arrived.keys() >= set(awaited.values()))
        taken = {rank: self._arrived.pop(frame) for rank, frame in awaited.items()}
        self._held_bytes -= sum(array.nbytes for array in taken.values())
        return taken

    # What arrives.

    async def receive(
        self, sender: DeviceId, header: TensorHeader, length: int, reader: BodyReader
    ) -> None:
        """Take a frame of the open item.

        Raises:
            RemoteProtocolError: one that the plan does not predict, or a second one; the link is
                closed.
        """
        frame = self._expect(sender, header, length)
        item = self._item
        self._begun.add(frame)
        self._held_bytes += length
        array = np.empty(length // np.dtype(np.float32).itemsize, np.float32)
        await reader.read_into(array.data.cast("B"))
        if item == self._item:  # else it belongs to nothing any more
            self._arrived[frame] = array
            self._signal.notify()

    def _expect(self, sender: DeviceId, header: TensorHeader, length: int) -> _Frame:
        kind = header.kind
        key = MeetingKey(microbatch=header.microbatch, segment=header.segment, index=header.index)
        meeting = self._expected(header.phase, key)
        if meeting is None or sender not in self._ranks.devices:
            raise RemoteProtocolError(f"a {kind} of a meeting that this stage does not expect")
        rank = self._ranks.devices.index(sender)
        size = meeting.body_bytes(kind, sender=rank, receiver=self._ranks.own)
        if size != length:
            raise RemoteProtocolError(f"a {kind} of {length} bytes, not {size}")
        if (kind, key, rank) in self._begun:
            raise RemoteProtocolError(f"a {kind} came twice")
        if kind == "total" and key not in self._joined:
            raise RemoteProtocolError("a total without our part")
        if self._held_bytes + length > self._held_bytes_max:
            raise RemoteProtocolError(f"more of a {kind} than can wait here")
        return kind, key, rank
