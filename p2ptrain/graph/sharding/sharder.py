"""One walk over a segment's graph: what each value is on a shard, and what leads there.

A `Sharder` holds the graph as it was (`source`), the one that a shard runs (`made`, with a node of
this module's own operators where shards speak to each other), and where each value is. The rules
of `rules.py` ask it for operands as they need them and tell it what came out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import onnx

from p2ptrain.graph.ir import INT64, Axis, Graph, Type, make
from p2ptrain.graph.sharding.extents import extent
from p2ptrain.graph.sharding.families import Blocked, Families, PortNeededWhole
from p2ptrain.graph.sharding.placements import (
    WHOLE,
    Partial,
    Placement,
    Sliced,
    Whole,
    reshaped,
)

DOMAIN: Final = "p2ptrain"
REDUCE, GATHER, SCATTER = "reduce", "gather", "scatter"
VIEWS: Final = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")
ALONG: Final = (*VIEWS, "Transpose", "Expand")
"""Operators that only move elements: a value is gathered before them, where it is smallest."""
START, COUNT, ALL = "start", "count", "all"
COTANGENT: Final = "cotangent."


@dataclass(slots=True, kw_only=True)
class Sharder:
    """The state of one walk."""

    source: Graph
    sequence: str | None
    """The symbol that is sliced everywhere; None: units of parameters are sliced instead."""
    free: set[str]
    """Inputs of which a shard may have a slice or all of it, whatever the first reader wants."""
    refused: frozenset[str] = frozenset()
    """Values whose makers must not start a family."""
    differentiable: frozenset[str] = frozenset()
    """Input ports and cotangents that are sliced where they come from."""
    families: Families = field(default_factory=Families)
    made: Graph = field(default_factory=Graph)
    places: dict[str, Placement] = field(default_factory=dict)
    origin: dict[str, tuple[str, Placement]] = field(default_factory=dict)
    """Every name of the made graph -> the source value it holds, and how."""
    blocks: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Placeholder constants -> (family, size): they become the size of one unit."""
    _forms: dict[tuple[str, str], str] = field(default_factory=dict)
    _producers: dict[str, onnx.NodeProto] = field(default_factory=dict)
    _readers: dict[str, int] = field(default_factory=dict)
    _integers: dict[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._producers = self.source.producers()
        for node in self.source.nodes:
            for name in node.input:
                self._readers[name] = self._readers.get(name, 0) + 1
        self.made.constants = dict(self.source.constants)
        self.made.types = dict(self.source.types)
        self.made.inputs = dict(self.source.inputs)

    # What is known of a value.

    def axes(self, name: str) -> tuple[Axis, ...]:
        """The axes of the whole value."""
        return self.source.axes(name)

    def place(self, name: str) -> Placement:
        """Where a value is; what is free or constant counts as whole."""
        return self.places.get(name, WHOLE)

    def is_free(self, name: str) -> bool:
        """Whether an input may still be either."""
        return name in self.free and name not in self.places

    def alone(self, name: str) -> bool:
        """Whether one node reads the value, and nothing else."""
        return self._readers.get(name, 0) == 1 and name not in self.source.outputs

    def producer(self, name: str) -> onnx.NodeProto | None:
        """The node that makes a value of the source."""
        return self._producers.get(name)

    # What comes out of a node.

    def put(self, node: onnx.NodeProto, inputs: Sequence[str], *places: Placement) -> None:
        """Emit a node of the source with these operands; its outputs are where `places` say."""
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        copied.input[:] = inputs
        self.made.nodes.append(copied)
        for name, place in zip((n for n in node.output if n), places, strict=True):
            self.settle_as(name, name, place)

    def settle_as(self, value: str, name: str, place: Placement) -> None:
        """Say that `name` of the made graph holds a value of the source, placed so."""
        if isinstance(place, Sliced):
            self.limit(place)
        if name == value:
            self.places[value] = place
        self.origin[name] = (value, place)
        self._forms[(value, _form(place))] = name

    def limit(self, place: Sliced) -> None:
        """Take what a slice says of its family's units."""
        for part in place.parts:
            if isinstance(part, int):
                self.families.limit(place.family, part)

    def emit(self, op: str, inputs: Sequence[str], like: str, **attributes: object) -> str:
        """A node of our own; gives its one output, typed as a value of the source is."""
        name = self.made.fresh("made")
        self.made.types[name] = self.source.types[like]
        self.made.nodes.append(make(op, inputs, [name], **attributes))
        return name

    def numbers(self, *values: int) -> str:
        """A constant vector of integers."""
        return self.made.constant(np.array(values, np.int64), "shape")

    def number(self, value: float) -> str:
        """A constant float32 scalar."""
        return self.made.constant(np.array(value, np.float32), "factor")

    def vector(self, op: str, inputs: Sequence[str], size: int, **attributes: object) -> str:
        """A node of our own that makes integers."""
        name = self.made.fresh("size")
        self.made.types[name] = Type(dtype=INT64, axes=(size,))
        self.made.nodes.append(make(op, inputs, [name], **attributes))
        return name

    # Operands as a rule wants them.

    def whole(self, name: str, why: str = "") -> str:
        """All of a value, by whatever it takes.

        Raises:
            Blocked: it is sliced, and gathering parameters' units is not worth it.
        """
        if self.is_free(name):
            self.settle_as(name, name, WHOLE)
        place = self.place(name)
        if isinstance(place, Whole):
            return self.held(name)
        known = self._forms.get((name, _form(WHOLE)))
        if known is not None:
            return known
        if isinstance(place, Partial):
            return self._collect(REDUCE, name, name, WHOLE)
        if self.sequence is None:
            raise Blocked(place.family, why or f"all of {name!r} is needed")
        self._refuse_gathering_ports(name)
        return self._gathered(name, place)

    def sliced(self, name: str, want: Sliced, why: str = "") -> str:
        """A slice of a value.

        Raises:
            Blocked: it is sliced otherwise, or its slices do not follow from slices of an input.
        """
        if self.is_free(name):
            self.settle_as(name, name, want)
            return name
        self.settled(name)
        place = self.place(name)
        if isinstance(place, Sliced) and place.alike(want):
            self.families.join(place.family, want.family)
            return self.held(name)
        if isinstance(place, Sliced) and self.sequence is None:
            raise Blocked(place.family, why or f"{name!r} would be divided in two ways")
        known = self._forms.get((name, _form(want)))
        return known if known is not None else self._cut(name, want)

    def settled(self, name: str) -> None:
        """Add a partial value up: whole, or scattered along the sequence where it has one."""
        place = self.place(name)
        if not isinstance(place, Partial):
            return
        axes = self.axes(name)
        if self.sequence is not None and self.sequence in axes:
            axis = axes.index(self.sequence)
            slice_ = Sliced(family=place.family, axis=axis, parts=(self.sequence,))
            self.places[name] = slice_
            self._collect(SCATTER, name, name, slice_, axis)
        else:
            self.places[name] = WHOLE
            self._collect(REDUCE, name, name, WHOLE)

    def held(self, name: str) -> str:
        """What the made graph calls a value where it is, after any settling."""
        return self._forms.get((name, _form(self.place(name))), name)

    def spread(self, name: str, place: Sliced) -> str:
        """Terms of a sum from slices: zeros where other shards have theirs."""
        after = self.vector("Sub", [self.size(ALL, place), self._end(place)], 1)
        pads = self.vector("Concat", [self.size(START, place), after], 2, axis=0)
        axis = self.numbers(place.axis)
        terms = self.emit("Pad", [self.held(name), pads, "", axis], name)
        self.settle_as(name, terms, Partial(family=place.family))
        return terms

    # Sizes that a shard is told.

    def size(self, what: str, place: Sliced) -> str:
        """Where a shard's units start, how many it has, or how many there are, in elements."""
        name = f"shard.{what}.{self.families.root(place.family)}"
        if name not in self.made.inputs:
            self.made.inputs[name] = self.made.types[name] = Type(dtype=INT64, axes=(1,))
        (part,) = place.parts
        if part == self.sequence:
            return name
        return self.vector("Mul", [name, self._unit(place.family, part)], 1)

    def dimension(self, axis: Axis, family: int) -> str:
        """The size of an axis of a whole value as a vector of one, read at run time.

        Raises:
            Blocked: no input tells it.
        """
        if isinstance(axis, int):
            return self.numbers(axis)
        whole = extent(axis)
        factors = [self._symbol(symbol, family) for symbol in whole.symbols.elements()]
        if whole.number != 1:
            factors.append(self.numbers(whole.number))
        size = factors[0]
        for factor in factors[1:]:
            size = self.vector("Mul", [size, factor], 1)
        return size

    def _symbol(self, symbol: str, family: int) -> str:
        if symbol == self.sequence:
            name = f"shard.{ALL}.0"
            self.made.inputs[name] = self.made.types[name] = Type(dtype=INT64, axes=(1,))
            return name
        for name in self.source.inputs:
            place = self.places.get(name)
            known = place is not None or name not in self.free
            for index, axis in enumerate(self.axes(name) if known else ()):
                sliced_here = isinstance(place, Sliced) and place.axis == index
                if axis == symbol and not sliced_here and not name.startswith(COTANGENT):
                    return self.vector("Shape", [name], 1, start=index, end=index + 1)
        raise Blocked(family, f"no input tells the size {symbol!r}")

    def _unit(self, family: int, size: Axis) -> str:
        if not isinstance(size, int):
            raise Blocked(family, f"an axis {size!r} has no fixed unit")
        name = self.made.fresh("unit")
        self.made.constants[name] = np.array([size], np.int64)
        self.made.types[name] = Type(dtype=INT64, axes=(1,))
        self.blocks[name] = (family, size)
        return name

    def _end(self, place: Sliced) -> str:
        return self.vector("Add", [self.size(START, place), self.size(COUNT, place)], 1)

    # How one placement is made from another.

    def _cut(self, name: str, want: Sliced) -> str:
        """A slice of what every shard has, cut where the sliced factor is an axis of its own."""
        if want.plain and not (self.sequence and want.parts != (self.sequence,)):
            axis = self.numbers(want.axis)
            bounds = [self.size(START, want), self._end(want), axis]
            cut = self.emit("Slice", [self.whole(name), *bounds], name)
        else:
            cut = self._cut_before(name, want)
        self.settle_as(name, cut, want)
        return cut

    def _cut_before(self, name: str, want: Sliced) -> str:
        """The slice of what the value is a view of, then the view."""
        node = self._producers.get(name)
        view = node if node is not None and node.op_type in VIEWS else None
        axes = self.axes(name)
        before = None if view is None else reshaped(want, axes, self.axes(view.input[0]))
        if view is not None and before is not None:
            return self.viewed(view, self.sliced(view.input[0], before), want)
        behind = [axis for axis in axes[want.axis + 1 :] if isinstance(axis, int)]
        if len(behind) < len(axes) - want.axis - 1 or want.parts != (self.sequence,):
            raise Blocked(want.family, f"{name!r} cannot be cut into the slices that are needed")
        return self._cut_apart(name, want, behind)

    def _cut_apart(self, name: str, want: Sliced, behind: Sequence[int]) -> str:
        """The slice of a factor that others are merged before: told apart, cut, merged again."""
        lead = [0] * want.axis
        parts = [self.numbers(*lead, -1), self.size(ALL, want)]
        parts += [self.numbers(*behind)] if behind else []
        rank = len(self.axes(name)) + 1
        apart = self.vector("Concat", parts, rank, axis=0)
        wide = self.emit("Reshape", [self.whole(name), apart], name)
        bounds = [self.size(START, want), self._end(want), self.numbers(want.axis + 1)]
        cut = self.emit("Slice", [wide, *bounds], name)
        return self.emit("Reshape", [cut, self.numbers(*lead, -1, *behind)], name)

    def viewed(self, node: onnx.NodeProto, operand: str, place: Sliced) -> str:
        """A view of a slice, under a new name."""
        inputs = [operand, *node.input[1:]]
        if node.op_type == "Reshape":
            inputs[1] = self.shape_of(node.output[0], node.input[0], place)
        elif node.op_type in ("Squeeze", "Unsqueeze") and len(node.input) > 1:
            inputs[1] = self.whole(node.input[1])
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        return self.emit(node.op_type, inputs, node.output[0], **attributes)

    def shape_of(self, target: str, source: str, place: Sliced) -> str:
        """The shape that a Reshape to a slice of `target` takes: -1 for the sliced axis."""
        have, want = self.axes(source), self.axes(target)
        parts: list[str] = []
        plain: list[int] = []
        before = self.place(source)
        cut = before.axis if isinstance(before, Sliced) else -1
        for index, axis in enumerate(want):
            same = index < len(have) and have[index] == axis and index != cut
            if index == place.axis:
                plain.append(-1)
            elif isinstance(axis, int):
                plain.append(axis)
            elif same:
                plain.append(0)
            else:
                parts += [self.numbers(*plain)] if plain else []
                parts.append(self.dimension(axis, place.family))
                plain = []
        parts += [self.numbers(*plain)] if plain else []
        return parts[0] if len(parts) == 1 else self.vector("Concat", parts, len(want), axis=0)

    def _gathered(self, name: str, place: Sliced) -> str:
        """All of a value that is sliced along the sequence, gathered before views of it."""
        node = self._producers.get(name)
        if node is not None and node.op_type in ALONG:
            above = self.place(node.input[0])
            if isinstance(above, Sliced) and self._pure(node.input[0], above):
                operand = self.whole(node.input[0])
                inputs = [operand, *(self.whole(other) for other in node.input[1:])]
                attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
                made = self.emit(node.op_type, inputs, name, **attributes)
                self.settle_as(name, made, WHOLE)
                return made
        if not self._pure(name, place):
            raise Blocked(place.family, f"the slices of {name!r} are not one run each")
        return self._collect(GATHER, self.held(name), name, WHOLE, place.axis)

    def _pure(self, name: str, place: Sliced) -> bool:
        return place.lead == 1 and self.axes(name)[place.axis] == self.sequence

    def _collect(self, what: str, held: str, name: str, place: Placement, axis: int = 0) -> str:
        got = self.emit(what, [held], name, domain=DOMAIN, axis=axis)
        self.settle_as(name, got, place)
        return got

    def _refuse_gathering_ports(self, name: str) -> None:
        """Rather have an input whole than gather what is made of nothing else."""
        above = self._sliced_inputs(name, set())
        if above and above.isdisjoint(self.differentiable):
            raise PortNeededWhole(frozenset(above))

    def _sliced_inputs(self, name: str, seen: set[str]) -> set[str]:
        if name in seen or not isinstance(self.place(name), Sliced):
            return set()
        seen.add(name)
        node = self._producers.get(name)
        if node is None:
            return {name}
        return {port for above in node.input for port in self._sliced_inputs(above, seen)}

    def free_inputs(self, names: Iterable[str]) -> None:
        """Let inputs that nobody read be whole."""
        for name in names:
            if self.is_free(name):
                self.settle_as(name, name, WHOLE)


def _form(place: Placement) -> str:
    """A key for one way to hold a value; families do not matter to it."""
    if isinstance(place, Sliced):
        return f"sliced {place.axis} {place.lead} {place.parts}"
    return "whole" if isinstance(place, Whole) else "partial"
