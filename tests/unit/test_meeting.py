"""Meetings of several ranks in memory: sums, pieces side by side, and what is refused."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import numpy as np
import pytest
import trio
import trio.testing

from p2ptrain.errors import InvariantBroken, RemoteProtocolError
from p2ptrain.ids import DeviceId, Digest, Lineage, RunId, ViewNumber
from p2ptrain.runtime.exchange.meeting import ADDED_IN_PLACE_BYTES, Meetings, Ranks
from p2ptrain.runtime.signal import Signal
from p2ptrain.training.collectives import (
    Array,
    Meeting,
    MeetingKey,
    Operation,
    even_lengths,
    held_bytes,
)
from p2ptrain.wire.frames import TensorHeader
from tests.memory_group import MemoryReader

DEVICES = tuple(DeviceId(letter * 26) for letter in "abcd")
KEY = MeetingKey(microbatch=0, segment=3, index=0)


def header(kind: str, key: MeetingKey = KEY, phase: str = "train") -> TensorHeader:
    return TensorHeader(
        run=RunId("r" * 26), lineage=Lineage(0), view=ViewNumber(1), plan=Digest("0" * 64),
        kind=kind, phase=phase, step=1, microbatch=key.microbatch, segment=key.segment,
        index=key.index,
    )  # fmt: skip


@dataclass
class Stage:
    """All ranks of a stage, and what goes between them, in one process."""

    operation: Operation
    lengths: tuple[int, ...]
    held_max: int | None = None
    sent: list[tuple[int, DeviceId, str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.meeting = Meeting(operation=self.operation, lengths=self.lengths)
        self.ranks = [self._meetings(rank) for rank in range(len(self.lengths))]

    def _meetings(self, rank: int) -> Meetings:
        devices = DEVICES[: len(self.lengths)]

        async def send(device: DeviceId, kind: str, key: MeetingKey, piece: Array) -> None:
            self.sent.append((rank, device, kind, piece.nbytes))
            content = memoryview(piece.tobytes())
            receiver = self.ranks[devices.index(device)]
            reader = MemoryReader(content)
            await receiver.receive(devices[rank], header(kind, key), len(content), reader)
            assert not reader.left

        held_max = held_bytes([self.meeting], rank) if self.held_max is None else self.held_max
        made = Meetings(
            Ranks(devices=devices, own=rank),
            expected=lambda phase, key: self.meeting if phase == "train" else None,
            held_bytes_max=held_max,
            send=send,
            phase=lambda phase: contextlib.nullcontext(),
            signal=Signal(),
        )
        made.open("train")
        return made


def vectors(ranks: int, elements: int) -> list[Array]:
    rng = np.random.Generator(np.random.Philox(1))
    return [rng.standard_normal(elements).astype(np.float32) for _ in range(ranks)]


@pytest.mark.parametrize("lengths", [(4, 3), (1, 0, 6), even_lengths(ADDED_IN_PLACE_BYTES, 3)])
async def test_reduce_gives_all_the_sum_by_rank(lengths: tuple[int, ...]) -> None:
    stage, own = Stage("reduce", lengths), vectors(len(lengths), sum(lengths))
    wanted = own[0].copy()
    for vector in own[1:]:
        wanted += vector
    async with trio.open_nursery() as nursery:
        for rank, vector in reversed(list(zip(stage.ranks, own, strict=True))):
            nursery.start_soon(rank.reduce, KEY, vector)
    assert {vector.tobytes() for vector in own} == {wanted.tobytes()}
    assert [rank.held_bytes for rank in stage.ranks] == [0] * len(lengths)
    sent = sum(count for sender, *_, count in stage.sent if sender == 0)
    assert sent == 4 * (sum(lengths[1:]) + (len(lengths) - 1) * lengths[0])


async def test_scatter_gives_each_its_piece_of_the_sum() -> None:
    stage = Stage("scatter", (2, 1))
    terms = [[np.full(n, 10.0 * r + n, np.float32) for n in stage.lengths] for r in range(2)]
    got: dict[int, Array] = {}

    async def scatter(rank: int) -> None:
        got[rank] = await stage.ranks[rank].scatter(KEY, terms[rank])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(scatter, 0)
        nursery.start_soon(scatter, 1)
    assert got[0].tolist() == [14.0, 14.0]
    assert got[1].tolist() == [12.0]


async def test_gather_gives_all_everybody_s_pieces() -> None:
    stage = Stage("gather", (2, 0, 3))
    own = [np.full(n, rank, np.float32) for rank, n in enumerate(stage.lengths)]
    got: dict[int, list[list[float]]] = {}

    async def gather(rank: int) -> None:
        pieces = await stage.ranks[rank].gather(KEY, own[rank])
        got[rank] = [piece.tolist() for piece in pieces]

    async with trio.open_nursery() as nursery:
        for rank in (2, 0, 1):
            nursery.start_soon(gather, rank)
    assert got[0] == got[1] == got[2] == [[0.0, 0.0], [], [2.0, 2.0, 2.0]]


async def receive(
    meetings: Meetings, kind: str, body: bytes, *, sender: int = 1, phase: str = "train"
) -> None:
    reader = MemoryReader(memoryview(body))
    await meetings.receive(DEVICES[sender], header(kind, phase=phase), len(body), reader)


@pytest.mark.parametrize(
    ("kind", "size", "sender", "phase"),
    [
        ("part", 12, 1, "train"),  # another size than this rank's piece
        ("slice", 16, 1, "train"),  # not of this operation
        ("part", 16, 2, "train"),  # not of this stage
        ("part", 16, 0, "train"),  # from itself
        ("part", 16, 1, "evaluate"),  # no such meeting
        ("total", 12, 1, "train"),  # before our part was sent
    ],
)
async def test_frame_that_the_plan_does_not_predict_is_refused(
    kind: str, size: int, sender: int, phase: str
) -> None:
    meetings = Stage("reduce", (4, 3)).ranks[0]
    with pytest.raises(RemoteProtocolError):
        await receive(meetings, kind, bytes(size), sender=sender, phase=phase)
    assert meetings.held_bytes == 0


async def test_frame_that_comes_twice_is_refused_and_held_once() -> None:
    meetings = Stage("reduce", (4, 3)).ranks[0]
    await receive(meetings, "part", bytes(16))
    assert meetings.held_bytes == 16
    assert meetings.begun
    with pytest.raises(RemoteProtocolError, match="twice"):
        await receive(meetings, "part", bytes(16))
    meetings.open("train")
    assert meetings.held_bytes == 0
    assert not meetings.begun
    await receive(meetings, "part", bytes(16))


async def test_more_than_the_plan_lets_wait_is_refused() -> None:
    stage = Stage("reduce", (4, 3), held_max=15)
    with pytest.raises(RemoteProtocolError, match="more of a part"):
        await receive(stage.ranks[0], "part", bytes(16))


async def test_frame_of_the_item_before_is_forgotten() -> None:
    meetings = Stage("reduce", (4, 3)).ranks[0]

    class Slow(MemoryReader):
        async def read_into(self, view: memoryview) -> None:
            meetings.open("train")
            await super().read_into(view)

    await meetings.receive(DEVICES[1], header("part"), 16, Slow(memoryview(bytes(16))))
    assert not meetings.begun
    with trio.testing.assert_checkpoints(), pytest.raises(trio.TooSlowError):
        with trio.fail_after(0):
            await meetings.reduce(KEY, np.zeros(7, np.float32))


async def test_meeting_is_joined_once_and_as_what_it_is() -> None:
    alone = Stage("reduce", (0, 0)).ranks[0]
    await alone.reduce(KEY, np.empty(0, np.float32))
    with pytest.raises(InvariantBroken, match="is over"):
        await alone.reduce(KEY, np.empty(0, np.float32))
    with pytest.raises(InvariantBroken, match="no meeting"):
        await Stage("reduce", (0, 0)).ranks[0].gather(KEY, np.empty(0, np.float32))
