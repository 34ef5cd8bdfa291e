"""What a run needs of the peer it lives in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from p2ptrain.data.options import GivenData
from p2ptrain.engine.contract import Engine
from p2ptrain.errors import RemoteProtocolError
from p2ptrain.ids import DeviceId, Digest, Lineage, RunId, ViewNumber
from p2ptrain.membership.record import MemberRecord
from p2ptrain.planner.links import LinkFigure
from p2ptrain.planner.plan import Plan
from p2ptrain.planner.profile import Battery, Power
from p2ptrain.power.cgroups import CpuQuota
from p2ptrain.runtime.exchange.blobs import BlobExchange
from p2ptrain.runtime.exchange.outlet import Outlet
from p2ptrain.runtime.reporting.usage import RunMeter
from p2ptrain.training.contract import Contract

Emit = Callable[[str, object], None]
"""(event name, report) -> whoever asked for the run."""


class Directory(Protocol):
    """Who is in the group, as far as this peer knows."""

    def alive(self) -> tuple[MemberRecord, ...]:
        """Every member that answers, this device first."""

    def linked(self) -> tuple[DeviceId, ...]:
        """Other devices with which messages and tensors can be exchanged now, sorted."""

    def leaving(self) -> tuple[DeviceId, ...]:
        """Devices, perhaps this one, that have said that they are about to go."""

    def name_of(self, device: DeviceId) -> str:
        """What people call a device; its short id when unknown."""


class Proposals(Protocol):
    """How a home peer gets its plan agreed."""

    def propose(self, plan: Plan, contract: Contract) -> None:
        """Ask every member of the plan; LocalProtocolError when its view is taken."""

    def withdraw(self, plan: Digest, reason: str) -> None:
        """Take back a proposal that is not decided yet; nothing happens when it is."""

    def next_view(self, run: RunId, lineage: Lineage) -> ViewNumber:
        """The lowest view that can still be proposed, as far as is known here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """One peer's abilities, handed to its runs."""

    device: DeviceId
    directory: Directory
    outlet: Outlet
    blobs: BlobExchange
    runs_path: Path
    cache_path: Path
    """What can be found out again."""
    open_engine: Callable[[int], Engine]
    """threads -> an engine."""
    open_meter: Callable[[Plan, int], RunMeter]
    """(plan, samples per step) -> the meter that books on this session of its run."""
    clock_ns: Callable[[], int]
    """Nanoseconds by which compute is timed."""
    link_figures: Callable[[], tuple[LinkFigure, ...]]
    """What was measured of this peer's links."""
    memory_bytes: Callable[[], int]
    """What a run may use here now."""
    host: str
    """Identity of the machine (`PeerProfile.host`)."""
    cores: int
    threads_max: int
    """The most compute threads the owner of this peer allows."""
    drop_link: Callable[[DeviceId, RemoteProtocolError], None]
    """A device broke the protocol: close the link with it."""
    say_activity: Callable[[str], None]
    """Tell the group what this peer is doing now."""
    steps_in_memory: Callable[[], bool] = lambda: False
    """Whether records of steps are not written to disk, because that would hold the run up."""
    record_ns: Callable[[], int] = lambda: 0
    """What it takes here until a record of a step is durable; 0: it stays in memory. May block."""
    power: Callable[[int], Power | None] = lambda threads: None
    """threads -> what the machine draws while it computes with them; None: it is not known."""
    battery: Callable[[], Battery | None] = lambda: None
    """The battery that the device runs on now; None: none, or it does not say."""
    cpu_quota: Callable[[], CpuQuota | None] = lambda: None
    """What holds back this process now."""
    given_data: GivenData | None = None
    """What this peer feeds in runs whose peers feed their own; None: it has no part in them."""
    own_cores: str = ""
    """Of the quota below which this peer began; empty: it shares the machine's cores."""
