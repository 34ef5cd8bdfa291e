"""Why nothing is within what was asked, and the nearest changes: each of them was tried."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Final

from p2ptrain.errors import PlanInfeasible
from p2ptrain.ids import DeviceId, short
from p2ptrain.planner.explore import Candidate, Explorer, violations
from p2ptrain.planner.memory_shortfall import Change, Variant, beyond_memory, plugged_in, said
from p2ptrain.planner.objective import Goal, Objective
from p2ptrain.planner.pricing import Pricing
from p2ptrain.planner.question import Question
from p2ptrain.units import (
    NS_PER_S,
    UJ_PER_J,
    format_joules,
    format_seconds,
    format_span,
    rounded_up,
)

Naming = Callable[[DeviceId], str]
SHORT_NS: Final = 120 * NS_PER_S
"""Times below are told with their fractions."""


def shortfall(question: Question, variant: Variant) -> PlanInfeasible:
    """The error to raise when no candidate was found."""
    if question.objective.has_limits or _has_battery(question):
        fastest = without_limits(question, "time")
        if fastest is not None:
            return beyond_limits(question, fastest)
    return beyond_memory(question, variant, _allowed)


def _allowed(change: Change) -> str | None:
    """How to ask for a change, with what it takes of limits; None: it is not enough."""
    asked = change.question
    if not (asked.objective.has_limits or _has_battery(asked)):
        return said(change)
    best = _best(asked, asked.objective) or without_limits(asked, asked.objective.goal)
    return None if best is None else allowing(asked, best, change)


def beyond_limits(question: Question, fastest: Candidate) -> PlanInfeasible:
    """The error where plans fit the memory, but none the deadline, joules and batteries.

    Args:
        question: What was asked.
        fastest: The fastest plan without limits.
    """
    frugal = without_limits(question, "energy") or fastest
    near = list(_within_the_others(question, fastest, frugal))
    if not near:
        near = [fastest if question.objective.goal == "time" else frugal]
    hints = [allowing(question, each) for each in near]
    most = max(_steps_allowed(question, each) for each in (fastest, frugal, *near))
    if most >= 1:
        hints.append(f"--steps {most} is possible")
    return PlanInfeasible(
        _reason(question, fastest, frugal), hint=", or ".join(dict.fromkeys(hints))
    )


def beyond_asked(
    question: Question, candidate: Candidate, *, file: str, name: Naming
) -> PlanInfeasible:
    """The error where a plan that somebody asks for, in a file, is beyond limits."""
    price, steps, takes = candidate.price, question.steps, []
    pricing = Pricing(question)
    for limit, device in violations(pricing, question.objective, price):
        if limit == "battery":
            takes.append(f"more than {name(device)} has in its battery")
        elif limit == "deadline":
            allowed = _time(question.objective.deadline_ns or 0)
            takes.append(f"{_time(price.step_ns * steps)}, and the deadline is {allowed}")
        else:
            allowed = format_joules((question.objective.joules_uj or 0) / UJ_PER_J)
            whole = format_joules(price.total_uj * steps / UJ_PER_J)
            takes.append(f"{whole}, and {allowed} are allowed")
    hints = [allowing(question, candidate, name=name)]
    most = _steps_allowed(question, candidate)
    if most >= 1:
        hints.append(f"--steps {most} is possible")
    if _best(question, question.objective) is not None:
        hints.append("leave --plan out: other plans are within")
    return PlanInfeasible(f"{file}: this plan takes {'; '.join(takes)}", hint=", or ".join(hints))


def allowing(
    question: Question,
    candidate: Candidate,
    change: Change | None = None,
    *,
    name: Naming | None = None,
) -> str:
    """What to ask for so that this candidate is within all limits: `use --deadline 13`.

    Args:
        question: Whose devices and limits count.
        candidate: Of these devices.
        change: What is to be changed besides.
        name: How people call a device; None: as the question does.
    """
    price, steps = candidate.price, question.steps
    options = [] if change is None else [*change.options]
    broken = violations(Pricing(question), question.objective, price)
    limits = {limit for limit, _ in broken}
    if "deadline" in limits:
        options.append(f"--deadline {rounded_up(price.step_ns * steps, NS_PER_S)}")
    if "joules" in limits:
        options.append(f"--joules {rounded_up(price.total_uj * steps, UJ_PER_J)}")
    whole = Change(question=question, options=tuple(options))
    if change is not None:
        whole = dataclasses.replace(whole, sentence=change.sentence)
    parts = [said(whole)] if whole.options or whole.sentence else []
    batteries = [device for limit, device in broken if limit == "battery"]
    if batteries:
        empty = [name(each) if name else _name(question, each) for each in batteries]
        how = "" if question.for_run else " (leave battery_wh out)"
        parts.append(f"plug {', '.join(empty)} in{how}")
    return " and ".join(parts)


def without_limits(question: Question, goal: Goal) -> Candidate | None:
    """The best without limits."""
    return _best(plugged_in(question), Objective(goal=goal))


def _best(question: Question, objective: Objective) -> Candidate | None:
    asked = dataclasses.replace(question, objective=objective)
    return Explorer(Pricing(asked)).run().best


def _within_the_others(
    question: Question, fastest: Candidate, frugal: Candidate
) -> Iterator[Candidate]:
    """The nearest plans that break one kind of limit only, for each kind of which there is one."""
    objective, has_battery = question.objective, _has_battery(question)
    deadline_ns, joules_uj = objective.deadline_ns, objective.joules_uj
    found: list[Candidate | None] = []
    if deadline_ns is not None:
        alone = joules_uj is None and not has_battery
        free = Objective(goal="time", joules_uj=joules_uj)
        found.append(fastest if alone else _best(question, free))
    if joules_uj is not None:
        alone = deadline_ns is None and not has_battery
        free = Objective(goal="energy", deadline_ns=deadline_ns)
        found.append(frugal if alone else _best(question, free))
    if has_battery:
        found.append(_best(plugged_in(question), objective))
    return (each for each in found if each is not None)


def _steps_allowed(question: Question, candidate: Candidate) -> int:
    """Steps of a candidate that are within all limits; 0: not one."""
    objective, price = question.objective, candidate.price
    pricing, counts = Pricing(question), [question.steps]
    if objective.deadline_ns is not None:
        counts.append(objective.deadline_ns // max(1, price.step_ns))
    if objective.joules_uj is not None:
        counts.append(objective.joules_uj // max(1, price.total_uj))
    used = dict.fromkeys((share.device for share in price.shares), 0)
    for share, share_uj in zip(price.shares, price.device_uj, strict=True):
        used[share.device] += share_uj
    for index, used_uj in used.items():
        battery_uj = pricing.devices[index].battery_uj
        if battery_uj is not None:
            counts.append(battery_uj // max(1, used_uj))
    return min(counts)


def _reason(question: Question, fastest: Candidate, frugal: Candidate) -> str:
    objective, steps = question.objective, question.steps
    deadline_ns, joules_uj = objective.deadline_ns, objective.joules_uj
    time_ns, whole_uj = fastest.price.step_ns * steps, frugal.price.total_uj * steps
    if deadline_ns is not None and time_ns > deadline_ns:
        return (
            f"nothing is done within {_time(deadline_ns)}: the fastest plan takes {_time(time_ns)}"
        )
    if joules_uj is not None and whole_uj > joules_uj:
        return (
            f"nothing is done with {format_joules(joules_uj / UJ_PER_J)}: "
            f"the most frugal plan takes {format_joules(whole_uj / UJ_PER_J)}"
        )
    if not objective.has_limits:
        return _batteries(question, fastest if objective.goal == "time" else frugal)
    set_ = [("deadline", deadline_ns), ("joules", joules_uj), ("batteries", _has_battery(question))]
    names = [f"the {name}" for name, limit in set_ if limit]
    joined = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    takes = [
        f"the {what} plan takes {_time(one.price.step_ns * steps)} and "
        f"{format_joules(one.price.total_uj * steps / UJ_PER_J)}"
        for what, one in (("fastest", fastest), ("most frugal", frugal))
    ]
    return f"no plan is within {joined} at once: {', '.join(takes)}"


def _batteries(question: Question, candidate: Candidate) -> str:
    """Batteries alone leave nothing, not even the best plan without them."""
    broken = violations(Pricing(question), question.objective, candidate.price)
    name = next(device for _, device in broken)
    has_uj = next(device.battery_uj for device in question.devices if device.id == name)
    above = " above its reserve" if question.for_run else ""
    return (
        f"the batteries do not last for {question.steps} steps: {_name(question, name)} has "
        f"{format_joules((has_uj or 0) / UJ_PER_J)}{above}"
    )


def _has_battery(question: Question) -> bool:
    return any(device.battery_uj is not None for device in question.devices)


def _name(question: Question, device: DeviceId) -> str:
    return short(device) if question.for_run else device


def _time(time_ns: int) -> str:
    seconds = time_ns / NS_PER_S
    return format_seconds(seconds) if time_ns < SHORT_NS else format_span(seconds)
