"""A plan: which peers run which segments, in which order of microbatches, and why."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from typing import Final, Literal

from p2ptrain import limits
from p2ptrain.ids import DeviceId, Digest, Lineage, RunId, ViewNumber
from p2ptrain.planner.objective import GOALS, Goal
from p2ptrain.schedule.actions import SCHEDULES, delays_gradients
from p2ptrain.wire.codec import to_plain

PLAN_VERSION: Final = 4
_DIGESTS_KEPT: Final = 16
"""Plans of views under way; every message and tensor of a view carries its plan's digest."""

Split = Literal["none", "replicas", "tensor", "sequence"]
"""How the peers of a stage share its work: microbatches whole, heads and columns, or positions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageShare:
    """One peer's part of a stage that several peers run together."""

    device: DeviceId
    weight: int
    """Its part of the sum of all weights: of a step's microbatches, or of the units of an axis."""
    step_compute_ns: int
    """Predicted time of all its forwards and backwards of one step."""
    memory_bytes: int
    """Predicted peak there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """Consecutive segments on one peer, or on several that share the work of each.

    With several, all costs are those of the peer where they are highest.
    """

    device: DeviceId
    """The only peer, or the first of `shares`."""
    first_segment: int
    segment_count: int
    in_flight_max: int
    """Microbatches whose stash is held at once."""
    step_compute_ns: int
    """Predicted time of all forwards and backwards of one step."""
    memory_bytes: int
    """Predicted peak of parameters, optimizer state, gradients, stash and buffers."""
    parameter_count: int
    """Of the whole stage."""
    split: Split = "none"
    shares: tuple[StageShare, ...] = ()
    """By rank: the order in which partial results are added. Empty for a single peer."""

    @property
    def segments(self) -> range:
        return range(self.first_segment, self.first_segment + self.segment_count)

    @property
    def devices(self) -> tuple[DeviceId, ...]:
        """All peers of the stage, by rank."""
        return tuple(share.device for share in self.shares) or (self.device,)

    @property
    def weights(self) -> tuple[int, ...]:
        """By rank."""
        return tuple(share.weight for share in self.shares) or (1,)

    def memory_of(self, device: DeviceId) -> int:
        """Predicted peak at one of its peers."""
        own = (share.memory_bytes for share in self.shares if share.device == device)
        return next(own, self.memory_bytes)

    def compute_ns_of(self, device: DeviceId) -> int:
        """Predicted time of the forwards and backwards of one step at one of its peers."""
        own = (share.step_compute_ns for share in self.shares if share.device == device)
        return next(own, self.step_compute_ns)

    @property
    def is_sharded(self) -> bool:
        """Whether each peer computes slices of every microbatch."""
        return self.split in ("tensor", "sequence")


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
    private: bool = False
    """Neither inputs nor labels leave the home peer: it runs the first and the last stage, or all
    of the model, and keeps the replicas of both itself."""
    replica_every: int = 10
    """Steps between replica sets."""
    contract: Digest
    schedule: str
    """One of `schedule.actions.SCHEDULES`."""
    stages: tuple[StagePlan, ...]
    replicas: tuple[DeviceId | None, ...] = ()
    """By stage: another member that keeps a replica of its state (of a private run's first and last
    stage the home peer itself); None (or no entry): nobody can, or the stage's own peers have it.
    `planner.keepers.keepers_of` names all who keep one."""
    step_ns: int
    """Predicted time of one step."""
    reasons: tuple[str, ...]
    step_uj: int | None = None
    """Predicted microjoules of one step: everybody with a stage, idle time included; None: some of
    them do not say what they draw."""
    goal: Goal = "time"
    """What plans of this run minimise."""
    version: int = PLAN_VERSION

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem is not None:
            raise ValueError(problem)

    @property
    def digest(self) -> Digest:
        return _digest(self)

    def stages_of(self, device: DeviceId) -> tuple[int, ...]:
        """The stages this device runs, alone or with others: one, of a private run's home peer the
        first and the last, or none (the home peer may only hold data)."""
        return tuple(i for i, stage in enumerate(self.stages) if device in stage.devices)

    def stage_of(self, device: DeviceId) -> int | None:
        """The first of `stages_of`, or None."""
        return next(iter(self.stages_of(device)), None)

    def segments_of(self, device: DeviceId) -> tuple[int, ...]:
        """All segments of this device's stages, ascending."""
        return tuple(s for index in self.stages_of(device) for s in self.stages[index].segments)

    @property
    def devices(self) -> tuple[DeviceId, ...]:
        """Everybody with a stage, once, in the order of the stages."""
        return tuple(dict.fromkeys(d for stage in self.stages for d in stage.devices))

    def memory_of(self, device: DeviceId) -> int:
        """Predicted peak of all its stages."""
        return sum(self.stages[index].memory_of(device) for index in self.stages_of(device))

    def compute_ns_of(self, device: DeviceId) -> int:
        """Predicted time of its forwards and backwards of one step, of all its stages."""
        return sum(self.stages[index].compute_ns_of(device) for index in self.stages_of(device))

    def keeps_itself(self, stage: StagePlan) -> bool:
        """Whether a stage's replicas stay on its own device: a private run's first and last."""
        return self.private and stage.device == self.home

    def stage_of_segment(self, segment_index: int) -> int:
        """The stage index that runs a segment; ValueError when no stage does."""
        for index, stage in enumerate(self.stages):
            if segment_index in stage.segments:
                return index
        raise ValueError(f"no stage runs segment {segment_index}")


