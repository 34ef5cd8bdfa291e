"""Cuts of an arrangement: the one with the least busy bottleneck, and those around it.

A beam goes from stage to stage over cuts near the bottleneck's. Its width and reach shrink with
the number of stages; for few of them it reaches every cut and drops none.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

from p2ptrain.planner.arrangement import Arrangement, Cuts
from p2ptrain.planner.ends import bottleneck_ends, fits_ends
from p2ptrain.planner.halving import least_busy
from p2ptrain.planner.pricing import Pricing

REACH: Final = 36
"""Segments that all cuts together may be away from the bottleneck's."""
EXTENSIONS: Final = 12_000
"""Partial cuts that one beam makes longer, about."""


def bottleneck_cuts(pricing: Pricing, arrangement: Arrangement) -> Cuts | None:
    """Cuts whose busiest replica is least busy, within memory; None when nothing fits.

    For a given time each stage takes all it can, which is feasible if anything is; the time is
    found by halving.
    """
    if arrangement.is_folded:
        return bottleneck_ends(pricing, arrangement)
    high = max(r.busy_ns(0, pricing.segment_count) for own in arrangement.stages for r in own)
    best = _filled(pricing, arrangement, high) or _fitting(pricing, arrangement)
    return least_busy(lambda limit_ns: _filled(pricing, arrangement, limit_ns), high, best)


def _filled(pricing: Pricing, arrangement: Arrangement, within_ns: int) -> Cuts | None:
    """Every stage with as many segments as its time and memory hold, and one left for the rest."""
    count, stages = pricing.segment_count, len(arrangement.stages)
    cuts: list[int] = []
    first = 0
    for stage, replicas in enumerate(arrangement.stages):
        end = min(min(r.longest(first, within_ns), pricing.longest_fit(r, first)) for r in replicas)
        end = min(end, count - (stages - 1 - stage))
        if end <= first:
            return None
        cuts.append(end)
        first = end
    return tuple(cuts) if first == count else None


def _fitting(pricing: Pricing, arrangement: Arrangement) -> Cuts | None:
    """Any cuts that fit the memory, where taking all it can would leave a stage with nothing.

    What fits begins to fit no worse further on, so the last possible beginning decides.
    """
    count = pricing.segment_count
    begins: list[int] = [0]
    parents: list[dict[int, int]] = []
    for replicas in arrangement.stages:
        own: dict[int, int] = {}
        for end in range(begins[0] + 1, count + 1):
            first = begins[bisect_left(begins, end) - 1]
            if all(end <= pricing.longest_fit(r, first) for r in replicas):
                own[end] = first
        if not own:
            return None
        parents.append(own)
        begins = sorted(own)
    if count not in parents[-1]:
        return None
    cuts = [count]
    for own in reversed(parents[1:]):
        cuts.append(own[cuts[-1]])
    return tuple(reversed(cuts))


def cuts_around(pricing: Pricing, arrangement: Arrangement, middle: Cuts) -> list[Cuts]:
    """Cuts near `middle` that fit the memory, `middle` among them."""
    stages, count = len(middle), pricing.segment_count
    reach = max(1, REACH // stages)
    choices = min(2 * reach + 1, count - stages + 1)
    width = max(1, EXTENSIONS // (stages * choices**2))
    partial: dict[int, list[tuple[int, int, Cuts]]] = {0: [(0, 0, ())]}
    for stage in range(stages):
        longer: dict[int, list[tuple[int, int, Cuts]]] = {}
        highest = count - (stages - 1 - stage)
        for first, states in sorted(partial.items()):
            near = range(max(first + 1, middle[stage] - reach), middle[stage] + reach + 1)
            ends = [end for end in near if end <= highest] if stage < stages - 1 else [count]
            for end in ends:
                if not _fits(pricing, arrangement, stage, first, end):
                    break
                own = arrangement.stages[stage]
                busy = max(r.busy_ns(first, end) for r in own)
                trip = min(r.trip_ns[end] - r.trip_ns[first] for r in own)
                found = longer.setdefault(end, [])
                for bound, lead, cuts in states:
                    found.append((max(bound, lead + busy), lead + trip, (*cuts, end)))
        if stage < stages - 1:
            longer = {end: sorted(own)[:width] for end, own in longer.items()}
        partial = longer
    every = sorted({middle, *(cuts for _, _, cuts in partial.get(count, []))})
    return [each for each in every if fits_ends(pricing, arrangement, each)]


def _fits(pricing: Pricing, arrangement: Arrangement, stage: int, first: int, end: int) -> bool:
    return all(end <= pricing.longest_fit(r, first) for r in arrangement.stages[stage])
