"""When a device leaves because its battery runs low."""

from __future__ import annotations

import pytest

from p2ptrain import limits
from p2ptrain.membership.battery import leaves_for_battery


@pytest.mark.parametrize(
    ("leaving", "source", "percent", "expected"),
    [
        (False, "battery", 16, False),
        (False, "battery", 15, True),
        (True, "battery", 16, True),
        (True, "battery", 30, True),
        (True, "battery", 31, False),
        (True, "mains", 3, False),
        (False, "mains", 3, False),
        (False, "battery", None, False),
        (True, "battery", None, True),
        (True, "unknown", 90, True),
        (False, "unknown", 3, False),
    ],
)
def test_battery_decides_with_hysteresis(
    leaving: bool, source: str, percent: int | None, expected: bool
) -> None:
    found = leaves_for_battery(leaving=leaving, power_source=source, percent=percent)
    assert found is expected


@pytest.mark.parametrize(
    ("reserve", "leaving", "percent", "expected"),
    [
        (0, False, 1, False),
        (0, False, 0, True),
        (60, False, 60, True),
        (60, False, 61, False),
        (60, True, 75, True),
        (60, True, 76, False),
        (95, True, 97, True),
        (95, True, 98, False),
    ],
)
def test_an_owner_keeps_a_reserve(
    reserve: int, leaving: bool, percent: int, expected: bool
) -> None:
    found = leaves_for_battery(
        leaving=leaving, power_source="battery", percent=percent, reserve_percent=reserve
    )
    assert found is expected


def test_charge_that_hovers_at_the_limit_causes_one_leave() -> None:
    leaving, changes = False, 0
    limit = limits.BATTERY_LEAVE_PERCENT
    for percent in (limit + 1, limit, limit + 1, limit, limit + 2, limit - 1):
        now = leaves_for_battery(leaving=leaving, power_source="battery", percent=percent)
        changes += now is not leaving
        leaving = now
    assert changes == 1
