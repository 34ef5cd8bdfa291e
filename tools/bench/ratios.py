"""What a benchmark's turns mean: medians, ratios taken round by round, targets met or missed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

TORCH: Final = "torch eager"
TORCH_1F1B: Final = "torch 1F1B"
TORCH_ZERO_BUBBLE: Final = "torch zero-bubble"
ZERO_BUBBLE: Final = "eager-zb-h1"
SHARE_OF_CEILING_MIN: Final = 0.93
LOSS_TOLERANCE: Final = 2e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One contender's turn in one round: seconds and mean loss of each step."""

    seconds: tuple[float, ...]
    losses: tuple[float, ...]

    def median_s(self, *, dropped: int) -> float:
        """Median seconds per step without the first `dropped` steps, which warm up."""
        return statistics.median(self.seconds[dropped:])


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Median, least and greatest of a figure over the rounds."""

    median: float
    least: float
    greatest: float


def spread(values: Sequence[float]) -> Spread:
    """The spread of at least one value."""
    return Spread(median=statistics.median(values), least=min(values), greatest=max(values))


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """The spread of one ratio per round: a slow moment of the machine falls on both sides."""
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """How many times faster `fast` should be than `slow`."""

    fast: str
    slow: str
    least: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A figure beside its target."""

    what: str
    reached: Spread
    least: float

    @property
    def is_met(self) -> bool:
        return self.reached.median >= self.least


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One of our contenders."""

    peers: int
    microbatches: int
    schedule: str = "1f1b"

    def __str__(self) -> str:
        name = f"p2ptrain {self.peers} x 1, {self.microbatches} microbatches"
        return name if self.schedule == "1f1b" else f"{name}, {self.schedule}"


def cases(short: int, long: int | None) -> tuple[Case, ...]:
    """Our contenders: one peer and two, with `short` microbatches under both schedules and, where
    it is given, with `long`."""
    counts = (short,) if long is None else (short, long)
    plain = (Case(peers=peers, microbatches=count) for peers in (1, 2) for count in counts)
    return (*plain, Case(peers=2, microbatches=short, schedule=ZERO_BUBBLE))


def ours(peers: int, microbatches: int, schedule: str = "1f1b") -> str:
    """The name of one of our contenders."""
    return str(Case(peers=peers, microbatches=microbatches, schedule=schedule))


def targets(short: int, long: int | None) -> tuple[Target, ...]:
    """The speed-ups to reach, with `short` microbatches and, when measured, with `long`."""
    one, two, delayed = ours(1, short), ours(2, short), ours(2, short, ZERO_BUBBLE)
    chosen = [
        Target(fast=one, slow=TORCH, least=1.6),
        Target(fast=two, slow=one, least=1.5),
        Target(fast=delayed, slow=one, least=1.8),
        Target(fast=two, slow=TORCH_1F1B, least=1.45),
        Target(fast=delayed, slow=TORCH_ZERO_BUBBLE, least=1.45),
    ]
    if long is not None:
        chosen.insert(3, Target(fast=ours(2, long), slow=ours(1, long), least=1.65))
    return tuple(chosen)


def verdicts(
    steps_s: Mapping[str, Sequence[float]],
    wanted: Sequence[Target],
    ceilings: Mapping[tuple[str, str], Sequence[float]],
) -> tuple[Verdict, ...]:
    """Every target whose two contenders were measured, in order.

    Args:
        steps_s: Median seconds per step by contender, one per round.
        wanted: The speed-ups to reach.
        ceilings: By (fast, slow), one per round: the speed-up that the schedule allows with the
            cuts of that round; adds a verdict on the share of it that was reached.
    """
    found = []
    for target in wanted:
        if target.fast not in steps_s or target.slow not in steps_s:
            continue
        reached = ratios(steps_s[target.slow], steps_s[target.fast])
        what = f"{target.fast} / {target.slow}"
        found.append(Verdict(what=what, reached=reached, least=target.least))
        own = ceilings.get((target.fast, target.slow))
        if own is not None:
            allowed_s = [a / b for a, b in zip(steps_s[target.slow], own, strict=True)]
            share = ratios(allowed_s, steps_s[target.fast])
            what = f"share of the schedule's ceiling {spread(own).median:.3f}: {target.fast}"
            found.append(Verdict(what=what, reached=share, least=SHARE_OF_CEILING_MIN))
    return tuple(found)


def loss_difference(mine: Sequence[Turn], theirs: Sequence[Turn]) -> float:
    """The largest difference between two contenders' losses, over all their turns and steps."""
    return max(
        abs(a - b)
        for one in mine
        for other in theirs
        for a, b in zip(one.losses, other.losses, strict=True)
    )
