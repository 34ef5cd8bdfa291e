"""Quantities as people read and type them."""

from __future__ import annotations

import random

import pytest

from p2ptrain.units import NS_PER_S, bytes_rounded_up, parse_bytes, rounded_up


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (200, "200 B"), (1023, "1023 B"), (1025, "1.1 KiB"), (1536, "1.5 KiB"),
     (1024**3 + 1, "1.1 GiB"), (5000 * 1024**3, "5000.0 GiB")],
)  # fmt: skip
def test_what_is_needed_is_never_told_smaller(count: int, text: str) -> None:
    assert bytes_rounded_up(count) == text


def test_what_is_told_is_enough() -> None:
    drawn = random.Random(3)
    for _ in range(500):
        count = drawn.randint(1, 1 << drawn.randint(1, 44))
        told = parse_bytes(bytes_rounded_up(count))
        assert count <= told <= count + max(count // 9, 1)
        figure = rounded_up(count, NS_PER_S)
        assert count <= round(float(figure) * NS_PER_S) <= count + max(count // 99, 1)
        assert "e" not in figure.lower()


@pytest.mark.parametrize(
    ("count", "text"), [(1, "0.000000001"), (12_345_000_001, "12.4"), (1_234_000_000_000, "1240")]
)
def test_three_digits_are_typed(count: int, text: str) -> None:
    assert rounded_up(count, NS_PER_S) == text
