"""Read RAPL energy counters through /sys/class/powercap (Intel and AMD Zen).

Counted: every package, and its DRAM where it has a counter of its own. Not counted: core and
uncore (they lie inside the package), psys beside a package, and intel-rapl-mmio (a second view
of the same package). Counters wrap at `max_energy_range_uj`: read them at least every 30 s.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from p2ptrain.power.sysfs import directories, read_integer, read_text

_ZONE: Final = re.compile(r"intel-rapl:\d+(:\d+)?\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class RaplZone:
    """One counter that is added up."""

    name: str
    path: Path
    range_uj: int
    """The counter starts again at 0 after this value."""


class RaplCounter:
    """Microjoules of all zones since it was opened, wraps removed."""

    def __init__(self, zones: tuple[RaplZone, ...]) -> None:
        self._zones = zones
        self._last: tuple[int, ...] | None = None
        self._total_uj = 0

    @property
    def zones(self) -> tuple[RaplZone, ...]:
        return self._zones

    def read_uj(self, now: float) -> int | None:
        """The sum so far, whatever the time is; None when a counter cannot be read now.

        After a failed read, counting goes on from the next good one: what lies between is lost
        rather than guessed, and the caller uses the model for it.
        """
        values = tuple(read_integer(zone.path / "energy_uj") for zone in self._zones)
        known = tuple(value for value in values if value is not None)
        if len(known) < len(values):
            self._last = None
            return None
        if self._last is not None:
            steps = zip(self._zones, self._last, known, strict=True)
            self._total_uj += sum(_rise_uj(zone, before, after) for zone, before, after in steps)
        self._last = known
        return self._total_uj


@dataclass(frozen=True, slots=True, kw_only=True)
class RaplUnavailable:
    """Why RAPL cannot be used here, one phrase."""

    reason: str


def open_rapl(root: Path = Path("/")) -> RaplCounter | RaplUnavailable:
    """The counters of this machine, or why there are none."""
    zones = find_zones(root)
    if not zones:
        return RaplUnavailable(reason="no RAPL counter")
    for zone in zones:
        reason = _why_unreadable(zone.path / "energy_uj")
        if reason is not None:
            return RaplUnavailable(reason=f"RAPL {zone.name}: {reason}")
    return RaplCounter(zones)


def find_zones(root: Path) -> tuple[RaplZone, ...]:
    """The zones that may be added: packages with their DRAM; psys where there is no package."""
    listed = [
        zone
        for path in directories(root / "sys/class/powercap")
        if _ZONE.match(path.name) and (zone := _zone(path)) is not None
    ]
    packages = {zone.path.name for zone in listed if zone.name.startswith("package-")}
    if not packages:
        return tuple(zone for zone in listed if zone.name == "psys")[:1]
    return tuple(
        zone
        for zone in listed
        if zone.path.name in packages
        or (zone.name == "dram" and zone.path.name.rpartition(":")[0] in packages)
    )


def _zone(path: Path) -> RaplZone | None:
    name, range_uj = read_text(path / "name"), read_integer(path / "max_energy_range_uj")
    if name is None or range_uj is None or range_uj < 1:
        return None
    return RaplZone(name=name, path=path, range_uj=range_uj)


def _why_unreadable(path: Path) -> str | None:
    """Why a counter cannot be read. An unreadable counter is never zero joules."""
    try:
        int(path.read_text())
    except PermissionError:
        return "permission denied"
    except (OSError, ValueError):
        return "not readable"
    return None


def _rise_uj(zone: RaplZone, before: int, after: int) -> int:
    return after - before if after >= before else after - before + zone.range_uj
