"""Where the elements of a value are, while several shards compute one segment together.

A value is whole on every shard, sliced along one axis, or partial: each shard has a term of the
sum that it is. A family is a set of axes that are sliced alike, in the same units.

Source: the three states and what leads from one to another are those of GSPMD (Xu et al. 2021),
with one mesh axis; the rules here are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from p2ptrain.graph.ir import Axis
from p2ptrain.graph.sharding.extents import Block, Extent, blocks, extent, pieces, times


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """Every shard has all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Partial:
    """Every shard has a term of the sum, in the shape of the whole."""

    family: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sliced:
    """Every shard has its units of one axis.

    The axis is `lead` times the sum of `parts`: one after another, each part is divided in units.
    """

    family: int
    axis: int
    parts: tuple[Axis, ...]
    lead: Axis = 1
    """What a Reshape has merged before the sliced factor: `batch` of `batch*sequence`, or the
    number of equal parts (3 of a fused query, key and value)."""

    @property
    def plain(self) -> bool:
        """Whether a shard's elements are one run of the axis."""
        return self.lead == 1 and len(self.parts) == 1

    def at(self, axis: int) -> Sliced:
        """The same along another axis."""
        return replace(self, axis=axis)

    def alike(self, other: Sliced) -> bool:
        """Whether both slice the same axis in the same way, families apart."""
        return (self.axis, self.lead, self.parts) == (other.axis, other.lead, other.parts)


Placement = Whole | Partial | Sliced
WHOLE = Whole()


def sliced(family: int, axis: int, sizes: Sequence[Axis]) -> Sliced:
    """An axis of consecutive parts; equal ones are told by their number."""
    if len(sizes) > 1 and len(set(sizes)) == 1:
        return Sliced(family=family, axis=axis, parts=(sizes[0],), lead=len(sizes))
    return Sliced(family=family, axis=axis, parts=tuple(sizes))


def reshaped(place: Sliced, have: Sequence[Axis], want: Sequence[Axis]) -> Sliced | None:
    """The placement of a Reshape's result; None where its shards would not be its slices.

    The sliced factor may be split, and its first factor is sliced then; or merged, and what is
    merged behind it belongs to each unit.
    """
    found = blocks(have, want)
    block = next((b for b in found or () if b.start <= place.axis < b.stop), None)
    if block is None:
        return None
    if block.stop - block.start == block.to_stop - block.to_start == 1:
        return place.at(block.to_start)
    if len(place.parts) > 1:
        return None
    return _within(place, block, have, want)


def _within(
    place: Sliced, block: Block, have: Sequence[Axis], want: Sequence[Axis]
) -> Sliced | None:
    lead = times([*have[block.start : place.axis], place.lead])
    inner = extent(place.parts[0])
    for index, before, size in pieces(lead, want[block.to_start : block.to_stop]):
        if _first_factor(inner, size):
            return Sliced(
                family=place.family,
                axis=block.to_start + index,
                parts=(size.axis,),
                lead=before.axis,
            )
    return None


def _first_factor(inner: Extent, size: Extent) -> bool:
    """Whether `size` is a first factor of the sliced one, or that one with what follows it; a
    symbol is never split."""
    if inner.symbols != size.symbols:
        return False
    return inner.over(size) is not None or size.over(inner) is not None
