"""The schedule's own ceiling: what the measured stage times allow when transfers are free."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from p2ptrain.planner.profile import KindCost
from p2ptrain.schedule.actions import all_actions
from p2ptrain.schedule.simulator import PartsTime, ceiling


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """Measured time of one microbatch in each stage, and the speed-up it allows."""

    forward_ns: tuple[int, ...]
    backward_ns: tuple[int, ...]
    parts: tuple[PartsTime, ...]
    """Of backwards whose gradients are delayed."""
    ceiling: float


def balance(
    costs: Mapping[str, KindCost],
    segment_kinds: Sequence[str],
    stages: Sequence[range],
    *,
    schedule: str,
    microbatches: int,
) -> Balance:
    """Add up each stage's segments and play one step of the schedule.

    Args:
        costs: Measured, by kind name.
        segment_kinds: The kind of each segment of the model.
        stages: The segments of each stage, as the peers agreed.
        schedule: As the plan names it.
        microbatches: Per step.
    """
    own = [[costs[segment_kinds[index]] for index in stage] for stage in stages]
    forward_ns = tuple(sum(cost.forward_ns for cost in stage) for stage in own)
    backward_ns = tuple(sum(cost.backward_ns for cost in stage) for stage in own)
    parts = tuple(
        PartsTime(
            cotangents_ns=sum(cost.first_ns for cost in stage),
            gradients_ns=sum(cost.gradients_ns for cost in stage),
        )
        for stage in own
    )
    actions = all_actions(schedule, len(stages), microbatches)
    return Balance(
        forward_ns=forward_ns,
        backward_ns=backward_ns,
        parts=parts,
        ceiling=ceiling(actions, forward_ns=forward_ns, backward_ns=backward_ns, parts=parts),
    )


def median_costs(measured: Sequence[Mapping[str, KindCost]]) -> dict[str, KindCost]:
    """The median over the rounds of each kind's times."""
    return {
        kind: KindCost(
            forward_ns=round(statistics.median(costs[kind].forward_ns for costs in measured)),
            backward_ns=round(statistics.median(costs[kind].backward_ns for costs in measured)),
            cotangents_ns=round(statistics.median(costs[kind].first_ns for costs in measured)),
            gradients_ns=round(statistics.median(costs[kind].gradients_ns for costs in measured)),
        )
        for kind in measured[0]
    }
