"""Watts that a Linux device draws from its own battery.

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
