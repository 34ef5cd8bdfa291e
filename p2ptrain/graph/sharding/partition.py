"""From a segment's forward and backward graph to the one graph that a shard runs.

Hypotheses are tried: every linear over whole rows is divided at first, and every input that has
the sequence axis; what turns out not to pay or not to work is taken back, and the walk begins
again. The graph that is left serves every degree, even and uneven.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from p2ptrain.errors import GraphError
from p2ptrain.graph.ir import Axis, Graph, Type, apply_names, attribute, make
from p2ptrain.graph.shapes import infer_missing
from p2ptrain.graph.sharding.extents import extent
from p2ptrain.graph.sharding.families import Blocked, PortNeededWhole
from p2ptrain.graph.sharding.placements import Partial, Sliced
from p2ptrain.graph.sharding.sharder import COTANGENT, Sharder
from p2ptrain.graph.sharding.walk import give, walk
from p2ptrain.graph.split import Pair
from p2ptrain.graph.views import product, share_equal_nodes

GRADIENT: Final = "gradient."
POSITIONS: Final = "positions"
NO_LINEAR: Final = "it has no linear over whole rows whose columns could be divided"
NO_SEQUENCE: Final = "nothing that enters it is divided along a sequence"


class NotSharded(Exception):
    """A segment's graph allows no sharding; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What there is to know about a segment beside its graphs."""

    pair: Pair
    ports: Mapping[str, bool]
    """Input port -> whether it is differentiable."""
    fed: frozenset[str]
    """Those that the run feeds, data and labels: a shard may be given its slice."""
    outputs: Mapping[str, bool]
    parameters: tuple[str, ...]
    masks: tuple[str, ...]
    sequence: str | None
    """The symbol to slice; None: parameters are sliced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Elements per unit of each consecutive part of one axis."""

    units_of: str
    axis: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """A segment as one shard computes it."""

    graph: Graph
    """Forward and backward in one; collectives are nodes of this package's domain. Its types are
    those of a shard's values."""
    forward: frozenset[str]
    """Values that the forward makes."""
    units: dict[str, int]
    """Sliced axis -> its units; positions have none here, they are the sequence's."""
    slices: dict[str, Slice]
    """Of inputs and outputs."""
    summed: tuple[str, ...]
    """Parameters of whose gradients each shard has a term."""
    whole: dict[str, Type] = field(default_factory=dict)
    """The types of whole values by the names of their parts: what collectives work on."""


def joined(pair: Pair) -> tuple[Graph, frozenset[str]]:
    """Forward and backward as one graph, what both make made once; and what the forward makes."""
    graph = pair.forward.copy()
    backward = pair.backward.copy()
    ports = [name for name in graph.outputs if name not in pair.stash]
    graph.nodes += backward.nodes
    graph.constants |= backward.constants
    graph.types = {**backward.types, **graph.types}
    made = {name for node in pair.forward.nodes for name in node.output if name}
    graph.inputs |= {n: t for n, t in backward.inputs.items() if n not in made}
    graph.outputs = [*ports, *backward.outputs]
    _share_constants(graph)
    share_equal_nodes(graph)
    graph.prune()
    _infer_rows(graph)
    aside = {name: f"inner.{name}" for name in pair.stash}  # parts call what they keep so
    apply_names(graph, aside)
    return graph, frozenset(aside.get(name, name) for name in made)


def _infer_rows(graph: Graph) -> None:
    """Work out axes whose symbol no input has: `rows` of a lowered Gather says nothing here."""
    known = {symbol for given in graph.inputs.values() for axis in given.axes for symbol in
             extent(axis).symbols}  # fmt: skip
    for node in graph.nodes:
        for name in node.output:
            axes = graph.types[name].axes if name in graph.types else ()
            if any(set(extent(axis).symbols) - known for axis in axes):
                del graph.types[name]
    infer_missing(graph)
    _infer_picked(graph)


def _infer_picked(graph: Graph) -> None:
    """Axes of entries picked from shapes and joined, which no pass before had to know."""
    for node in graph.nodes:
        known = [graph.types.get(name) for name in node.input if name]
        first = known[0] if known and None not in known else None
        if first is None or node.output[0] in graph.types:
            continue
        axes: tuple[Axis, ...] | None = None
        if node.op_type == "Gather":
            axis = int(attribute(node, "axis", 0)) % len(first.axes)
            axes = (*first.axes[:axis], *graph.axes(node.input[1]), *first.axes[axis + 1 :])
        elif node.op_type == "Concat" and len(first.axes) == 1:
            sizes = [given.axes[0] for given in known if given is not None]
            numbers = [size for size in sizes if isinstance(size, int)]
            axes = (sum(numbers),) if len(numbers) == len(sizes) else None
        if axes is not None:
            graph.types[node.output[0]] = Type(dtype=first.dtype, axes=axes)


