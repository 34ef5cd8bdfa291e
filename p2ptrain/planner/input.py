"""What the planner is given, and what it gives back beside the plan itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.ids import DeviceId, Lineage, RunId, ViewNumber
from p2ptrain.planner.kinds import EXACT_KINDS, Kind
from p2ptrain.planner.objective import Objective
from p2ptrain.planner.plan import Plan
from p2ptrain.planner.profile import PeerProfile
from p2ptrain.schedule.actions import Held
from p2ptrain.training.contract import Contract
from p2ptrain.units import NS_PER_S

# Assumptions for links nobody has measured; the plan's reasons say that they were used.
SAME_HOST_LATENCY_NS: Final = 300_000
SAME_HOST_BYTES_PER_S: Final = 500_000_000
OTHER_HOST_LATENCY_NS: Final = 3_000_000
OTHER_HOST_BYTES_PER_S: Final = 12_500_000


class StageMemory(Protocol):
    """Peak bytes of a stage; grows with the segments and with the microbatches that it holds."""

    def __call__(self, segments: range, holds: Held) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkEstimate:
    """A link between two peers, the same in both directions, at least partly measured."""

    first: DeviceId
    second: DeviceId
    latency_ns: int
    """One way, for a small message."""
    bytes_per_s: int
    medium: str = ""
    """The air (or cable) that it shares with every other link of this name; empty: its own, both
    ways at once."""
    rate_measured: bool = True
    latency_measured: bool = True

    def __post_init__(self) -> None:
        if self.latency_ns < 0 or self.bytes_per_s < 1 or self.first == self.second:
            raise ValueError("a link joins two devices and carries at least 1 byte per second")

    def transfer_ns(self, size_bytes: int) -> int:
        """Time of one tensor over this link, rounded up."""
        return self.latency_ns - (-size_bytes * NS_PER_S // self.bytes_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanningInput:
    """Everything a plan depends on; equal inputs give equal plans on every machine."""

    manifest: Manifest
    contract: Contract
    profiles: tuple[PeerProfile, ...]
    """In any order, one per peer that may take part."""
    home: DeviceId
    stage_memory: StageMemory
    run: RunId
    lineage: Lineage
    view: ViewNumber
    schedule: str = "1f1b"
    further_schedules: tuple[str, ...] = ()
    """Which may be chosen where a step is shorter for it."""
    stages: int | None = None
    """Exact number of stages; None: the planner chooses."""
    kinds: tuple[Kind, ...] = EXACT_KINDS
    """Kinds of plan that may be chosen."""
    compared: tuple[Kind, ...] = ()
    """Further kinds of which the reasons say so when they would be clearly faster."""
    keep_data_here: bool = False
    """The home peer's data has no second copy."""
    private: bool = False
    """Neither inputs nor labels leave the home peer."""
    own_data: bool = False
    """Every peer feeds its own."""
    holding: tuple[DeviceId, ...] = ()
    """Devices that have the run's data already."""
    objective: Objective = field(default_factory=Objective)
    replica_every: int | None = None
    """Steps between replica sets; None: the planner chooses."""
    steps_left: int | None = None
    """Steps that batteries have to last for; None: all of the contract's."""
    links: tuple[LinkEstimate, ...] = ()
    """Links of which something was measured; the others are assumed."""
    memory_of: Callable[[Contract], StageMemory] | None = None
    """The memory of stages under another contract; None: no other one is suggested."""

    def __post_init__(self) -> None:
        devices = [profile.device for profile in self.profiles]
        if len(set(devices)) != len(devices):
            raise ValueError("a device has two profiles")


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A peer without a stage, and why."""

    device: DeviceId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanChoice:
    """A plan, and who has no part in it."""

    plan: Plan
    left_out: tuple[LeftOut, ...]


def stage_shares(plan: Plan) -> tuple[float, ...]:
    """Each stage's predicted share of the step's compute; they add up to 1."""
    whole = sum(stage.step_compute_ns for stage in plan.stages)
    if whole == 0:
        return tuple(1.0 / len(plan.stages) for _ in plan.stages)
    return tuple(stage.step_compute_ns / whole for stage in plan.stages)
