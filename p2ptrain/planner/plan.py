"""A plan: which peer runs which segments, in which order of microbatches, and why."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Final

from p2ptrain import limits
from p2ptrain.ids import DeviceId, Digest, Lineage, RunId, ViewNumber
from p2ptrain.schedule.actions import SCHEDULES
from p2ptrain.wire.codec import to_plain

PLAN_VERSION: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """Consecutive segments on one peer, with what they are expected to cost there."""

    device: DeviceId
    first_segment: int
    segment_count: int
    in_flight_max: int
    """Microbatches whose stash is held at once."""
    step_compute_ns: int
    """Predicted compute time of one step."""
    memory_bytes: int
    """Predicted peak of parameters, optimizer state, gradients, stash and buffers."""
    parameter_count: int

    @property
    def segments(self) -> range:
        return range(self.first_segment, self.first_segment + self.segment_count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Placement and schedule of one view of a run; `digest` names it on the wire."""

    run: RunId
    lineage: Lineage
    view: ViewNumber
    members: tuple[DeviceId, ...]
    """All peers of the view, sorted, with a stage or in reserve; the home peer is always one."""
    home: DeviceId
    """The data holder that feeds this view; also its tie-breaker."""
    holders: tuple[DeviceId, ...]
    """Members with a copy of the run's data (or about to get one), the home peer first."""
    keep_data_here: bool = False
    """The data may not leave the home peer, so without it the run pauses."""
    replica_every: int = 10
    """Steps between replica sets."""
    contract: Digest
    schedule: str
    """One of `schedule.actions.SCHEDULES`."""
    stages: tuple[StagePlan, ...]
    replicas: tuple[DeviceId | None, ...] = ()
    """By stage: the member that keeps a replica of its state; None (or no entry): nobody can."""
    step_ns: int
    """Predicted time of one step."""
    reasons: tuple[str, ...]
    version: int = PLAN_VERSION

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem is not None:
            raise ValueError(problem)

    @property
    def digest(self) -> Digest:
        document = json.dumps(to_plain(self), sort_keys=True, separators=(",", ":"))
        return Digest(hashlib.sha256(document.encode()).hexdigest())

    def stage_of(self, device: DeviceId) -> int | None:
        """The stage index this device runs, or None (the home peer may only hold data)."""
        for index, stage in enumerate(self.stages):
            if stage.device == device:
                return index
        return None

    def stage_of_segment(self, segment_index: int) -> int:
        """The stage index that runs a segment; ValueError when no stage does."""
        for index, stage in enumerate(self.stages):
            if segment_index in stage.segments:
                return index
        raise ValueError(f"no stage runs segment {segment_index}")


def _problem(plan: Plan) -> str | None:
    if plan.version != PLAN_VERSION:
        return f"plan version {plan.version} is unknown"
    if not 1 <= len(plan.stages) <= limits.STAGES_MAX:
        return f"a plan has 1 to {limits.STAGES_MAX} stages"
    devices = [stage.device for stage in plan.stages]
    if len(set(devices)) != len(devices):
        return "a device has two stages"
    if tuple(sorted(set(plan.members))) != plan.members:
        return "members are not sorted and distinct"
    if plan.home not in plan.members or not set(devices) <= set(plan.members):
        return "the home peer and every stage's device are members"
    if plan.holders[:1] != (plan.home,) or not set(plan.holders) <= set(plan.members):
        return "data holders are members, the home peer first"
    if len(set(plan.holders)) != len(plan.holders) or (plan.keep_data_here and plan.holders[1:]):
        return "each data holder is named once, and data that stays has one"
    if plan.replica_every < 1 or len(plan.replicas) not in (0, len(plan.stages)):
        return "replica sets are made after every so many steps, of every stage or none"
    kept = zip(plan.stages, plan.replicas, strict=False)
    if any(keeper == s.device or keeper not in (None, *plan.members) for s, keeper in kept):
        return "a replica is kept by another member than the stage's"
    if plan.schedule not in SCHEDULES:
        return f"unknown schedule {plan.schedule!r}"
    expected = 0
    for stage in plan.stages:
        if stage.first_segment != expected or stage.segment_count < 1 or stage.in_flight_max < 1:
            return "stages do not cover the segments in order"
        expected += stage.segment_count
    return None
