"""What a Linux device draws from its own battery, and how much is left in it.

While it is plugged in, the battery's current is not the device's power: there is no figure then.
"""

from __future__ import annotations

from pathlib import Path

from p2ptrain.power.sysfs import directories, read_integer, read_text


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
    supplies = [
        supply
        for supply in directories(root / "sys/class/power_supply")
        if read_text(supply / "type") == "Battery" and read_text(supply / "scope") != "Device"
    ]
    for kind in ("energy", "charge"):
        now = [read_integer(supply / f"{kind}_now") for supply in supplies]
        full = [read_integer(supply / f"{kind}_full") for supply in supplies]
        if supplies and None not in now and None not in full and sum(map(_counted, full)) > 0:
            return _bounded(100 * sum(map(_counted, now)) / sum(map(_counted, full)))
    capacities = [read_integer(supply / "capacity") for supply in supplies]
    known = [capacity for capacity in capacities if capacity is not None]
    return _bounded(sum(known) / len(known)) if known else None


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