def _share_constants(graph: Graph) -> None:
    known: dict[tuple[str, tuple[int, ...], bytes], str] = {}
    names = {}
    for name, value in graph.constants.items():
        array = np.ascontiguousarray(value)
        names[name] = known.setdefault((str(array.dtype), value.shape, array.tobytes()), name)
    for node in graph.nodes:
        node.input[:] = [names.get(name, name) for name in node.input]


def partition(ask: Ask) -> Partition:
    """Find what can be sliced.

    Raises:
        NotSharded: nothing; the last hypothesis' reason is the text.
    """
    source, made = joined(ask.pair)
    refused: set[str] = set()
    whole: set[str] = set()
    reason = NO_LINEAR if ask.sequence is None else NO_SEQUENCE
    while True:
        sharder = _sharder(ask, source.copy(), frozenset(refused), whole)
        try:
            return _Attempt(ask=ask, sharder=sharder, made=made).run()
        except PortNeededWhole as wanted:
            whole |= wanted.names
        except Blocked as blocked:
            reason = blocked.reason
            starts = sharder.families.starts(blocked.family)
            if ask.sequence is not None or starts <= refused:
                raise NotSharded(reason) from blocked
            refused |= starts
        except _NoFamily as none:
            raise NotSharded(reason) from none
        except GraphError as error:
            raise NotSharded(error.message) from error


class _NoFamily(Exception):
    pass


def _sharder(ask: Ask, source: Graph, refused: frozenset[str], whole: set[str]) -> Sharder:
    free = set(ask.masks) if ask.sequence else {*ask.masks, *ask.parameters}
    differentiable = {name for name, flows in ask.ports.items() if flows}
    differentiable |= {f"{COTANGENT}{name}" for name, flows in ask.outputs.items() if flows}
    sharder = Sharder(
        source=source,
        sequence=ask.sequence,
        free=free & set(source.inputs),
        refused=refused,
        differentiable=frozenset(differentiable),
    )
    if ask.sequence is not None:
        family = sharder.families.start(ask.sequence)
        for name in source.inputs:
            port = name in ask.ports or name in differentiable
            place = _along(source, name, ask.sequence, family)
            comes_sliced = name in ask.fed or name in differentiable
            if port and place is not None and name not in whole and comes_sliced:
                sharder.settle_as(name, name, place)
    return sharder


def _along(graph: Graph, name: str, sequence: str, family: int) -> Sliced | None:
    axes = graph.axes(name)
    if axes.count(sequence) != 1:
        return None
    return Sliced(family=family, axis=axes.index(sequence), parts=(sequence,))


