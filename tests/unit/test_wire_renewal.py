"""When a link is worn, and how long until it is more so."""

from __future__ import annotations

import pytest

from p2ptrain import limits
from p2ptrain.wire.renewal import Wear, next_change_s, wear

HOUR_S = 3600.0
GB = 10**9


@pytest.mark.parametrize(
    ("age_s", "carried", "expected"),
    [
        (0.0, 0, Wear.FRESH),
        (11 * HOUR_S - 1, 180 * GB - 1, Wear.FRESH),
        (11 * HOUR_S, 0, Wear.WORN),
        (0.0, 180 * GB, Wear.WORN),
        (12 * HOUR_S - 1, 200 * GB - 1, Wear.WORN),
        (12 * HOUR_S, 0, Wear.WORN_OUT),
        (0.0, 200 * GB, Wear.WORN_OUT),
    ],
)
def test_wear_follows_from_age_and_bytes(age_s: float, carried: int, expected: Wear) -> None:
    assert wear(age_s=age_s, carried_bytes=carried) is expected


@pytest.mark.parametrize(
    ("age_s", "left_s"),
    [(0.0, 11 * HOUR_S), (10 * HOUR_S, HOUR_S), (11 * HOUR_S, HOUR_S), (13 * HOUR_S, 0.0)],
)
def test_next_change_is_at_the_next_limit(age_s: float, left_s: float) -> None:
    assert next_change_s(age_s=age_s) == left_s
    if left_s:
        later = wear(age_s=age_s + left_s, carried_bytes=0)
        assert later is not wear(age_s=age_s, carried_bytes=0)


def test_key_carries_fewer_records_than_aes_gcm_allows() -> None:
    records = limits.LINK_CARRIED_BYTES_MAX / 16_384
    assert records < 2**24.5  # RFC 8446 section 5.5
