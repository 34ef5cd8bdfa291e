"""Whether a plan that moves segments is worth what their states take to travel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.ids import DeviceId
from p2ptrain.planner.input import LinkEstimate
from p2ptrain.planner.plan import Plan, StagePlan

FLOAT32_BYTES: Final = 4
GAIN_PERCENT: Final = 10
"""By how much a step must get better before segments move for it."""

LinkOf = Callable[[DeviceId, DeviceId], LinkEstimate]


def moving_ns(
    before: Sequence[StagePlan],
    after: Sequence[StagePlan],
    *,
    manifest: Manifest,
    optimizer: str,
    link: LinkOf,
) -> int:
    """Time in which the states of segments that change their device travel, one after the other.

    Args:
        before, after: Stages of the two plans, over the same segments.
        optimizer: Name of the update rule, whose state goes with the parameters.
        link: Between two devices.
    """
    rule = manifest.updates.get(optimizer)
    vectors = 1 + (0 if rule is None else len(rule.state))
    owners = {segment: stage.devices for stage in before for segment in stage.segments}
    moved = [
        (segment, device)
        for stage in after
        for segment in stage.segments
        for device in stage.devices
        if device not in owners.get(segment, stage.devices)
    ]
    whole_ns = 0
    for segment, device in moved:
        tensors = manifest.segment_tensors(segment)
        trained = sum(t.elements for t in tensors if t.binding == "trainable")
        size = FLOAT32_BYTES * vectors * trained
        whole_ns += link(owners[segment][0], device).transfer_ns(size)
    return whole_ns


def is_worth_moving(like: Plan, choice: Plan, *, steps_left: int, moves_ns: int) -> bool:
    """Whether a step gets enough better, and all that are left save more than moving costs.

    Better is shorter, or of fewer joules where that is the goal; a move then costs as many as the
    steps that could be done meanwhile.

    Args:
        like: The plan with the fewest moves.
        choice: The one to move for.
        steps_left: Of the run.
        moves_ns: In which nothing else goes on.
    """
    before, after, moves = like.step_ns, choice.step_ns, moves_ns
    if choice.goal == "energy" and like.step_uj is not None and choice.step_uj is not None:
        before, after = like.step_uj, choice.step_uj
        moves = moves_ns * like.step_uj // max(1, like.step_ns)
    enough = after * 100 <= before * (100 - GAIN_PERCENT)
    return enough and (before - after) * steps_left > moves
