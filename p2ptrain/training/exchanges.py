"""What shards do together with one value of each, and a group of them in one process.

A shard's work is a generator that yields an `Exchange` and is sent what comes of it. Whoever drives
it decides how the shards meet: over links, or here, all in one process. Terms are added in rank
order, so the bits are the same.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from p2ptrain.bundle.sharding import COLLECTIVES
from p2ptrain.errors import InvariantBroken
from p2ptrain.training.safetensors import Array

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One shard's value for a collective. All shards come to the same meetings in one order."""

    kind: str
    """reduce: all get the sum. gather: the slices side by side. scatter: each its slice of the
    sum."""
    segment: int
    site: int
    """Which of the segment's; distinct in a step and microbatch."""
    array: Array
    """Read only; it stays as it is until the meeting's result is sent."""
    axis: int = 0
    """Along which slices lie."""
    counts: tuple[int, ...] = ()
    """By rank: elements along the axis; empty for reduce."""

    @property
    def place(self) -> tuple[str, int, int]:
        """What is the same at every shard."""
        return self.kind, self.segment, self.site


Exchanges = Generator[Exchange, Array, _T]
"""A shard's work until it is done; what is sent back must not be kept by the driver."""


def meet(brought: Sequence[Exchange]) -> list[Array]:
    """What every rank gets, from what all brought, by rank; results may share memory.

    Raises:
        InvariantBroken: the shards are at different meetings.
    """
    first = brought[0]
    if len({meeting.place for meeting in brought}) != 1 or first.kind not in COLLECTIVES:
        raise InvariantBroken("shards are at different meetings")
    if first.kind == "gather":
        whole = np.concatenate([meeting.array for meeting in brought], first.axis)
        return [whole] * len(brought)
    whole = first.array.copy()
    with np.errstate(all="ignore"):  # a sum that is not finite is refused at the step's end
        for meeting in brought[1:]:
            np.add(whole, meeting.array, out=whole)
    if first.kind == "reduce":
        return [whole] * len(brought)
    return np.split(whole, np.cumsum(first.counts)[:-1], first.axis)


def together(shards: Sequence[Exchanges[_T]]) -> list[_T]:
    """Drive all shards of a group at once until they are done; their results by rank.

    Raises:
        InvariantBroken: some are done while others wait for them.
    """
    done: list[_T] = []
    brought = [meeting for shard in shards if (meeting := _advance(shard, None, done))]
    while brought:
        if done:
            break
        answers = meet(brought)
        brought = [
            meeting
            for shard, answer in zip(shards, answers, strict=True)
            if (meeting := _advance(shard, answer, done))
        ]
    if len(done) != len(shards):
        raise InvariantBroken("some shards are done while others wait for them")
    return done


def _advance(shard: Exchanges[_T], answer: Array | None, done: list[_T]) -> Exchange | None:
    """The shard's next meeting; None once it is done, its result is then in `done`."""
    try:
        return next(shard) if answer is None else shard.send(answer)
    except StopIteration as end:
        done.append(end.value)
        return None
