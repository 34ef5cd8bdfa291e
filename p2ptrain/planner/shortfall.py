"""Why nothing fits what was asked, and the nearest change that would make something fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Final

from p2ptrain.errors import PlanInfeasible
from p2ptrain.ids import DeviceId, short
from p2ptrain.planner.ends import private_shortfall
from p2ptrain.planner.explore import Candidate, Explorer
from p2ptrain.planner.objective import Goal, Objective
from p2ptrain.planner.pricing import Pricing
from p2ptrain.planner.question import Question
from p2ptrain.planner.sharded import ONE
from p2ptrain.units import (
    NS_PER_S,
    UJ_PER_J,
    format_bytes,
    format_joules,
    format_span,
)

Variant = Callable[[int, bool], Question]
"""The same question with another microbatch size, and with or without rematerialisation."""
HALVINGS_MAX: Final = 12


def shortfall(question: Question, variant: Variant) -> PlanInfeasible:
    """The error to raise when no candidate was found."""
    fastest = without_limits(question, "time")
    if fastest is not None:
        return beyond_limits(question, fastest)
    if question.private:
        return private_shortfall(Pricing(question), lambda count: False)
    return _memory(question, variant)


def beyond_limits(question: Question, fastest: Candidate) -> PlanInfeasible:
    """The error where plans fit the memory, but none the deadline, joules and batteries.

    Args:
        question: What was asked.
        fastest: The fastest plan without limits.
    """
    frugal = without_limits(question, "energy") or fastest
    objective, steps = question.objective, question.steps
    batteries = [device for device in question.devices if device.battery_uj is not None]
    time_s = fastest.price.step_ns * steps / NS_PER_S
    joules = frugal.price.total_uj * steps / UJ_PER_J
    if objective.deadline_ns is not None and fastest.price.step_ns * steps > objective.deadline_ns:
        allowed = objective.deadline_ns // fastest.price.step_ns
        return PlanInfeasible(
            f"nothing is done within {format_span(objective.deadline_ns / NS_PER_S)}: "
            f"the fastest plan takes {format_span(time_s)}",
            hint=_or(f"use --deadline {math.ceil(time_s)}", _steps(allowed)),
        )
    if objective.joules_uj is not None and frugal.price.total_uj * steps > objective.joules_uj:
        allowed = objective.joules_uj // frugal.price.total_uj
        return PlanInfeasible(
            f"nothing is done with {format_joules(objective.joules_uj / UJ_PER_J)}: "
            f"the most frugal plan takes {format_joules(joules)}",
            hint=_or(f"use --joules {math.ceil(joules)}", _steps(allowed)),
        )
    if batteries:
        return _battery(question, fastest, frugal)
    return PlanInfeasible(
        "no plan is within the deadline and the joules at once",
        hint=f"the most frugal plan takes {format_joules(joules)} and "
        f"{format_span(frugal.price.step_ns * steps / NS_PER_S)}; allow more of one of them",
    )


def _battery(question: Question, fastest: Candidate, frugal: Candidate) -> PlanInfeasible:
    """Batteries leave nothing: how many steps they would last."""
    pricing = Pricing(question)
    most, name, has = 0, "", 0
    for candidate in (fastest, frugal):
        allowed = None
        for share, used_uj in zip(candidate.price.shares, candidate.price.device_uj, strict=True):
            device = pricing.devices[share.device]
            if device.battery_uj is not None and used_uj > 0:
                lasts = device.battery_uj // used_uj
                if allowed is None or lasts < allowed:
                    allowed, name, has = lasts, device.id, device.battery_uj
        most = max(most, allowed or 0)
    joules = format_joules(has / UJ_PER_J)
    if question.for_run:
        return PlanInfeasible(
            f"the batteries do not last for {question.steps} steps: {short(DeviceId(name))} has "
            f"{joules} above its reserve",
            hint=_or(_steps(most), "plug a device in"),
        )
    return PlanInfeasible(
        f"the batteries do not last for {question.steps} steps: {name} has {joules}",
        hint=_or(_steps(most), "plug a device in (leave battery_wh out)"),
    )


def _memory(question: Question, variant: Variant) -> PlanInfeasible:
    pricing = Pricing(question)
    largest = max(question.devices, key=lambda device: (device.profile.memory_bytes, device.id))
    room = largest.profile.memory_bytes
    needs, index = max(
        (pricing.memory_bytes(i, i + 1, ONE), -i) for i in range(pricing.segment_count)
    )
    change = _nearest_change(question, variant)
    if needs > room:
        name = question.manifest.segments[-index].name
        return PlanInfeasible(
            f"segment {name} alone needs {format_bytes(needs)}, "
            f"{largest.id} has {format_bytes(room)}",
            hint=_or(change, f"add a device with at least {format_bytes(needs)}"),
        )
    whole = pricing.memory_bytes(0, pricing.segment_count, ONE)
    return PlanInfeasible(
        f"the model needs {format_bytes(whole)} on one device, the largest has "
        f"{format_bytes(room)}, and no division over {len(question.devices)} fits",
        hint=_or(change, f"add a device with {format_bytes(whole)}"),
    )


def _nearest_change(question: Question, variant: Variant) -> str:
    """The first of: rematerialise, smaller microbatches, both, under which something fits."""
    size, plain = question.contract.microbatch_size, question.contract.rematerialise
    sizes = [size >> i for i in range(HALVINGS_MAX) if size >> i >= 1]
    tries = [(each, again) for each in sizes for again in sorted({plain, True})]
    for each, again in tries[1:]:
        if without_limits(variant(each, again), "time") is not None:
            parts = [f"--microbatch-size {each}"] if each != size else []
            parts += ["--rematerialise"] if again and not plain else []
            return f"use {' '.join(parts)}"
    return ""


def without_limits(question: Question, goal: Goal) -> Candidate | None:
    """The best without limits."""
    free = tuple(dataclasses.replace(device, battery_uj=None) for device in question.devices)
    asked = dataclasses.replace(question, objective=Objective(goal=goal), devices=free)
    return Explorer(Pricing(asked)).run().best


def _steps(count: int) -> str:
    return f"--steps {count} is possible" if count >= 1 else ""


def _or(*parts: str) -> str:
    return ", or ".join(filter(None, parts))
