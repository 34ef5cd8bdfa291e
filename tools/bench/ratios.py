"""What a benchmark's turns mean: medians, ratios taken round by round, targets met or missed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

TORCH: Final = "torch eager"
TORCH_1F1B: Final = "torch 1F1B"
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


def ours(peers: int, microbatches: int) -> str:
    """The name of one of our contenders."""
    return f"p2ptrain {peers} x 1, {microbatches} microbatches"


def targets(short: int, long: int | None) -> tuple[Target, ...]:
    """The speed-ups to reach, with `short` microbatches and, when measured, with `long`."""
    one, two = ours(1, short), ours(2, short)
    chosen = [
        Target(fast=one, slow=TORCH, least=1.6),
        Target(fast=two, slow=one, least=1.5),
        Target(fast=two, slow=TORCH_1F1B, least=1.45),
    ]
    if long is not None:
        chosen.insert(2, Target(fast=ours(2, long), slow=ours(1, long), least=1.65))
    return tuple(chosen)


def verdicts(
    steps_s: Mapping[str, Sequence[float]],
    wanted: Sequence[Target],
    ceilings: Mapping[tuple[str, str], float],
) -> tuple[Verdict, ...]:
    """Every target whose two contenders were measured, in order.

    Args:
        steps_s: Median seconds per step by contender, one per round.
        wanted: The speed-ups to reach.
        ceilings: By (fast, slow): the speed-up that the schedule allows; adds a verdict on the
            share of it that was reached.
    """
    found = []
    for target in wanted:
        if target.fast not in steps_s or target.slow not in steps_s:
            continue
        reached = ratios(steps_s[target.slow], steps_s[target.fast])
        what = f"{target.fast} / {target.slow}"
        found.append(Verdict(what=what, reached=reached, least=target.least))
        ceiling = ceilings.get((target.fast, target.slow))
        if ceiling is not None:
            share = Spread(
                median=reached.median / ceiling,
                least=reached.least / ceiling,
                greatest=reached.greatest / ceiling,
            )
            what = f"share of the schedule's ceiling {ceiling:.3f}: {target.fast}"
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
