"""Axes as products of numbers and symbols, and what a Reshape does to one of their factors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from p2ptrain.graph.ir import Axis
from p2ptrain.graph.views import product


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """A number times symbols."""

    number: int = 1
    symbols: Counter[str] = field(default_factory=Counter)

    def __mul__(self, other: Extent) -> Extent:
        return Extent(number=self.number * other.number, symbols=self.symbols + other.symbols)

    def over(self, other: Extent) -> Extent | None:
        """The quotient; None where it is no product of these factors."""
        if other.number == 0 or self.number % other.number or other.symbols - self.symbols:
            return None
        return Extent(number=self.number // other.number, symbols=self.symbols - other.symbols)

    @property
    def axis(self) -> Axis:
        return product([self.number, *self.symbols.elements()])


ONE = Extent()


def extent(axis: Axis) -> Extent:
    """An axis as its factors."""
    if isinstance(axis, int):
        return Extent(number=axis)
    parts = axis.split("*")
    number = 1
    for part in parts:
        number *= int(part) if part.isdigit() else 1
    return Extent(number=number, symbols=Counter(p for p in parts if not p.isdigit()))


def times(axes: Sequence[Axis]) -> Extent:
    """Several axes as one."""
    whole = ONE
    for axis in axes:
        whole = whole * extent(axis)
    return whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Axes [start, stop) of one shape that hold the elements of [to_start, to_stop) of another."""

    start: int
    stop: int
    to_start: int
    to_stop: int


def blocks(have: Sequence[Axis], want: Sequence[Axis]) -> list[Block] | None:
    """The finest runs of axes that a Reshape keeps together; None where they cannot be told."""
    found: list[Block] = []
    i = j = 0
    while i < len(have) and j < len(want):
        start, to_start = i, j
        left, right = extent(have[i]), extent(want[j])
        i, j = i + 1, j + 1
        while left != right:
            if right.over(left) is not None and i < len(have):
                left, i = left * extent(have[i]), i + 1
            elif left.over(right) is not None and j < len(want):
                right, j = right * extent(want[j]), j + 1
            else:
                return None
        found.append(Block(start=start, stop=i, to_start=to_start, to_stop=j))
    ones = all(axis == 1 for axis in (*have[i:], *want[j:]))
    if not found or not ones:
        return found if ones else None
    last = found[-1]
    found[-1] = Block(start=last.start, stop=len(have), to_start=last.to_start, to_stop=len(want))
    return found


def pieces(lead: Extent, rest: Sequence[Axis]) -> Iterator[tuple[int, Extent, Extent]]:
    """Where what lies behind `lead` begins among axes: (index, lead within that axis, what is
    left of the axis); nothing where an axis mixes both."""
    for index, axis in enumerate(rest):
        whole = extent(axis)
        left = whole.over(lead)
        if left is not None and left != ONE:
            yield index, lead, left
            return
        remaining = lead.over(whole)
        if remaining is None:
            return
        lead = remaining
