"""Say why no placement fits, and the nearest change that would."""

from __future__ import annotations

import dataclasses
from typing import Final

from p2ptrain.errors import PlanInfeasible
from p2ptrain.ids import DeviceId
from p2ptrain.planner.ends import private_shortfall
from p2ptrain.planner.explore import Explorer, Found
from p2ptrain.planner.input import PlanningInput
from p2ptrain.planner.kinds import EXACT_KINDS
from p2ptrain.planner.pricing import Pricing
from p2ptrain.planner.question import Question
from p2ptrain.planner.shortfall import beyond_limits, without_limits
from p2ptrain.schedule.actions import Held
from p2ptrain.units import format_bytes

EXTRA_PEERS_TRIED_MAX: Final = 4
_ONE: Final = Held(in_flight=1, delayed=0)


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
    if planning.private:
        return private_shortfall(pricing, lambda count: _feasible(pricing.question, stages=count))
    if planning.stages is not None:
        forced = _forced_count(pricing, planning.stages)
        if forced is not None:
            return forced
    if not set(planning.kinds) & set(EXACT_KINDS):
        kind = planning.kinds[0]
        return PlanInfeasible(
            f"there is no plan of {kind} parallelism because {found.objections[kind]}",
            hint="use --parallelism auto or pipeline",
        )
    return _memory(pricing)


def _forced_count(pricing: Pricing, stages: int) -> PlanInfeasible | None:
    peers, segments = len(pricing.devices), pricing.segment_count
    most = min(peers, segments)
    nearest = sorted(range(1, most + 1), key=lambda count: (abs(count - stages), count))
    works = next((n for n in nearest if _feasible(pricing.question, stages=n)), None)
    hint = f"use --stages {works}" if works is not None else None
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


def _memory(pricing: Pricing) -> PlanInfeasible:
    question = pricing.question
    profiles = [device.profile for device in pricing.devices]
    largest = max(profiles, key=lambda peer: (peer.memory_bytes, peer.device))
    has, count = format_bytes(largest.memory_bytes), len(profiles)
    smaller = ""
    if question.contract.microbatch_size > 1:
        smaller = f"use --microbatch-size {question.contract.microbatch_size // 2}"
    needs, index = max(
        (pricing.memory_bytes(i, i + 1, _ONE), -i) for i in range(pricing.segment_count)
    )
    if needs > largest.memory_bytes:
        name = question.manifest.segments[-index].name
        roomy = f"add a peer with at least {format_bytes(needs)}"
        return PlanInfeasible(
            f"segment {name} alone needs {format_bytes(needs)}, the largest peer has {has}",
            hint=" or ".join(filter(None, (roomy, smaller))),
        )
    whole = format_bytes(pricing.memory_bytes(0, pricing.segment_count, _ONE))
    over = f"no cut over {count} peers fits" if count > 1 else "it is the only peer"
    return PlanInfeasible(
        f"the model needs {whole} on one peer, the largest has {has}, and {over}",
        hint=" or ".join(filter(None, (_more_peers(question), smaller))),
    )


def _more_peers(question: Question) -> str:
    """How many peers like the largest would do."""
    largest = max(question.devices, key=lambda d: (d.profile.memory_bytes, d.id))
    has, pool = format_bytes(largest.profile.memory_bytes), question.devices
    for extra in range(1, EXTRA_PEERS_TRIED_MAX + 1):
        profile = dataclasses.replace(largest.profile, device=DeviceId(f"extra{extra}"))
        pool += (dataclasses.replace(largest, profile=profile),)
        if _feasible(dataclasses.replace(question, devices=pool), stages=None):
            return f"add {extra} peer{'s' * (extra != 1)} with {has}"
    return f"add peers with more than {has}"


def _feasible(question: Question, *, stages: int | None) -> bool:
    return Explorer(Pricing(dataclasses.replace(question, stages=stages))).feasible()
