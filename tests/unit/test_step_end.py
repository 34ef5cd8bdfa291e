"""What ends a step: who waits for whose sums, records and updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from p2ptrain.schedule.step_end import Members, PeerEnd, period_ns

NEAR = ((0, 0, 0), (0, 0, 0), (0, 0, 0))
APART = ((0, 10, 30), (10, 0, 20), (30, 20, 0))


def end(
    device: int, *, begins: int = 0, whole: int = 100, norm: int = 0, update: int = 0
) -> PeerEnd:
    return PeerEnd(
        device=device, begins_ns=begins, whole_ns=whole, norm_ns=norm, update_ns=update
    )  # fmt: skip


def members(
    count: int,
    *,
    home: int | None = 0,
    latency: Sequence[Sequence[int]] = APART,
    record: Mapping[int, int] | None = None,
) -> Members:
    record_ns = {i: (record or {}).get(i, 0) for i in range(count)}
    return Members(record_ns=record_ns, tie_breaker=home, latency_ns=latency)


def test_alone_a_step_ends_with_norm_record_and_update() -> None:
    alone = members(1, record={0: 7})
    assert period_ns([end(0, norm=3, update=5)], alone) == 100 + 3 + 7 + 5


def test_norm_of_who_is_done_first_hides_behind_the_others() -> None:
    ends = [end(0, whole=100, norm=3), end(1, begins=20, whole=80, norm=20)]
    assert period_ns(ends, members(2, latency=NEAR)) == 103
    ends = [end(0, whole=100, norm=3), end(1, begins=20, whole=80, norm=50)]
    assert period_ns(ends, members(2, latency=NEAR)) == 130


@pytest.mark.parametrize(("update", "period"), [(5, 105), (25, 105), (40, 120)])
def test_update_of_a_later_stage_hides_behind_the_fill(update: int, period: int) -> None:
    ends = [end(0, update=5), end(1, begins=20, whole=80, update=update)]
    assert period_ns(ends, members(2, latency=NEAR)) == period


def test_of_two_the_tie_breaker_waits_for_nobody_and_the_other_for_it() -> None:
    assert period_ns([end(0), end(1, begins=4, whole=80)], members(2)) == 106, "less the fill"
    assert period_ns([end(0), end(1, begins=20, whole=80)], members(2)) == 100
    assert period_ns([end(0), end(1, begins=20, whole=80)], members(2, home=1)) == 120


def test_of_three_the_nearest_other_record_is_enough() -> None:
    assert period_ns([end(0)], members(3)) == 120
    assert period_ns([end(0)], members(3, record={0: 9, 2: 1_000})) == 120, "beside the way"
    assert period_ns([end(0)], members(3, record={1: 9, 2: 1_000})) == 129
    assert period_ns([end(2)], members(3)) == 140


def test_both_stages_of_one_device_end_together() -> None:
    ends = [
        end(0, whole=100, norm=2, update=5),
        end(1, begins=20, whole=80),
        end(0, begins=40, whole=60, norm=3, update=7),
    ]
    assert period_ns(ends, members(2, latency=NEAR)) == 100 + 5 + 12
