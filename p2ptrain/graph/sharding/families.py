"""Families of axes that are sliced alike: in how many units, and what made them be sliced."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


class Blocked(Exception):
    """A family's axes cannot stay sliced here; what started it is computed whole instead."""

    def __init__(self, family: int, reason: str) -> None:
        super().__init__(reason)
        self.family = family
        self.reason = reason


class PortNeededWhole(Exception):
    """An input that was taken as sliced is needed whole, and costs nothing as such."""

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__(", ".join(sorted(names)))
        self.names = names


@dataclass(slots=True, kw_only=True)
class Families:
    """Union-find over families; a union's units divide the sizes of all its axes."""

    _parents: list[int] = field(default_factory=list)
    _units: list[int] = field(default_factory=list)
    _starts: list[frozenset[str]] = field(default_factory=list)

    def start(self, by: str) -> int:
        """A new family, sliced first by the node that makes the value `by`."""
        self._parents.append(len(self._parents))
        self._units.append(0)
        self._starts.append(frozenset({by}))
        return len(self._parents) - 1

    def root(self, family: int) -> int:
        """The one member that stands for all of them."""
        while self._parents[family] != family:
            family = self._parents[family]
        return family

    def join(self, one: int, other: int) -> int:
        """Make two families one."""
        one, other = sorted((self.root(one), self.root(other)))
        if one != other:
            self._parents[other] = one
            self._units[one] = math.gcd(self._units[one], self._units[other])
            self._starts[one] |= self._starts[other]
        return one

    def limit(self, family: int, size: int) -> None:
        """A sliced part of this many elements consists of whole units."""
        root = self.root(family)
        self._units[root] = math.gcd(self._units[root], size)

    def units(self, family: int) -> int:
        """How many units a family has; 0 where only symbols are sliced."""
        return self._units[self.root(family)]

    def starts(self, family: int) -> frozenset[str]:
        """What to compute whole so that the family is gone."""
        return self._starts[self.root(family)]

    def roots(self) -> list[int]:
        """Families that are left, in the order in which they began."""
        return [family for family, parent in enumerate(self._parents) if family == parent]
