"""What a Linux device draws from its own battery, and how much is left in it.

While it is plugged in, the battery's current is not the device's power: there is no figure then.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from p2ptrain.planner.profile import Battery
from p2ptrain.power.host import power_source
from p2ptrain.power.sysfs import directories, read_integer, read_text

_S_PER_H: Final = 3600


def battery_watts(root: Path = Path("/")) -> float | None:
    """Power of all discharging batteries of the machine itself; None when there is none.

    None as well when any of them does not say how much it gives.
    """
    total: float | None = None
    for supply in directories(root / "sys/class/power_supply"):
        if read_text(supply / "type") != "Battery" or read_text(supply / "scope") == "Device":
            continue
        if read_text(supply / "status") != "Discharging":
            continue
        watts = _watts(supply)
        if watts is None:
            return None
        total = watts if total is None else total + watts
    return total


def battery_percent(root: Path = Path("/")) -> int | None:
    """How full the machine's own batteries are together, 0 to 100; None when there is none.

    By their energy or charge where all say it, since two may differ in size; else the mean of
    what they say in percent.
    """
    supplies = _own_batteries(root)
    for kind in ("energy", "charge"):
        now = [read_integer(supply / f"{kind}_now") for supply in supplies]
        full = [read_integer(supply / f"{kind}_full") for supply in supplies]
        if supplies and None not in now and None not in full and sum(map(_counted, full)) > 0:
            return _bounded(100 * sum(map(_counted, now)) / sum(map(_counted, full)))
    capacities = [read_integer(supply / "capacity") for supply in supplies]
    known = [capacity for capacity in capacities if capacity is not None]
    return _bounded(sum(known) / len(known)) if known else None


def battery_now(root: Path = Path("/"), *, reserve_percent: int) -> Battery | None:
    """The machine's own batteries as one, while it runs on them.

    None while it is plugged in, and where a battery does not say what it holds in energy, nor in
    charge and volts.

    Args:
        root: Of the file system.
        reserve_percent: Of their capacity, which its owner keeps from runs.
    """
    if power_source(root) != "battery":
        return None
    held = [_held_uj(supply) for supply in _own_batteries(root)]
    known = [pair for pair in held if pair is not None]
    capacity_uj = sum(full for _, full in known)
    if len(known) < len(held) or capacity_uj <= 0:
        return None
    charge_uj = sum(min(max(0, now), full) for now, full in known)
    return Battery(charge_uj=charge_uj, capacity_uj=capacity_uj, reserve_percent=reserve_percent)


def _own_batteries(root: Path) -> list[Path]:
    return [
        supply
        for supply in directories(root / "sys/class/power_supply")
        if read_text(supply / "type") == "Battery" and read_text(supply / "scope") != "Device"
    ]


def _held_uj(supply: Path) -> tuple[int, int] | None:
    """Charge and capacity: `energy_*` in uWh, or `charge_*` in uAh at the volts it was made for."""
    now, full = (read_integer(supply / f"energy_{name}") for name in ("now", "full"))
    if now is not None and full is not None:
        return now * _S_PER_H, max(0, full) * _S_PER_H
    now, full = (read_integer(supply / f"charge_{name}") for name in ("now", "full"))
    designed_uv = read_integer(supply / "voltage_min_design")
    volts_uv = designed_uv or read_integer(supply / "voltage_now")
    if now is None or full is None or volts_uv is None:
        return None
    return now * volts_uv * _S_PER_H // 10**6, max(0, full) * volts_uv * _S_PER_H // 10**6


def _counted(value: int | None) -> int:
    return 0 if value is None else max(0, value)


def _bounded(percent: float) -> int:
    return round(min(100.0, max(0.0, percent)))


def _watts(supply: Path) -> float | None:
    """`power_now` in uW, or `current_now` in uA times `voltage_now` in uV; drivers vary in sign."""
    power_uw = read_integer(supply / "power_now")
    if power_uw is not None:
        return abs(power_uw) / 1e6
    current_ua, voltage_uv = (
        read_integer(supply / f"{name}_now") for name in ("current", "voltage")
    )
    if current_ua is None or voltage_uv is None:
        return None
    return abs(current_ua) * voltage_uv / 1e12
