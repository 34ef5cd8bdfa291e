"""The time on a device whose clock may be wrong."""

from __future__ import annotations

import pytest

from p2ptrain.errors import TrustError
from p2ptrain.trust.clock import CLOCK_SKEW_MAX_S, Reading, VouchedClock, doubts_clock

FLOOR_S = 1_800_000_000.0
DAY_S = 86_400.0


def at(wall_s: float, counted_s: float = 100.0) -> Reading:
    return Reading(wall_s=wall_s, counted_s=counted_s)


def clock() -> VouchedClock:
    return VouchedClock(floor_s=FLOOR_S)


def test_right_clock_is_believed() -> None:
    for wall_s in (FLOOR_S - CLOCK_SKEW_MAX_S, FLOOR_S, FLOOR_S + 400 * DAY_S):
        assert clock().now(at(wall_s)) == wall_s
        assert clock().problem(at(wall_s)) is None
        assert not clock().is_behind(at(wall_s))


def test_clock_without_battery_is_noticed_and_never_before_what_is_certain() -> None:
    reading = at(0.0)
    assert clock().is_behind(reading)
    assert clock().now(reading) == FLOOR_S
    problem = clock().problem(reading)
    assert problem is not None
    assert "before its certificate was made, 20833 days behind it" in problem


@pytest.mark.parametrize(
    ("off_s", "said"), [(-3 * DAY_S, "3 days behind"), (2 * DAY_S, "2 days ahead of")]
)
def test_vouched_time_counts_on_and_is_told(off_s: float, said: str) -> None:
    made = clock()
    true_s = FLOOR_S + 10 * DAY_S
    assert made.vouch(true_s, by="attic", reading=at(true_s + off_s))
    later = at(true_s + off_s + 50, counted_s=150.0)
    assert made.now(later) == true_s + 50
    assert made.is_vouched(later)
    problem = made.problem(later)
    assert problem is not None
    assert f"this device's clock is {said} that of attic" in problem


def test_clock_that_is_set_right_is_used_again() -> None:
    made = clock()
    made.vouch(FLOOR_S + DAY_S, by="attic", reading=at(0.0))
    right = at(FLOOR_S + DAY_S + 3600.0, counted_s=3700.0)
    assert not made.is_vouched(right)
    assert made.now(right) == right.wall_s
    assert made.problem(right) is None


def test_small_difference_changes_nothing() -> None:
    made = clock()
    assert not made.vouch(FLOOR_S + 100, by="attic", reading=at(FLOOR_S))
    assert made.now(at(FLOOR_S)) == FLOOR_S


def test_time_before_we_were_a_member_is_not_believed() -> None:
    made = clock()
    with pytest.raises(TrustError, match="not yet a member"):
        made.vouch(FLOOR_S - DAY_S, by="attic", reading=at(0.0))
    assert made.now(at(0.0)) == FLOOR_S


def test_clock_is_doubted_only_when_no_linked_member_agrees_with_it() -> None:
    assert doubts_clock(linked_ahead_s=(), not_yet_valid=True)
    assert doubts_clock(linked_ahead_s=(9000.0, -7000.0), not_yet_valid=True)
    assert not doubts_clock(linked_ahead_s=(9000.0, 3.0), not_yet_valid=True)
    assert not doubts_clock(linked_ahead_s=(), not_yet_valid=False)
