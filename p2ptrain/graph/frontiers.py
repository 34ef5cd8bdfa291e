"""Where a model is cut when nobody says: at the narrowest frontiers of its graph.

1. A frontier is a position that one main value crosses. A stretch without one that holds many
   products (a decoder that reads its encoder everywhere, skips over long distances) is opened at
   its local minima of crossing bytes.
2. Every stretch with a product makes a segment. What lies between two of them joins the one that
   it follows everywhere in the model, or else the one whose parameters lie nearer.
3. Segments are joined across a boundary much dearer than the next one, and when they hardly
   compute, unless that would make two segments different that are equal.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from p2ptrain.graph.costs import PRODUCTS
from p2ptrain.graph.flow import Flow, signature

OPENED_PRODUCTS: Final = 12
"""A stretch with more products than this is opened; an attention block has six to eight. Those of
adapters do not count: what they change stays one linear."""
DEARER: Final = 3
"""A boundary that costs over three times the next one is given up."""
TINY: Final = 8
"""A segment with less than an eighth of the mean work is joined to a neighbour."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Cut positions in order, each with the reason; `notes` say what was joined and why."""

    cuts: tuple[int, ...]
    reasons: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stretch:
    """Main nodes from `start` up to `end`, the latter excluded."""

    start: int
    end: int
    products: int
    signature: str
    """Equal for stretches that do the same to values of the same shapes."""


def find_cuts(flow: Flow) -> Found:
    """The default cuts of a model; none for one that cannot be cut."""
    blocks = _blocks(flow, _stretches(flow, frontiers(flow)))
    segments, notes = _Joiner(flow=flow).join(blocks)
    cuts = tuple(segment.end - 1 for segment in segments[:-1])
    return Found(cuts=cuts, reasons=tuple(_reason(flow, cut) for cut in cuts), notes=notes)


def _reason(flow: Flow, cut: int) -> str:
    count = len(flow.alive[cut])
    return "one value crosses" if count == 1 else f"fewest bytes near it, {count} values cross"


def allowed(flow: Flow) -> tuple[int, ...]:
    """Positions where a cut is possible at all: labels come later, every size that later nodes ask
    for can be read from what crosses, and no adapter is torn."""
    found = []
    torn = flow.torn()
    for position in range(min(flow.first_late(), len(flow.order)) - 1):
        crossing = flow.alive[position]
        typed = all(name in flow.graph.types for name in crossing)
        whole = position not in torn
        if crossing and typed and whole and flow.symbols[position] <= _symbols(flow, position):
            found.append(position)
    return tuple(found)


def _symbols(flow: Flow, position: int) -> set[str]:
    axes = [a for v in flow.alive[position] for a in flow.graph.types[v].axes]
    axes += [a for v in flow.raw[position] for a in flow.graph.types[v].axes]
    return {axis for axis in axes if isinstance(axis, str)}


def frontiers(flow: Flow) -> tuple[int, ...]:
    """Positions that one value crosses, and the narrowest ones of long stretches without any."""
    possible = allowed(flow)
    single = [p for p in possible if len(flow.alive[p]) == 1]
    found = list(single)
    for stretch in _stretches(flow, single):
        if stretch.products > OPENED_PRODUCTS:
            found += _valleys(flow, stretch, possible)
    return tuple(sorted(found))


def _valleys(flow: Flow, stretch: _Stretch, possible: Sequence[int]) -> list[int]:
    """Local minima of crossing bytes inside a stretch that tear no parameter in two."""
    inside = [p for p in possible if stretch.start <= p < stretch.end - 1]
    costs = [flow.bytes_of(flow.alive[p]) for p in inside]
    found: list[int] = []
    start = 0
    while start < len(inside):
        end = start
        while end + 1 < len(inside) and costs[end + 1] == costs[start]:
            end += 1
        left = start == 0 or costs[start - 1] > costs[start]
        right = end + 1 == len(inside) or costs[end + 1] > costs[start]
        if left and right:
            found += [p for p in inside[start : end + 1] if not _tears(flow, stretch, p)]
        start = end + 1
    return found


def _tears(flow: Flow, stretch: _Stretch, position: int) -> bool:
    before = frozenset[str]().union(*flow.parameters[stretch.start : position + 1])
    behind = frozenset[str]().union(*flow.parameters[position + 1 : stretch.end])
    return bool(before & behind)


def _stretches(flow: Flow, cuts: Sequence[int]) -> list[_Stretch]:
    ends = [position + 1 for position in cuts] + [len(flow.order)]
    starts = [0, *ends[:-1]]
    return [_stretch(flow, start, end) for start, end in zip(starts, ends, strict=True)]


def _stretch(flow: Flow, start: int, end: int) -> _Stretch:
    nodes = flow.order[start:end]
    added = flow.added()
    return _Stretch(
        start=start,
        end=end,
        products=sum(n.op_type in PRODUCTS and n.output[0] not in added for n in nodes),
        signature=signature(flow, nodes),
    )


