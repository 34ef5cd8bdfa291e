"""Whether a device should leave its runs because its battery runs low; with hysteresis."""

from __future__ import annotations

from p2ptrain import limits


def leaves_for_battery(
    *,
    leaving: bool,
    power_source: str,
    percent: int | None,
    reserve_percent: int = limits.BATTERY_LEAVE_PERCENT,
) -> bool:
    """Whether a device should be leaving now.

    It starts to leave at its reserve and takes that back on mains, or when it has clearly more, so
    that a charge that hovers at the limit causes one leave only. What the platform does not say
    changes nothing.

    Args:
        leaving: Whether it is leaving for this reason already.
        power_source: `mains`, `battery` or `unknown` (`p2ptrain.power.host.power_source`).
        percent: What is left in the battery (`p2ptrain.power.battery.battery_percent`).
        reserve_percent: What its owner keeps from runs.
    """
    if power_source == "mains":
        return False
    if power_source != "battery" or percent is None:
        return leaving
    more = limits.BATTERY_RETURN_ABOVE_PERCENT if leaving else 0
    return percent <= min(reserve_percent + more, limits.BATTERY_RETURN_PERCENT_MAX)