def is_sharded(plan: Plan) -> bool:
    """Whether several peers compute every microbatch together."""
    return any(stage.is_sharded for stage in plan.stages)


@functools.lru_cache(maxsize=_DIGESTS_KEPT)
def _digest(plan: Plan) -> Digest:
    document = json.dumps(to_plain(plan), sort_keys=True, separators=(",", ":"))
    return Digest(hashlib.sha256(document.encode()).hexdigest())


def _problem(plan: Plan) -> str | None:
    if plan.version != PLAN_VERSION:
        return f"plan version {plan.version} is unknown"
    if not 1 <= len(plan.stages) <= limits.STAGES_MAX:
        return f"a plan has 1 to {limits.STAGES_MAX} stages"
    if plan.private and (problem := _private_problem(plan)) is not None:
        return problem
    devices = [device for stage in plan.stages for device in stage.devices]
    folded = plan.private and len(plan.stages) > 1
    if len(set(devices)) != len(devices) - folded:
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
    if any(not _may_keep(plan, stage, keeper) for stage, keeper in kept):
        return "a replica is kept by another member than the stage's, private ones by no other"
    if plan.goal not in GOALS or (plan.step_uj is not None and plan.step_uj < 0):
        return "a plan minimises time or energy, and no step costs less than nothing"
    if plan.schedule not in SCHEDULES:
        return f"unknown schedule {plan.schedule!r}"
    expected = 0
    for stage in plan.stages:
        if stage.first_segment != expected or stage.segment_count < 1 or stage.in_flight_max < 1:
            return "stages do not cover the segments in order"
        expected += stage.segment_count
    return next((found for stage in plan.stages if (found := _split_problem(plan, stage))), None)


def _private_problem(plan: Plan) -> str | None:
    if not plan.keep_data_here:
        return "the data of a private run stays where it is"
    if len(plan.stages) == 2 or {plan.stages[0].devices, plan.stages[-1].devices} != {(plan.home,)}:
        return "of a private run the home peer has the first and the last stage, or the only one"
    return None


def _may_keep(plan: Plan, stage: StagePlan, keeper: DeviceId | None) -> bool:
    if keeper is None:
        return True
    return keeper in plan.members and (keeper == stage.device) == plan.keeps_itself(stage)


def _split_problem(plan: Plan, stage: StagePlan) -> str | None:
    if (stage.split == "none") != (not stage.shares):
        return "a stage has shares where it is split, and nowhere else"
    if not stage.shares:
        return None
    if len(stage.shares) < 2 or stage.shares[0].device != stage.device:
        return "a stage that is split has two peers or more, its device first"
    if any(share.weight < 1 for share in stage.shares):
        return "every peer of a stage has a part of its work"
    if stage.is_sharded and len(plan.stages) > 1:
        return "a sharded stage is the whole model"
    if delays_gradients(plan.schedule):
        return f"{plan.schedule} is no schedule of stages that are split"
    return None
