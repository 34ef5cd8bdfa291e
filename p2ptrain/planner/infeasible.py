"""Say why no placement fits, and the nearest change that would."""

from __future__ import annotations

import dataclasses

from p2ptrain.errors import PlanInfeasible
from p2ptrain.planner.explore import Found
from p2ptrain.planner.input import PlanningInput
from p2ptrain.planner.kinds import EXACT_KINDS
from p2ptrain.planner.memory_shortfall import Variant, beyond_memory, feasible, said
from p2ptrain.planner.pricing import Pricing
from p2ptrain.planner.question import Question
from p2ptrain.planner.shortfall import beyond_limits, without_limits
from p2ptrain.schedule.actions import undelayed


def infeasible(planning: PlanningInput, pricing: Pricing, found: Found) -> PlanInfeasible:
    """The error to raise when the search found nothing.

    Args:
        planning: What was planned.
        pricing: Of its question.
        found: What was found instead, which is why there is nothing of each kind.
    """
    if not pricing.devices and planning.objective.needs_watts and planning.profiles:
        return PlanInfeasible(
            "no peer says what it draws", hint="leave --objective energy and --joules out"
        )
    if not pricing.devices:
        return PlanInfeasible(
            "no peer has measured this model yet", hint="join a peer to the group and try again"
        )
    on_battery = any(device.battery_uj is not None for device in pricing.devices)
    if planning.objective.has_limits or on_battery:
        fastest = without_limits(pricing.question, "time")
        if fastest is not None:
            return beyond_limits(pricing.question, fastest)
    question = pricing.question
    if question.private and all(device.id != question.home for device in question.devices):
        return PlanInfeasible(
            "the data's owner has not measured this model, and a private run needs it",
            hint="let it take part, or leave --private out",
        )
    if planning.stages is not None:
        forced = _forced_count(pricing, planning.stages)
        if forced is not None:
            return forced
    if not set(planning.kinds) & set(EXACT_KINDS):
        others = dataclasses.replace(question, kinds=EXACT_KINDS)
        if feasible(others):
            kind = planning.kinds[0]
            return PlanInfeasible(
                f"there is no plan of {kind} parallelism because {found.objections[kind]}",
                hint="use --parallelism auto or pipeline",
            )
    return beyond_memory(question, _variant(planning, question), said, one="peer")


def _variant(planning: PlanningInput, question: Question) -> Variant:
    """Of a run: memory alone follows for other contracts, times would have to be measured."""

    def other(size: int, rematerialise: bool) -> Question | None:
        if planning.memory_of is None:
            return None
        contract = question.contract.at_size(size, rematerialise=rematerialise)
        schedules = question.schedules
        if rematerialise:  # gradients cannot be delayed then
            schedules = tuple(dict.fromkeys(map(undelayed, schedules)))
        return dataclasses.replace(
            question,
            contract=contract,
            stage_memory=planning.memory_of(contract),
            schedules=schedules,
        )

    return other


def _forced_count(pricing: Pricing, stages: int) -> PlanInfeasible | None:
    question, segments = pricing.question, pricing.segment_count
    private, peers = question.private, len(pricing.devices)
    possible = range(1, min(peers + private, segments) + 1)
    nearest = sorted(possible, key=lambda count: (abs(count - stages), count))
    works = next((n for n in nearest if _has_stages(question, n)), None)
    hint = f"use --stages {works}" if works is not None else None
    if private:
        if works is None:
            return None
        return PlanInfeasible(
            f"no private plan has {stages} stages here", hint=f"{hint}; both of the owner's count"
        )
    if stages > segments:
        return PlanInfeasible(
            f"{stages} stages were asked for, but the model has {segments} segments", hint=hint
        )
    if not 1 <= stages <= peers:
        have = f"{peers} peer{'s' * (peers != 1)} can take part"
        return PlanInfeasible(f"{stages} stages were asked for, but {have}", hint=hint)
    if works is None:
        return None
    return PlanInfeasible(f"no placement on exactly {stages} stages fits the memory", hint=hint)


def _has_stages(question: Question, count: int) -> bool:
    return feasible(dataclasses.replace(question, stages=count))
