"""Simultaneous dials: whatever the order of events, both sides keep the same connection."""

from __future__ import annotations

import pytest

from p2ptrain.ids import DeviceId
from p2ptrain.wire.arbitration import Standing, may_accept, may_offer

LOW, HIGH = DeviceId("a" * 26), DeviceId("b" * 26)


@pytest.mark.parametrize(
    ("ours", "theirs", "standing", "accepted"),
    [
        (LOW, HIGH, Standing.NONE, True),
        (HIGH, LOW, Standing.NONE, True),
        (LOW, HIGH, Standing.SAME_INSTANCE, False),
        (HIGH, LOW, Standing.SAME_INSTANCE, True),
        (LOW, HIGH, Standing.OTHER_INSTANCE, True),
        (HIGH, LOW, Standing.OTHER_INSTANCE, True),
    ],
)
def test_lower_device_keeps_what_it_has_and_higher_follows(
    ours: DeviceId, theirs: DeviceId, standing: Standing, accepted: bool
) -> None:
    assert may_accept(ours, theirs, standing) is accepted


def test_dialled_connection_is_offered_only_when_none_stands() -> None:
    assert [may_offer(standing) for standing in Standing] == [True, False, False]


def test_two_dials_at_once_leave_one_connection_in_every_order() -> None:
    # L: low commits to its own dial; H: high's HELLO reaches low; l: low's HELLO reaches high.
    for order in ("LHl", "LlH", "HLl", "HlL"):
        low = high = None
        offered = False
        for event in order:
            standing = Standing.NONE if low is None else Standing.SAME_INSTANCE
            if event == "L" and may_offer(standing):
                low, offered = "dialled by low", True
            elif event == "H" and may_accept(LOW, HIGH, standing):
                low = high = "dialled by high"
            elif event == "l" and offered:
                known = Standing.NONE if high is None else Standing.SAME_INSTANCE
                if may_accept(HIGH, LOW, known):
                    high = "dialled by low"
        assert low == high is not None, order
