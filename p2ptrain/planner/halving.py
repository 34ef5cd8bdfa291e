"""The least time in which an arrangement can be cut, found by halving."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from p2ptrain.planner.arrangement import Cuts

PRECISION: Final = 512
"""The bottleneck is found to one part in so many."""


def least_busy(
    within: Callable[[int], Cuts | None], high_ns: int, best: Cuts | None
) -> Cuts | None:
    """Cuts of the least time that has any; None when `best` is.

    Args:
        within: Cuts whose busiest device takes at most so many nanoseconds, if there are any.
        high_ns: A time in which `best` is possible.
        best: What to improve on.
    """
    low = 0
    while best is not None and high_ns - low > max(high_ns // PRECISION, 1):
        middle = (low + high_ns) // 2
        found = within(middle)
        if found is None:
            low = middle
        else:
            best, high_ns = found, middle
    return best
