"""Whether a plan that moves segments is worth what their states take to travel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.ids import DeviceId
from p2ptrain.planner.input import LinkEstimate
from p2ptrain.planner.plan import StagePlan

FLOAT32_BYTES: Final = 4

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


def pays(*, before_ns: int, after_ns: int, steps_left: int, moves_ns: int) -> bool:
    """Whether shorter steps save more, over the steps that are left, than the moves cost."""
    return (before_ns - after_ns) * steps_left > moves_ns
