"""Private plans: the owner of the data has the first and the last stage, so both are cut together.

Its two stages share its memory and its cores. Only values that somebody differentiates may leave
them: others, as masks and positions, are inputs or follow from inputs.
"""

from __future__ import annotations

from typing import Final

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.planner.arrangement import Arrangement, Cuts
from p2ptrain.planner.halving import least_busy
from p2ptrain.planner.pricing import Pricing, spans
from p2ptrain.planner.question import Question
from p2ptrain.schedule.actions import ONE
from p2ptrain.units import bytes_rounded_up, format_bytes

FRONTS_MAX: Final = 48
"""Lengths of the first stage that are tried."""


def private_objection(manifest: Manifest) -> str | None:
    """Why no private plan can have stages of others; None: it can."""
    count = len(manifest.segments)
    if count < 3:
        return f"the model has {count} segments, and the first and the last stay with the data"
    allowed = _ends_allowed(manifest)
    if not any(end < later for end in allowed for later in allowed):
        return "between its segments the model hands on values that are, or follow from, inputs"
    return None


def private_reason(question: Question) -> str:
    """Why no private plan fits the memory."""
    pricing = Pricing(question)
    owner = next(each for each in question.devices if each.id == question.home)
    has, count = owner.profile.memory_bytes, pricing.segment_count
    against = private_objection(question.manifest)
    if against is not None:
        whole = bytes_rounded_up(pricing.memory_bytes(0, count, ONE))
        return (
            f"the data's owner would train alone, which takes {whole} of its "
            f"{format_bytes(has)}: {against}"
        )
    allowed = sorted(_ends_allowed(question.manifest))
    least = pricing.memory_bytes(0, allowed[0], ONE)
    least += pricing.memory_bytes(allowed[-1], count, ONE)
    needs = f"the first and the last stage need at least {bytes_rounded_up(least)}"
    if least > has:
        return f"{needs} on the data's owner, which has {format_bytes(has)}"
    return (
        f"{needs} of the {format_bytes(has)} of the data's owner, and what is left of the model "
        "does not fit the others"
    )


def fits_ends(pricing: Pricing, arrangement: Arrangement, cuts: Cuts) -> bool:
    """Whether the owner holds both ends, and no inputs cross; true for other plans."""
    if not arrangement.is_folded:
        return True
    allowed = _ends_allowed(pricing.question.manifest)
    if cuts[0] not in allowed or cuts[-2] not in allowed:
        return False
    return ends_bytes(pricing, arrangement, cuts) <= _room(pricing, arrangement)


def ends_bytes(pricing: Pricing, arrangement: Arrangement, cuts: Cuts) -> int:
    """What both ends take of the owner's memory."""
    front, back = arrangement.stages[0][0], arrangement.stages[-1][0]
    return pricing.memory_bytes(0, cuts[0], front.holds) + pricing.memory_bytes(
        cuts[-2], cuts[-1], back.holds
    )


def bottleneck_ends(pricing: Pricing, arrangement: Arrangement) -> Cuts | None:
    """Cuts of a private plan whose busiest device is least busy; None when nothing fits.

    For a given time and first stage the stages between take all they can; the time is found by
    halving.
    """
    high = _longest_ns(pricing, arrangement)
    best = _within(pricing, arrangement, high)
    return least_busy(lambda limit_ns: _within(pricing, arrangement, limit_ns), high, best)


def _longest_ns(pricing: Pricing, arrangement: Arrangement) -> int:
    whole = pricing.segment_count
    return sum(replica.busy_ns(0, whole) for own in arrangement.stages for replica in own)


def _within(pricing: Pricing, arrangement: Arrangement, within_ns: int) -> Cuts | None:
    """The cuts with the shortest first stage that are possible in this time."""
    allowed = _ends_allowed(pricing.question.manifest)
    every = -(-len(allowed) // FRONTS_MAX)
    for front_end in sorted(allowed)[:: max(1, every)]:
        cuts = _between(pricing, arrangement, front_end, within_ns)
        if cuts is None or not fits_ends(pricing, arrangement, cuts):
            continue
        if _ends_ns(arrangement, cuts) <= within_ns:
            return cuts
    return None


def _between(
    pricing: Pricing, arrangement: Arrangement, front_end: int, within_ns: int
) -> Cuts | None:
    """As many segments as they can for the stages between, and one for each that follows."""
    allowed, cuts, first = _ends_allowed(pricing.question.manifest), [front_end], front_end
    last = len(arrangement.stages) - 1
    for stage in range(1, last):
        replica = arrangement.stages[stage][0]
        end = min(replica.longest(first, within_ns), pricing.longest_fit(replica, first))
        end = min(end, pricing.segment_count - (last - stage))
        while stage == last - 1 and end > first and end not in allowed:
            end -= 1
        if end <= first:
            return None
        cuts.append(end)
        first = end
    return (*cuts, pricing.segment_count)


def _ends_ns(arrangement: Arrangement, cuts: Cuts) -> int:
    """What the owner computes in a step."""
    front, back = spans(cuts)[0], spans(cuts)[-1]
    return arrangement.stages[0][0].busy_ns(*front) + arrangement.stages[-1][0].busy_ns(*back)


def _room(pricing: Pricing, arrangement: Arrangement) -> int:
    return pricing.devices[arrangement.groups[0][0]].profile.memory_bytes


def _ends_allowed(manifest: Manifest) -> set[int]:
    """Ends (exclusive) of segments after which only what is differentiated crosses."""
    kinds = [manifest.kinds[segment.kind] for segment in manifest.segments[:-1]]
    return {
        index + 1
        for index, kind in enumerate(kinds)
        if all(port.differentiable for port in kind.outputs if port.role == "boundary")
    }