def _blocks(flow: Flow, stretches: Sequence[_Stretch]) -> list[_Stretch]:
    """Stretches with a product, each with what joins it; an embedding in front stays alone."""
    places = [index for index, stretch in enumerate(stretches) if stretch.products]
    if not places:
        return [_stretch(flow, 0, len(flow.order))]
    gaps = [
        list(stretches[place + 1 : following])
        for place, following in zip(places, [*places[1:], len(stretches)], strict=True)
    ]
    ends = []
    for index, place in enumerate(places[:-1]):
        kept = _following(flow, stretches, places, gaps, index)
        ends.append(stretches[place + kept].end)
    front = stretches[places[0]].start
    embeds = front > 0 and any(flow.parameters[:front])
    starts = ([0] if embeds else []) + [front if embeds else 0, *ends]
    return [
        _stretch(flow, start, end)
        for start, end in zip(starts, [*starts[1:], len(flow.order)], strict=True)
    ]


def _following(
    flow: Flow,
    stretches: Sequence[_Stretch],
    places: Sequence[int],
    gaps: Sequence[list[_Stretch]],
    index: int,
) -> int:
    """How many stretches of the gap behind a block belong to it."""
    here = stretches[places[index]]
    alike = [
        gaps[other]
        for other in range(len(places) - 1)
        if stretches[places[other]].signature == here.signature
    ]
    if len(alike) > 1:
        shared = 0
        for together in zip(*alike, strict=False):
            if len({stretch.signature for stretch in together}) > 1:
                break
            shared += 1
        return shared
    behind = stretches[places[index + 1]]
    kept = 0
    for stretch in gaps[index]:
        if _kinship(flow, stretch, behind) > _kinship(flow, stretch, here):
            break
        kept += 1
    return kept


def _kinship(flow: Flow, one: _Stretch, other: _Stretch) -> int:
    """How many leading parts the module paths of their parameters share at most."""
    return max(
        (
            _shared(left.split("."), right.split("."))
            for left in _names(flow, one)
            for right in _names(flow, other)
        ),
        default=0,
    )


def _names(flow: Flow, stretch: _Stretch) -> frozenset[str]:
    return frozenset[str]().union(*flow.parameters[stretch.start : stretch.end])


def _shared(left: Sequence[str], right: Sequence[str]) -> int:
    count = 0
    for one, other in zip(left[:-1], right[:-1], strict=False):
        if one != other:
            break
        count += 1
    return count


@dataclass(slots=True, kw_only=True)
class _Joiner:
    """Joins neighbours, every pair of the same two kinds alike, until nothing calls for it."""

    flow: Flow

    def join(self, blocks: list[_Stretch]) -> tuple[list[_Stretch], tuple[str, ...]]:
        """The segments that remain, and a sentence for every joining."""
        notes: list[str] = []
        while (choice := self._next(blocks)) is not None:
            pair, why = choice
            at = self.flow.order[blocks[pair].end - 1].output[0]
            notes.append(f"joined across {at!r}: {why}")
            kinds = (blocks[pair].signature, blocks[pair + 1].signature)
            blocks = self._joined(blocks, kinds)
        return blocks, tuple(notes)

    def _next(self, blocks: list[_Stretch]) -> tuple[int, str] | None:
        """The pair that most calls for joining, and why."""
        free = [index for index in range(len(blocks) - 1) if self._may(blocks, index)]
        costs = [self.flow.bytes_of(self.flow.alive[b.end - 1]) for b in blocks[:-1]]
        dear = [(costs[i] / near, i, near) for i in free if (near := _near(costs, i))]
        if dear and max(dear)[0] > DEARER:
            _, index, near = max(dear)
            return index, f"{costs[index]} bytes cross it, {near} the next boundary"
        work = [self.flow.flops(block.start, block.end) for block in blocks]
        small = self._smallest(blocks, work)
        beside = [index for index in free if small is not None and small in (index, index + 1)]
        if not beside:
            return None
        index = max(beside, key=lambda place: (costs[place], -place))
        return index, f"a segment of {work[small or 0] / 1e6:.3g} MFLOP is too small"

    def _smallest(self, blocks: list[_Stretch], work: list[int]) -> int | None:
        """The smallest segment far below the mean that may be joined; embedding and head stay."""
        inner = [i for i in range(len(blocks) - 1) if blocks[i].products]
        inner = [i for i in inner if any(self._may(blocks, j) for j in (i - 1, i) if j >= 0)]
        mean = sum(work) / max(1, sum(block.products > 0 for block in blocks))
        small = [i for i in inner if work[i] * TINY < mean]
        return min(small, key=lambda i: (work[i], i)) if small else None

    def _may(self, blocks: list[_Stretch], index: int) -> bool:
        """Whether equal segments stay equal: these two kinds always stand side by side."""
        if index + 1 >= len(blocks) or not blocks[index].products:
            return False
        counts = Counter(block.signature for block in blocks)
        one, other = blocks[index].signature, blocks[index + 1].signature
        pairs = sum(
            (left.signature, right.signature) == (one, other)
            for left, right in itertools.pairwise(blocks)
        )
        return one != other and counts[one] == counts[other] == pairs

    def _joined(self, blocks: list[_Stretch], kinds: tuple[str, str]) -> list[_Stretch]:
        joined: list[_Stretch] = []
        for block in blocks:
            if joined and (joined[-1].signature, block.signature) == kinds:
                joined[-1] = _stretch(self.flow, joined[-1].start, block.end)
            else:
                joined.append(block)
        return joined


def _near(costs: Sequence[int], index: int) -> int:
    """The cheaper of the boundaries beside one; 0 without any."""
    beside = [costs[i] for i in (index - 1, index + 1) if 0 <= i < len(costs)]
    return min(beside, default=0)
