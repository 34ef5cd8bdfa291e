"""Why a model fits nowhere, and the nearest changes that make it fit: each of them was tried."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from p2ptrain.errors import PlanInfeasible
from p2ptrain.ids import DeviceId
from p2ptrain.planner.device_file import DEVICES_MAX, MEMORY
from p2ptrain.planner.ends import private_reason
from p2ptrain.planner.explore import Explorer
from p2ptrain.planner.kinds import BY_NAME_ONLY
from p2ptrain.planner.objective import Objective
from p2ptrain.planner.pricing import Pricing
from p2ptrain.planner.question import Device, Question
from p2ptrain.schedule.actions import ONE
from p2ptrain.units import bytes_rounded_up, format_bytes, parse_bytes

Variant = Callable[[int, bool], Question | None]
"""The same question with another microbatch size, and with or without rematerialisation, and as
many samples in a step; None: it cannot be asked."""
PRECISION: Final = 128
"""A device's memory is found to one part in so many."""
MORE: Final = DeviceId("one more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One way to ask differently."""

    question: Question
    options: tuple[str, ...] = ()
    """Of the command line."""
    sentence: str = ""
    """What else is to be done."""


def said(change: Change) -> str:
    """What to do, as a hint says it."""
    used = [f"use {' '.join(change.options)}"] if change.options else []
    return " and ".join([change.sentence, *used] if change.sentence else used)


Allowed = Callable[[Change], str | None]
"""How to ask for a change that makes something fit; None: no plan of it can be found."""


def beyond_memory(
    question: Question, variant: Variant, allowed: Allowed, *, one: str = "device"
) -> PlanInfeasible:
    """The error where no plan fits the memory, whatever it takes.

    Args:
        question: What was asked.
        variant: Of it.
        allowed: How a change that makes something fit is worded, with what it takes of limits.
        one: What a device is called.
    """
    reason = private_reason(question) if question.private else _reason(question, one)
    found = (next(filter(None, map(allowed, ways)), None) for ways in _ways(question, variant, one))
    hints = list(filter(None, found))
    return PlanInfeasible(reason, hint=", or ".join(hints) or f"add {one}s with more memory")


def feasible(question: Question) -> bool:
    """Whether memory holds any plan of it, whatever it takes."""
    free = plugged_in(dataclasses.replace(question, objective=Objective()))
    return Explorer(Pricing(free)).feasible()


def plugged_in(question: Question) -> Question:
    """The same without batteries."""
    free = tuple(dataclasses.replace(device, battery_uj=None) for device in question.devices)
    return dataclasses.replace(question, devices=free)


def _ways(question: Question, variant: Variant, one: str) -> Iterator[Iterator[Change]]:
    """Kinds of change that make something fit; of each the first that is allowed is told."""
    yield _other_contracts(question, variant)
    yield _more_memory(question, one)
    if question.private:
        others = dataclasses.replace(question, private=False)
        if feasible(others):
            yield iter([Change(question=others, sentence="leave --private out")])


def _other_contracts(question: Question, variant: Variant) -> Iterator[Change]:
    """Rematerialisation, smaller microbatches, both; the nearest first."""
    plain = question.contract.rematerialise
    found = [_largest(question, variant, again) for again in sorted({plain, True})]
    for other in sorted(filter(None, found), key=lambda each: -each.contract.microbatch_size):
        old, new = question.contract, other.contract
        options = []
        if new.microbatch_size != old.microbatch_size:
            options.append(f"--microbatch-size {new.microbatch_size}")
        if new.microbatches != old.microbatches:
            options.append(f"--microbatches {new.microbatches}")
        if new.rematerialise != old.rematerialise:
            options.append("--rematerialise")
        yield Change(question=other, options=tuple(options))


def _largest(question: Question, variant: Variant, again: bool) -> Question | None:
    """With the largest of the sizes, halved again and again, of which something fits."""
    size = question.contract.microbatch_size
    low, high, best = 0, size.bit_length() - 1, None
    while low <= high:
        middle = (low + high) // 2
        other = variant(size >> middle, again)
        if other is not None and feasible(other):
            best, high = other, middle - 1
        else:
            low = middle + 1
    return best


def _more_memory(question: Question, one: str) -> Iterator[Change]:
    """More of it for the data's owner, a further device, or more for the largest where there are
    as many devices as are planned for."""
    largest = max(question.devices, key=lambda each: (each.profile.memory_bytes, each.id))
    if question.private:
        owner = next(each for each in question.devices if each.id == question.home)
        yield from _with_room(question, owner, f"give {owner.id} {{}}")
    if len(question.devices) < DEVICES_MAX:
        yield from _with_room(question, _named(largest, MORE), f"add a {one} with at least {{}}")
    else:
        yield from _with_room(question, largest, f"give {largest.id} {{}}")


def _with_room(question: Question, device: Device, sentence: str) -> Iterator[Change]:
    """The least memory of a device, one of the question's or a further one, that is enough."""

    def asked(memory_bytes: int) -> Question:
        profile = dataclasses.replace(device.profile, memory_bytes=memory_bytes)
        others = [each for each in question.devices if each.id != device.id]
        changed = dataclasses.replace(device, profile=profile)
        return dataclasses.replace(question, devices=(*others, changed))

    simple = tuple(kind for kind in question.kinds if kind not in BY_NAME_ONLY) or question.kinds

    def enough(memory_bytes: int) -> bool:
        return feasible(dataclasses.replace(asked(memory_bytes), kinds=simple))

    whole = Pricing(question).memory_bytes(0, len(question.manifest.segments), ONE)
    low, high = 0, whole  # more where a device holds many microbatches, or both ends of a model
    while not enough(high):
        low, high = high, 2 * high
        if low > MEMORY[1]:
            return
    while high - low > max(1, high // PRECISION):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    if high > MEMORY[1]:
        return
    least = 1 if question.for_run else MEMORY[0]
    told = bytes_rounded_up(max(high, least))
    yield Change(question=asked(parse_bytes(told)), sentence=sentence.format(told))


def _named(device: Device, name: DeviceId) -> Device:
    """One like it, plugged in, on a machine of its own."""
    profile = dataclasses.replace(
        device.profile, device=name, host=name, own_cores="", battery=None
    )
    return dataclasses.replace(device, profile=profile, battery_uj=None)


def _reason(question: Question, one: str) -> str:
    pricing = Pricing(question)
    largest = max(question.devices, key=lambda each: (each.profile.memory_bytes, each.id))
    room, count = largest.profile.memory_bytes, len(question.devices)
    needs, index = max(
        (pricing.memory_bytes(i, i + 1, ONE), -i) for i in range(pricing.segment_count)
    )
    if needs > room:
        segment = question.manifest.segments[-index].name
        return (
            f"segment {segment} alone needs {bytes_rounded_up(needs)}, "
            f"the largest {one} has {format_bytes(room)}"
        )
    alone = pricing.arrange(((0,),), question.schedules[0])
    holds = ONE if alone is None else alone.stages[0][0].holds
    whole = bytes_rounded_up(pricing.memory_bytes(0, pricing.segment_count, holds))
    over = f"no cut over {count} {one}s fits" if count > 1 else f"it is the only {one}"
    return f"the model needs {whole} on one {one}, the largest has {format_bytes(room)}, and {over}"
