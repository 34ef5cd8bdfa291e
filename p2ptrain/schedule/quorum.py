"""Of how many members the word is enough."""

from __future__ import annotations


def is_enough(present: int, members: int, *, with_tie_breaker: bool) -> bool:
    """Whether so many of a view's members may decide for it: a majority, or half with the
    tie-breaker.

    Any two such sets intersect. Source: dynamic-linear voting, Jajodia and Mutchler 1990.
    """
    return 2 * present > members or (2 * present == members and with_tie_breaker)