@dataclass(slots=True, kw_only=True)
class _Attempt:
    """One hypothesis, followed to the end."""

    ask: Ask
    sharder: Sharder
    made: frozenset[str]
    outputs: dict[str, str] = field(default_factory=dict)

    def run(self) -> Partition:
        s = self.sharder
        first = [n for n in s.source.nodes if self.made.intersection(n.output)]
        later = [n for n in s.source.nodes if not self.made.intersection(n.output)]
        walk(s, first)
        gradients = [name for name in s.source.outputs if name not in self.ask.outputs]
        for name in s.source.outputs:
            if name not in gradients:
                self.outputs[name] = give(s, name, self._port(name, self.ask.outputs.get(name)))
        forward = {name for node in s.made.nodes for name in node.output}
        walk(s, later)
        summed = [name for name in gradients if self._gradient(name)]
        s.free_inputs(s.source.inputs)
        names = self._name_families()
        self._fix_units(names)
        renamed = self._name_outputs()
        return Partition(
            graph=self._typed(names),
            forward=frozenset({*(renamed.get(name, name) for name in forward), *self.ask.outputs}),
            units={names[root]: s.families.units(root) for root in names},
            slices=self._slices(names),
            summed=tuple(name.removeprefix(GRADIENT) for name in summed),
            whole={n: s.source.types[value] for n, (value, _) in s.origin.items()},
        )

    def _port(self, name: str, differentiable: bool | None) -> Sliced | None:
        sequence = self.ask.sequence
        if sequence is None or not differentiable:
            return None
        return _along(self.sharder.source, name, sequence, 0)

    def _gradient(self, name: str) -> bool:
        """Give a gradient or cotangent; tells whether each shard has a term of it."""
        s = self.sharder
        if name.startswith(COTANGENT):
            want = self._port(name, differentiable=True)
            self.outputs[name] = give(s, name, want)
            return False
        place = s.place(name.removeprefix(GRADIENT))
        want = place if isinstance(place, Sliced) else None
        terms = s.sequence is not None
        self.outputs[name] = give(s, name, want, partial=terms)
        held = s.origin.get(self.outputs[name])
        return want is None and terms and held is not None and isinstance(held[1], Partial)

    def _name_families(self) -> dict[int, str]:
        """The families that are left, by root.

        Raises:
            Blocked: one has a single unit.
        """
        s = self.sharder
        used = {s.families.root(p.family) for p in s.places.values() if isinstance(p, Sliced)}
        if not used:
            raise _NoFamily
        names: dict[int, str] = {}
        for root in s.families.roots():
            if root not in used:
                continue
            if s.sequence is None and s.families.units(root) < 2:
                raise Blocked(root, "the sizes of what would be divided have no common unit")
            names[root] = POSITIONS if s.sequence else f"units{len(names)}"
        return names

    def _fix_units(self, names: Mapping[int, str]) -> None:
        """Put numbers in place of units, and names in place of families."""
        s = self.sharder
        for name, (family, size) in s.blocks.items():
            s.made.constants[name] = np.array([size // s.families.units(family)], np.int64)
        told = {
            f"shard.{what}.{root}": f"shard.{what}.{name}"
            for root, name in names.items()
            for what in ("start", "count", "all")
        }
        apply_names(s.made, told)

    def _name_outputs(self) -> dict[str, str]:
        """Give outputs their names; what had such a name and is none steps aside."""
        made = self.sharder.made
        produced = {name for node in made.nodes for name in node.output}
        names: dict[str, str] = {}
        again = []
        for output, held in self.outputs.items():
            if held == output:
                continue
            if output in produced:
                names[output] = f"{output}.before"
            if held in produced and held not in names and held not in self.outputs:
                names[held] = output
            else:
                again.append((held, output))
        apply_names(made, names)
        for held, output in again:
            made.nodes.append(make("Identity", [names.get(held, held)], [output]))
        origin = self.sharder.origin
        moved = {names.get(name, name): known for name, known in origin.items()}
        moved |= {output: origin[held] for held, output in again if held in origin}
        origin.clear()
        origin.update(moved)
        made.outputs = list(self.outputs)
        return names

    def _typed(self, names: Mapping[int, str]) -> Graph:
        """The made graph with the axes that a shard's values have."""
        s = self.sharder
        for name, (value, place) in s.origin.items():
            known = s.source.types[value]
            axes = known.axes
            if isinstance(place, Sliced):
                axes = self._local_axes(axes, place, names)
            s.made.types[name] = Type(dtype=known.dtype, axes=axes)
        for name in s.made.inputs:
            s.made.inputs[name] = s.made.types[name]
        return s.made

    def _local_axes(
        self, axes: tuple[Axis, ...], place: Sliced, names: Mapping[int, str]
    ) -> tuple[Axis, ...]:
        s = self.sharder
        name = names[s.families.root(place.family)]
        factors = axes[place.axis]
        if s.sequence is not None:
            local: Axis = product(
                [name if f == s.sequence else int(f) if f.isdigit() else f
                 for f in str(factors).split("*")]
            )  # fmt: skip
        else:
            units = s.families.units(place.family)
            size = sum(part for part in place.parts if isinstance(part, int)) // units
            local = product([place.lead, size, name])
        return (*axes[: place.axis], local, *axes[place.axis + 1 :])

    def _slices(self, names: Mapping[int, str]) -> dict[str, Slice]:
        s = self.sharder
        found = {}
        for name in (*s.made.inputs, *self.outputs):
            origin = s.origin.get(name)
            if origin is None or not isinstance(origin[1], Sliced):
                continue
            place = origin[1]
            if not isinstance(place.lead, int):
                raise Blocked(place.family, f"{name!r} is divided in pieces of a symbol's number")
            root = s.families.root(place.family)
            units = s.families.units(root)
            parts = [p // units if isinstance(p, int) else 1 for p in place.parts] * place.lead
            found[name] = Slice(units_of=names[root], axis=place.axis, blocks=tuple(parts))
        return found
