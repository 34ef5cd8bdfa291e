"""Price the placements of `recovery.successor` with the planner's own costs."""

from __future__ import annotations

from collections.abc import Sequence

from p2ptrain import limits
from p2ptrain.planner.choose import run_question
from p2ptrain.planner.drafting import Drafting
from p2ptrain.planner.ends import fits_ends
from p2ptrain.planner.explore import Explorer
from p2ptrain.planner.input import PlanningInput
from p2ptrain.planner.pricing import Pricing
from p2ptrain.planner.sharded import Sharded, ShardedPricing
from p2ptrain.recovery.successor import Place, Placement, Wish
from p2ptrain.schedule.replicated import owners_by_weight
from p2ptrain.training.memory import PROCESS_BYTES


def placing(planning: PlanningInput) -> Place:
    """A function that prices stages as `choose_plan` would.

    Of `planning` it takes manifest, contract, profiles, memory model, schedule and links.
    """
    pricing = Pricing(run_question(planning))
    explorer = Explorer(pricing)
    known = {device.id: index for index, device in enumerate(pricing.devices)}

    def place(wishes: Sequence[Wish]) -> Placement | None:
        if any(device not in known for wish in wishes for device in wish.devices):
            return None
        groups = tuple(tuple(known[device] for device in wish.devices) for wish in wishes)
        weights = tuple(_scaled(wish.weights, pricing.microbatches) for wish in wishes)
        arrangement = pricing.arrange(groups, planning.schedule, weights)
        if arrangement is None:
            return None
        for replicas, wish in zip(arrangement.stages, wishes, strict=True):
            first, end = wish.segments.start, wish.segments.stop
            if any(end > pricing.longest_fit(replica, first) for replica in replicas):
                return None
        cuts = tuple(wish.segments.stop for wish in wishes)
        if not fits_ends(pricing, arrangement, cuts):
            return None
        candidate = explorer.candidate(arrangement, cuts)
        if candidate.price.step_ns > limits.STEP_NS_MAX:
            return None
        draft = Drafting(planning, pricing, candidate)
        return Placement(
            stages=draft.stages(), step_ns=candidate.price.step_ns, step_uj=draft.step_uj()
        )

    return place


def replay_bytes(planning: PlanningInput, shares: tuple[int, ...]) -> int:
    """Predicted peak of a device that replays tensor shards of these weights: all of them, and
    then a copy of the states that they have come to."""
    pricing = Pricing(run_question(planning))
    shards = Sharded(kind="tensor", devices=(), weights=shares)
    each = ShardedPricing(pricing).memory_bytes(shards)
    return sum(each) - (len(each) - 1) * PROCESS_BYTES + pricing.state_bytes


def _scaled(weights: tuple[int, ...], microbatches: int) -> tuple[int, ...]:
    """Weights that come to as many as there are microbatches; equal ones where somebody would get
    none."""
    owners = owners_by_weight(weights, microbatches)
    counts = tuple(owners.count(rank) for rank in range(len(weights)))
    return counts if all(counts) else (1,) * len(weights)
