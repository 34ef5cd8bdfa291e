"""Which devices could work together, in which order: every way of a few, likely ones of many.

With many devices: the fastest, the roomiest and the most frugal k, each as a pipeline in three
orders, as one data-parallel group, and as hybrids of balanced or of equal groups.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from p2ptrain.planner.arrangement import Groups, kind_of
from p2ptrain.planner.kinds import Kind
from p2ptrain.planner.pricing import Pricing

EVERY_WAY_MAX: Final = 330
"""Ways of one kind that are all tried: every pipeline of five devices, every hybrid of four."""
HYBRID_STAGES: Final = (2, 3, 4, 8)


def groupings(pricing: Pricing, kind: Kind) -> Iterator[Groups]:
    """Groups of one kind, each once, in a fixed order."""
    if pricing.question.private:
        yield from _private(pricing, kind)
        return
    most, stages = min(len(pricing.devices), 64), pricing.question.stages
    longest = pricing.segment_count if stages is None else min(stages, pricing.segment_count)
    source = _likely(pricing, kind)
    if tries_every_way(pricing, kind):
        source = _every(kind, most, longest)
    seen = set()
    for groups in source:
        as_asked = stages in (None, len(groups)) and len(groups) <= pricing.segment_count
        if groups not in seen and as_asked and kind_of(groups) == kind:
            seen.add(groups)
            yield groups


def tries_every_way(pricing: Pricing, kind: Kind) -> bool:
    """Whether there are so few ways that none is left out."""
    most, stages = min(len(pricing.devices), 64), pricing.question.stages
    longest = pricing.segment_count if stages is None else min(stages, pricing.segment_count)
    return _count(kind, most, longest) <= EVERY_WAY_MAX


def _private(pricing: Pricing, kind: Kind) -> Iterator[Groups]:
    """The owner alone, or first and last with others between."""
    question = pricing.question
    everyone = range(len(pricing.devices))
    owner = next((i for i in everyone if pricing.devices[i].id == question.home), None)
    if owner is None:
        return
    if kind == "one device" and question.stages in (None, 1):
        yield ((owner,),)
    if kind != "pipeline":
        return
    others = [i for i in everyone if i != owner]
    longest = min(len(others), pricing.segment_count - 2)
    orders: Iterator[tuple[int, ...]] = (
        order for size in range(1, longest + 1) for order in itertools.permutations(others, size)
    )
    if sum(math.perm(len(others), size) for size in range(1, longest + 1)) > EVERY_WAY_MAX:
        orders = _likely_orders(pricing, owner, longest)
    seen = set()
    for order in orders:
        if question.stages in (None, len(order) + 2) and order not in seen:
            seen.add(order)
            yield ((owner,), *((i,) for i in order), (owner,))


def _likely_orders(pricing: Pricing, owner: int, longest: int) -> Iterator[tuple[int, ...]]:
    """Of many others the best few of each ranking, and as many as are asked for."""
    asked = pricing.question.stages
    for ranking in _rankings(pricing):
        others = [i for i in ranking if i != owner]
        for count in thinned(longest) if asked is None else [asked - 2]:
            if 1 <= count <= longest:
                yield tuple(others[:count])
                yield tuple(reversed(others[:count]))


def subsets(pricing: Pricing) -> Iterator[tuple[int, ...]]:
    """Two or more devices that could share every segment."""
    everyone = range(len(pricing.devices))
    if 2 ** len(everyone) <= EVERY_WAY_MAX:
        for size in range(2, len(everyone) + 1):
            yield from itertools.combinations(everyone, size)
        return
    seen = set()
    for ranking in _rankings(pricing):
        for count in thinned(len(everyone)):
            chosen = tuple(sorted(ranking[:count]))
            if count > 1 and chosen not in seen:
                seen.add(chosen)
                yield chosen


def thinned(most: int) -> list[int]:
    """Numbers from 1 to `most`, each at most half as much again as the last; the largest always."""
    counts = [1]
    while counts[-1] < most:
        step = max(1, counts[-1] // 2)
        counts.append(min(most, counts[-1] + step))
    return counts


def _count(kind: Kind, devices: int, segments: int) -> int:
    """How many ways there are, at least; stops counting where they are too many."""
    if kind == "one device":
        return devices
    if kind == "data":
        return int(2**devices)
    if kind == "pipeline":
        ways = 0
        for size in range(2, min(devices, segments) + 1):
            ordered = 1
            for i in range(size):
                ordered *= devices - i
            ways += ordered
        return ways
    return int(5 ** (devices - 1))


def _every(kind: Kind, devices: int, segments: int) -> Iterator[Groups]:
    everyone = range(devices)
    if kind in ("one device", "data"):
        sizes = [1] if kind == "one device" else range(2, devices + 1)
        for size in sizes:
            yield from ((chosen,) for chosen in itertools.combinations(everyone, size))
        return
    for size in range(2, devices + 1):
        for chosen in itertools.combinations(everyone, size):
            for stages in range(2, min(size, segments) + 1):
                yield from _split(chosen, stages)


def _split(chosen: tuple[int, ...], stages: int) -> Iterator[Groups]:
    """Every way to put all of `chosen` into so many stages, none of them empty."""
    for places in itertools.product(range(stages), repeat=len(chosen)):
        groups = tuple(
            tuple(device for device, place in zip(chosen, places, strict=True) if place == stage)
            for stage in range(stages)
        )
        if all(groups):
            yield groups


def _rankings(pricing: Pricing) -> list[list[int]]:
    """Devices by speed, by memory, and by joules of a pass; the best first."""
    everyone = range(len(pricing.devices))
    passes = [max(1, pricing.pass_ns(i)) for i in everyone]
    keys: list[Callable[[int], tuple[int, int]]] = [
        lambda i: (passes[i], i),
        lambda i: (-pricing.devices[i].profile.memory_bytes, i),
        lambda i: (pricing.devices[i].power.busy_uw * passes[i], i),
    ]
    return [sorted(everyone, key=key) for key in keys]


def _likely(pricing: Pricing, kind: Kind) -> Iterator[Groups]:
    home, stages = pricing.question.home, pricing.question.stages
    for ranking in _rankings(pricing):
        counts = thinned(len(ranking))
        if kind == "pipeline" and stages is not None:
            counts = [stages] if stages <= len(ranking) else []
        for count in counts:
            chosen = ranking[:count]
            if kind in ("one device", "data"):
                yield (tuple(sorted(chosen)),)
            elif kind == "pipeline":
                home_first = sorted(chosen, key=lambda i: pricing.devices[i].id != home)
                for order in (chosen, chosen[::-1], home_first):
                    yield tuple((device,) for device in order)
            else:
                yield from _hybrids(pricing, chosen)
    if kind == "one device":
        yield from (((index,),) for index in range(len(pricing.devices)))


def _hybrids(pricing: Pricing, chosen: Sequence[int]) -> Iterator[Groups]:
    """The fastest first: neighbours in the ranking together, or groups of equal speed."""
    asked = pricing.question.stages
    for stages in HYBRID_STAGES if asked is None else (asked,):
        if stages >= len(chosen):
            return
        size = -(-len(chosen) // stages)
        parts = [chosen[i : i + size] for i in range(0, len(chosen), size)]
        yield tuple(tuple(sorted(part)) for part in parts)
        groups: list[list[int]] = [[] for _ in range(stages)]
        speeds = [0] * stages
        for device in chosen:
            slowest = min(range(stages), key=lambda i: (speeds[i], i))
            groups[slowest].append(device)
            speeds[slowest] += 10**18 // max(1, pricing.pass_ns(device))
        yield tuple(tuple(sorted(group)) for group in groups)
