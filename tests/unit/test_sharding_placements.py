"""What a Reshape does to a slice: a table."""

from __future__ import annotations

import pytest

from p2ptrain.graph.ir import Axis
from p2ptrain.graph.sharding.extents import Block, blocks, extent, times
from p2ptrain.graph.sharding.families import Families
from p2ptrain.graph.sharding.placements import Sliced, reshaped, sliced

Axes = tuple[Axis, ...]
B, T = "batch", "sequence"


def slice_of(axis: int, *parts: Axis, lead: Axis = 1) -> Sliced:
    return Sliced(family=0, axis=axis, parts=parts, lead=lead)


@pytest.mark.parametrize(
    ("place", "have", "want", "after"),
    [
        # A linear's columns become heads, and heads columns.
        (slice_of(1, 28), (f"{B}*{T}", 28), (B, T, 7, 4), slice_of(2, 7)),
        (slice_of(2, 7), (B, T, 7, 4), (B, T, 28), slice_of(2, 28)),
        (slice_of(2, 7), (B, T, 7, 4), (f"{T}*{B}", 28), slice_of(1, 28)),
        # Positions are merged behind the batch, and told apart again.
        (slice_of(1, T), (B, T, 28), (f"{B}*{T}", 28), slice_of(0, T, lead=B)),
        (slice_of(0, T, lead=B), (f"{B}*{T}", 28), (B, T, 7, 4), slice_of(1, T)),
        (slice_of(1, T), (B, T), (f"{B}*{T}", 1), slice_of(0, T, lead=B)),
        # Fused query, key and value: the three lie before the heads.
        (slice_of(2, 32, lead=3), (B, T, 96), (B, T, 3, 4, 8), slice_of(3, 4)),
        (slice_of(1, 32, lead=3), (f"{B}*{T}", 96), (B, T, 96), slice_of(2, 32, lead=3)),
        # Groups of keys before the queries of each.
        (slice_of(1, 2), (B, 2, 3, T, 8), (B, 6, T, 8), slice_of(1, 6)),
        (slice_of(1, 6), (B, 6, T, 8), (B, 2, 3, T, 8), slice_of(1, 2)),
        (slice_of(2, 3), (B, 2, 3, T, 8), (B, 6, T, 8), slice_of(1, 3, lead=2)),
        # Axes of one element come and go.
        (slice_of(1, 2), (B, 2, T, 8), (B, 2, 1, T, 8), slice_of(1, 2)),
        (slice_of(0, T), (T, 8), (1, T, 8), slice_of(1, T)),
        # Unequal parts stay where their axis stays, and only there.
        (slice_of(1, 32, 16), (f"{B}*{T}", 48), (B, T, 48), slice_of(2, 32, 16)),
        (slice_of(1, 32, 16), (f"{B}*{T}", 48), (B, T, 6, 8), None),
        # A factor that the sliced one shares no elements with.
        (slice_of(1, 6), (B, 6), (f"{B}*6",), slice_of(0, 6, lead=B)),
        (slice_of(1, 6), (B, 6, 5), (B, 5, 6), None),
        (slice_of(0, T), (T, 8), (f"8*{T}",), slice_of(0, f"8*{T}")),
        (slice_of(0, f"8*{T}"), (f"8*{T}",), (8, T), None),
    ],
)
def test_reshaped(place: Sliced, have: Axes, want: Axes, after: Sliced | None) -> None:
    assert reshaped(place, have, want) == after


def test_blocks_are_the_finest_runs() -> None:
    assert blocks((B, T, 28), (f"{B}*{T}", 7, 4)) == [
        Block(start=0, stop=2, to_start=0, to_stop=1),
        Block(start=2, stop=3, to_start=1, to_stop=3),
    ]
    assert blocks((B, 3), (T, 3)) is None
    assert blocks((4,), (4, 1, 1)) == [Block(start=0, stop=1, to_start=0, to_stop=3)]


def test_extents_divide_by_number_and_by_symbol() -> None:
    whole = extent(f"6*{B}*{T}")
    assert whole.over(extent(f"2*{T}")) == extent(f"3*{B}")
    assert whole.over(extent(4)) is None
    assert whole.over(extent("heads")) is None
    assert times((2, B, 3, T)).axis == f"6*{B}*{T}"


def test_equal_parts_are_a_number_of_one() -> None:
    assert sliced(0, 1, (32, 32, 32)) == slice_of(1, 32, lead=3)
    assert sliced(0, 1, (32, 16)) == slice_of(1, 32, 16)
    assert not sliced(0, 1, (32, 16)).plain
    assert sliced(0, 1, (32,)).plain


def test_families_that_meet_share_units_and_starts() -> None:
    families = Families()
    one, other, third = (families.start(name) for name in ("q", "k", "up"))
    families.limit(one, 32)
    families.limit(one, 4)
    families.limit(other, 2)
    assert families.units(one) == 4
    assert families.join(other, one) == one
    assert families.units(other) == 2
    assert families.starts(other) == {"q", "k"}
    assert families.roots() == [one, third]
