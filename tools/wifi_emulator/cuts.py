"""Who can hear whom: partitions, one-way cuts, cuts between two stations, and healing."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

Pair = tuple[str, str]
"""Sender, receiver."""


class Cuts:
    """The ordered pairs that are cut; everything passes at first."""

    def __init__(self) -> None:
        self._cut: set[Pair] = set()

    def passes(self, sender: str, receiver: str) -> bool:
        """Whether the receiver hears the sender."""
        return (sender, receiver) not in self._cut

    def cut(self, pairs: Iterable[Pair]) -> None:
        """Cut these directions, beside what is cut already."""
        self._cut.update(pairs)

    def heal(self, pairs: Iterable[Pair] | None = None) -> None:
        """Let these directions pass again, or all of them."""
        if pairs is None:
            self._cut.clear()
        else:
            self._cut.difference_update(pairs)

    def partition(self, groups: Sequence[Sequence[str]]) -> None:
        """Cut whoever is in one group from everybody in another; nothing else stays cut."""
        self._cut = {
            pair
            for one, other in itertools.permutations(groups, 2)
            for pair in itertools.product(one, other)
        }

    def pairs(self) -> tuple[Pair, ...]:
        """What is cut now, sorted."""
        return tuple(sorted(self._cut))
