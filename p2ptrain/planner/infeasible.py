"""Say why no placement fits, and the nearest change that would."""

from __future__ import annotations

import dataclasses
from typing import Final

from p2ptrain.errors import PlanInfeasible
from p2ptrain.ids import DeviceId
from p2ptrain.planner.costs import CostModel
from p2ptrain.planner.input import PlanningInput
from p2ptrain.planner.profile import PeerProfile
from p2ptrain.planner.search import Search
from p2ptrain.schedule.actions import Held
from p2ptrain.units import format_bytes

EXTRA_PEERS_TRIED_MAX: Final = 4
_ONE: Final = Held(in_flight=1, delayed=0)


def infeasible(
    planning: PlanningInput, model: CostModel, usable: tuple[PeerProfile, ...]
) -> PlanInfeasible:
    """The error to raise when the search found nothing."""
    if not usable:
        return PlanInfeasible(
            "no peer has measured this model yet", hint="join a peer to the group and try again"
        )
    if planning.stages is not None:
        forced = _forced_count(planning, planning.stages, model, usable)
        if forced is not None:
            return forced
    return _memory(planning, model, usable)


def _forced_count(
    planning: PlanningInput, stages: int, model: CostModel, usable: tuple[PeerProfile, ...]
) -> PlanInfeasible | None:
    most = min(len(usable), model.segment_count)
    nearest = sorted(range(1, most + 1), key=lambda count: (abs(count - stages), count))
    works = next((n for n in nearest if _feasible(planning, model, usable, n)), None)
    hint = f"use --stages {works}" if works is not None else None
    if stages > model.segment_count:
        count = model.segment_count
        return PlanInfeasible(
            f"{stages} stages were asked for, but the model has {count} segments", hint=hint
        )
    if not 1 <= stages <= len(usable):
        have = f"{len(usable)} peer{'s' * (len(usable) != 1)} can take part"
        return PlanInfeasible(f"{stages} stages were asked for, but {have}", hint=hint)
    if works is None:
        return None
    return PlanInfeasible(f"no placement on exactly {stages} stages fits the memory", hint=hint)


def _memory(
    planning: PlanningInput, model: CostModel, usable: tuple[PeerProfile, ...]
) -> PlanInfeasible:
    largest = max(usable, key=lambda peer: (peer.memory_bytes, peer.device))
    has = format_bytes(largest.memory_bytes)
    smaller = ""
    if planning.contract.microbatch_size > 1:
        smaller = f"use --microbatch-size {planning.contract.microbatch_size // 2}"
    needs, index = max(
        (model.memory_bytes(index, index + 1, _ONE), -index) for index in range(model.segment_count)
    )
    if needs > largest.memory_bytes:
        name = planning.manifest.segments[-index].name
        roomy = f"add a peer with at least {format_bytes(needs)}"
        return PlanInfeasible(
            f"segment {name} alone needs {format_bytes(needs)}, the largest peer has {has}",
            hint=" or ".join(filter(None, (roomy, smaller))),
        )
    whole = format_bytes(model.memory_bytes(0, model.segment_count, _ONE))
    over = f"no cut over {len(usable)} peers fits" if len(usable) > 1 else "it is the only peer"
    return PlanInfeasible(
        f"the model needs {whole} on one peer, the largest has {has}, and {over}",
        hint=" or ".join(filter(None, (_more_peers(planning, model, usable, largest), smaller))),
    )


def _more_peers(
    planning: PlanningInput,
    model: CostModel,
    usable: tuple[PeerProfile, ...],
    largest: PeerProfile,
) -> str:
    """How many peers like the largest would do."""
    has = format_bytes(largest.memory_bytes)
    pool = usable
    for extra in range(1, EXTRA_PEERS_TRIED_MAX + 1):
        pool += (dataclasses.replace(largest, device=DeviceId(f"extra{extra}")),)
        if _feasible(planning, model, pool, None):
            return f"add {extra} peer{'s' * (extra != 1)} with {has}"
    return f"add peers with more than {has}"


def _feasible(
    planning: PlanningInput,
    model: CostModel,
    profiles: tuple[PeerProfile, ...],
    stages: int | None,
) -> bool:
    return Search(
        model=model,
        profiles=profiles,
        home=planning.home,
        stages=stages,
        microbatches=planning.contract.microbatches,
    ).feasible()
