"""Units of an axis, divided by weights."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2ptrain.bundle.shard_units import units_by_weight


@pytest.mark.parametrize(
    ("units", "weights", "parts"),
    [
        (7, (1, 1), (4, 3)),
        (7, (4, 3), (4, 3)),
        (12, (2, 2, 1), (5, 5, 2)),
        (3, (3, 1), (2, 1)),
        (2, (9, 1, 1), (2, 0, 0)),
        (4, (1000, 1000), (2, 2)),
    ],
)
def test_units_follow_weights(units: int, weights: tuple[int, ...], parts: tuple[int, ...]) -> None:
    assert units_by_weight(units, weights) == parts


@given(units=st.integers(0, 5000), weights=st.lists(st.integers(1, 10**6), min_size=1, max_size=9))
def test_all_units_are_given_and_nobody_is_off_by_a_whole_one(
    units: int, weights: list[int]
) -> None:
    parts = units_by_weight(units, weights)
    assert sum(parts) == units
    whole = sum(weights)
    assert all(
        abs(part * whole - units * weight) < whole
        for part, weight in zip(parts, weights, strict=True)
    )
