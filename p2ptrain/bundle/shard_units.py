"""How many units of a divided axis each shard has: one rule for plans and for what runs them."""

from __future__ import annotations

from collections.abc import Sequence


def units_by_weight(units: int, weights: Sequence[int]) -> tuple[int, ...]:
    """Whole units per shard in proportion to weights, by rank.

    What proportions leave over goes, one unit each, to whoever is furthest below its part; ties go
    to the lower rank.

    Args:
        units: Heads, columns or positions of one axis.
        weights: At least 1 each.

    Returns:
        As many numbers as weights, which add up to `units`; some are 0 where units are too few.
    """
    whole = sum(weights)
    parts = [units * weight // whole for weight in weights]
    left = units - sum(parts)
    short = sorted(range(len(parts)), key=lambda i: (-(units * weights[i] % whole), i))
    for rank in short[:left]:
        parts[rank] += 1
    return tuple(parts)
