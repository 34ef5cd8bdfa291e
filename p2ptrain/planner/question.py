"""What a plan is asked for: the model, the devices with their watts, the links, the objective.

All costs are integers (ns, uJ, bytes), so that equal questions have equal answers everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.ids import DeviceId
from p2ptrain.planner.input import LinkEstimate, StageMemory
from p2ptrain.planner.kinds import KINDS, Kind
from p2ptrain.planner.objective import Objective
from p2ptrain.planner.profile import PeerProfile, Power
from p2ptrain.training.contract import Contract


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device that may take part."""

    profile: PeerProfile
    power: Power
    battery_uj: int | None = None
    """What it may spend on the run; None: it is plugged in."""

    @property
    def id(self) -> DeviceId:
        return self.profile.device


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Everything that an answer depends on."""

    manifest: Manifest
    contract: Contract
    devices: tuple[Device, ...]
    """In any order, one entry per device."""
    stage_memory: StageMemory
    links: tuple[LinkEstimate, ...] = ()
    """Links that are not listed are assumed, as for runs."""
    objective: Objective = field(default_factory=Objective)
    schedules: tuple[str, ...] = ("1f1b",)
    kinds: tuple[Kind, ...] = KINDS
    home: DeviceId | None = None
    """Preferred as the first stage among equals; None: nobody is."""
    private: bool = False
    """The home peer has the first and the last stage, or trains alone."""
    for_run: bool = False
    """The plan is carried out: only what the bundle has graphs for, and replicas of every stage
    are kept by whoever is there."""
    replica_every: int | None = None
    """Steps between replica sets; None: as they cost least."""
    steps_left: int | None = None
    """Steps that batteries, deadline and joules have to last for; None: all of the contract's."""
    stages: int | None = None
    """Exact number of stages; None: any."""
    equal_per_mille: int = 0
    """Values that differ by less are equal: then fewer devices, the simpler kind, the home peer
    first."""

    @property
    def steps(self) -> int:
        """Steps that are still to be made, at least one."""
        return max(1, self.contract.steps if self.steps_left is None else self.steps_left)

    def __post_init__(self) -> None:
        names = [device.id for device in self.devices]
        if len(set(names)) != len(names):
            raise ValueError("a device is listed twice")
        if self.private and self.home is None:
            raise ValueError("a private plan has a home peer")
        if not self.kinds or not self.schedules:
            raise ValueError("a question allows at least one kind of plan and one schedule")
