"""What a run needs of the peer it lives in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from p2ptrain.engine.contract import Engine
from p2ptrain.ids import DeviceId, RunId
from p2ptrain.membership.record import MemberRecord
from p2ptrain.runtime.blobs import BlobExchange
from p2ptrain.runtime.outlet import Outlet
from p2ptrain.runtime.usage import RunMeter

Emit = Callable[[str, object], None]
"""(event name, report) -> whoever asked for the run."""


class Directory(Protocol):
    """Who is in the group, as far as this peer knows."""

    def alive(self) -> tuple[MemberRecord, ...]:
        """Every member that answers, this device first."""

    def name_of(self, device: DeviceId) -> str:
        """What people call a device; its short id when unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """One peer's abilities, handed to its runs."""

    device: DeviceId
    directory: Directory
    outlet: Outlet
    blobs: BlobExchange
    runs_path: Path
    open_engine: Callable[[int], Engine]
    """threads -> an engine."""
    open_meter: Callable[[RunId, int], RunMeter]
    """(run, samples per step) -> the meter that books on that run."""
    memory_bytes: Callable[[], int]
    """What a run may use here now."""
    host: str
    cores: int
    threads_max: int
    """The most compute threads the owner of this peer allows."""
