"""What holds this device back: heat, a low clock, a weak supply, an empty battery, no memory."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from p2ptrain.diagnosis.observations import Machine
from p2ptrain.power.host import available_memory_bytes, power_source
from p2ptrain.power.sysfs import directories, read_integer, read_text

_LOW_GOVERNOR: Final = "powersave"
_OWN_MEANING: Final = ("intel_pstate", "intel_cpufreq", "amd-pstate", "amd-pstate-epp")
"""Drivers whose `powersave` raises the clock under load."""
_THROTTLED: Final = "sys/devices/platform/soc/soc:firmware/get_throttled"
_THROTTLED_BITS: Final = ((0, "under-voltage"), (1, "a capped clock"), (2, "throttling"))


def machine(root: Path = Path("/")) -> Machine:
    """Look at /sys and /proc below `root`."""
    return Machine(
        hottest_celsius=_hottest_celsius(root),
        governor=_governor(root),
        throttled=_throttled(root),
        on_battery=power_source(root) == "battery",
        battery_percent=_battery_percent(root),
        free_memory_bytes=available_memory_bytes(root),
    )


def _hottest_celsius(root: Path) -> float | None:
    zones = directories(root / "sys/class/thermal")
    found = [read_integer(zone / "temp") for zone in zones if zone.name.startswith("thermal_zone")]
    return max((each / 1000 for each in found if each is not None), default=None)


def _governor(root: Path) -> str | None:
    """The governor when it keeps the clock low."""
    folder = root / "sys/devices/system/cpu/cpu0/cpufreq"
    governor, driver = (read_text(folder / f"scaling_{name}") for name in ("governor", "driver"))
    return governor if governor == _LOW_GOVERNOR and driver not in _OWN_MEANING else None


def _throttled(root: Path) -> str | None:
    """What a Raspberry Pi reports at this moment."""
    try:
        bits = int(read_text(root / _THROTTLED) or "0", 16)
    except ValueError:
        return None
    found = [name for bit, name in _THROTTLED_BITS if bits >> bit & 1]
    return ", ".join(found) or None


def _battery_percent(root: Path) -> int | None:
    supplies = directories(root / "sys/class/power_supply")
    own = [s for s in supplies if read_text(s / "type") == "Battery"]
    found = [read_integer(s / "capacity") for s in own if read_text(s / "scope") != "Device"]
    return min((each for each in found if each is not None), default=None)
