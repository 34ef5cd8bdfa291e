"""What depends on what in a model's forward graph, and what is alive between its nodes.

Main values depend on the data's content and on a parameter (or on a mask): they are computed
once. Side values depend on the data alone: attention masks, positions given as data. Free values
depend on neither, or only on shapes and parameters. Side and free values are made again in every
segment that reads them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import onnx

from p2ptrain.bundle.manifest import DTYPES
from p2ptrain.graph.canonical import MASK_PREFIX
from p2ptrain.graph.costs import axis_size, node_flops
from p2ptrain.graph.ir import FLOAT, Graph, attribute, depth_first

VIEW_LIKE: Final = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"})
SIZES: Final = frozenset({"Shape", "Size"})
"""Operators that read a value's shape, not its content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """What the inputs of a graph are; masks are known by their names."""

    data: tuple[str, ...]
    late: tuple[str, ...]
    """Fed to the last segment only: labels and the loss weight."""
    trainable: tuple[str, ...]
    frozen: tuple[str, ...] = ()
    running: tuple[str, ...] = ()

    @property
    def parameters(self) -> tuple[str, ...]:
        return (*self.trainable, *self.frozen)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What an adapter adds to one linear: a matrix and its adapter live in the same segments, so
    that no cut may part what makes these values."""

    own: str
    """The linear's own result."""
    added: tuple[str, ...]
    """From the linear's input to what is added to its result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """The main nodes of a graph in order, and what each of them needs.

    Lists are by position in `order`; a cut at position p lies behind node p.
    """

    graph: Graph
    roles: Roles
    sizes: Mapping[str, int]
    """Of every symbol; `batch` is 1."""
    order: tuple[onnx.NodeProto, ...]
    main: frozenset[str]
    side: frozenset[str]
    late: frozenset[str]
    """What depends on labels or the loss weight."""
    trained: frozenset[str]
    """What depends on a trainable parameter."""
    alive: tuple[tuple[str, ...], ...]
    """Main values that later nodes read, without views of others, in the order they are made."""
    raw: tuple[frozenset[str], ...]
    """Data inputs whose content later nodes need beside main values."""
    border: tuple[frozenset[str], ...]
    """Side values that later main nodes read themselves."""
    symbols: tuple[frozenset[str], ...]
    """Symbols whose sizes later nodes ask for."""
    parameters: tuple[frozenset[str], ...]
    """Parameters that each node reads, directly or through free values."""
    changes: tuple[Change, ...] = ()
    """Of adapters."""

    def added(self) -> frozenset[str]:
        """Every value that is an adapter's alone."""
        return frozenset(name for change in self.changes for name in change.added)

    def torn(self) -> frozenset[int]:
        """Positions where a cut would part a linear from its adapter, or the adapter itself."""
        at = {name: p for p, node in enumerate(self.order) for name in node.output}
        found: set[int] = set()
        for change in self.changes:
            span = [at[name] for name in (change.own, *change.added) if name in at]
            found.update(range(min(span), max(span)) if span else ())
        return frozenset(found)

    def bytes_of(self, values: Iterable[str]) -> int:
        """Bytes of these values for one sample."""
        total = 0
        for name in values:
            known = self.graph.types[name]
            elements = 1
            for axis in known.axes:
                elements *= axis_size(axis, self.sizes)
            total += elements * DTYPES.get(known.dtype_name, 4)
        return total

    def flops(self, start: int, end: int) -> int:
        """Of the matrix products of the nodes from `start` to `end`, the latter excluded."""
        return sum(node_flops(self.graph, node, self.sizes) for node in self.order[start:end])

    def differentiable(self, name: str) -> bool:
        """Whether a cotangent of this value is of any use."""
        return name in self.trained and self.graph.types[name].dtype == FLOAT

    def first_late(self) -> int:
        """Position of the first node that needs labels or the loss weight."""
        for position, node in enumerate(self.order):
            if self.late.intersection(node.output):
                return position
        return len(self.order)


def analyse(
    graph: Graph, roles: Roles, sizes: Mapping[str, int], changes: tuple[Change, ...] = ()
) -> Flow:
    """Sort out the values of a canonical forward graph whose first output is the loss."""
    masks = {name for name in graph.inputs if name.startswith(MASK_PREFIX)}
    carriers = _reached(graph, {*roles.data, *roles.late, *masks})
    learned = _reached(graph, {*roles.parameters, *roles.running, *masks})
    main = frozenset(name for name in carriers & learned if name not in graph.inputs)
    side = carriers - main - masks
    order = _order(graph, main)
    walk = _Cones(graph=graph, main=main, side=side)
    needs = [walk.of(node) for node in order]
    return Flow(
        graph=graph,
        roles=roles,
        sizes=sizes,
        order=order,
        main=main,
        side=frozenset(side),
        late=frozenset(_reached(graph, set(roles.late))),
        trained=frozenset(_reached(graph, set(roles.trainable))),
        alive=_alive(graph, order, main),
        raw=_behind([frozenset(need.inputs) & frozenset(roles.data) for need in needs]),
        border=_behind([frozenset(need.border) for need in needs]),
        symbols=_behind([frozenset(need.symbols) for need in needs]),
        parameters=tuple(frozenset(need.inputs) & {*roles.parameters} for need in needs),
        changes=changes,
    )


def _reached(graph: Graph, roots: set[str]) -> set[str]:
    """What depends on the roots' content."""
    reached = set(roots)
    for node in graph.nodes:
        if node.op_type not in SIZES and reached.intersection(node.input):
            reached.update(name for name in node.output if name)
    return reached


def _order(graph: Graph, main: frozenset[str]) -> tuple[onnx.NodeProto, ...]:
    """Main nodes, each shortly before its first reader; what only running values need comes as
    early as it can."""
    behind_loss = Graph(nodes=list(graph.nodes), outputs=[graph.outputs[0]])
    depth_first(behind_loss)
    needed = [node for node in behind_loss.nodes if main.intersection(node.output)]
    known = {id(node) for node in needed}
    waiting = [n for n in graph.nodes if main.intersection(n.output) and id(n) not in known]
    made: set[str] = set()
    order: list[onnx.NodeProto] = []
    for node in needed:
        order.append(node)
        made.update(node.output)
        ready = True
        while ready:
            found = [n for n in waiting if all(i in made for i in n.input if i in main)]
            ready = bool(found)
            order += found
            made.update(name for other in found for name in other.output)
            taken = {id(other) for other in found}
            waiting = [other for other in waiting if id(other) not in taken]
    return tuple(order)


def _alive(
    graph: Graph, order: tuple[onnx.NodeProto, ...], main: frozenset[str]
) -> tuple[tuple[str, ...], ...]:
    """Which main values each position has to hand on; a view is made again from its source."""
    producers = {name: node for node in order for name in node.output if name}
    root: dict[str, str] = {}
    for node in order:
        for name in node.output:
            source = node.input[0] if node.op_type in VIEW_LIKE else ""
            root[name] = root[source] if source in producers else name
    last_read: dict[str, int] = {}
    for position, node in enumerate(order):
        for name in node.input:
            if name in main:
                last_read[root[name]] = position
    found: list[tuple[str, ...]] = []
    alive: list[str] = []
    for position, node in enumerate(order):
        alive += [name for name in node.output if root.get(name) == name and name in last_read]
        alive = [name for name in alive if last_read[name] > position]
        found.append(tuple(alive))
    return tuple(found)


@dataclass(slots=True, kw_only=True)
class _Need:
    """What a main node reads beside main values."""

    inputs: set[str] = field(default_factory=set)
    border: set[str] = field(default_factory=set)
    symbols: set[str] = field(default_factory=set)


@dataclass(slots=True, kw_only=True)
class _Cones:
    """Walks from main nodes up through side and free values; remembers each value's cone."""

    graph: Graph
    main: frozenset[str]
    side: set[str]
    _producers: dict[str, onnx.NodeProto] = field(default_factory=dict)
    _known: dict[str, _Need] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._producers = self.graph.producers()

    def of(self, node: onnx.NodeProto) -> _Need:
        """Needs of one main node; a value that it shares with others is a border of it."""
        need = _Need()
        for name in node.input:
            if name in self.main or not name:
                continue
            below = self._value(name)
            need.inputs |= below.inputs
            need.symbols |= below.symbols
            if name in self.side:
                need.border.add(name)
        return need

    def _value(self, name: str) -> _Need:
        """The cone of a value that is not main; deep graphs are walked without recursion."""
        stack = [name]
        while stack:
            current = stack[-1]
            node = self._producers.get(current)
            if current in self._known:
                stack.pop()
            elif node is None or node.op_type in SIZES:
                self._known[current] = self._leaf(current, node)
                stack.pop()
            else:
                below = [n for n in node.input if n and n not in self.main]
                waiting = [n for n in below if n not in self._known]
                stack += waiting
                if not waiting:
                    self._known[current] = _joined([self._known[n] for n in below])
                    stack.pop()
        return self._known[name]

    def _leaf(self, name: str, node: onnx.NodeProto | None) -> _Need:
        if node is None:
            return _Need(inputs={name} & set(self.graph.inputs))
        axes = asked_axes(self.graph, node)
        parts = {part for axis in axes if isinstance(axis, str) for part in axis.split("*")}
        return _Need(symbols={part for part in parts if not part.isdigit()})


def asked_axes(graph: Graph, shape: onnx.NodeProto) -> tuple[int | str, ...]:
    """The axes whose sizes a Shape or Size node gives."""
    axes = graph.axes(shape.input[0])
    if shape.op_type == "Size":
        return axes
    return axes[int(attribute(shape, "start", 0)) : int(attribute(shape, "end", len(axes)))]


def signature(flow: Flow, nodes: Sequence[onnx.NodeProto]) -> str:
    """Equal for nodes that do the same to values of the same shapes."""
    types = flow.graph.types
    told = hashlib.sha256()
    for node in nodes:
        attributes = sorted(a.SerializeToString(deterministic=True) for a in node.attribute)
        given = [(n in flow.graph.inputs, types[n].axes if n in types else n) for n in node.input]
        told.update(repr((node.domain, node.op_type, attributes, given)).encode())
    return told.hexdigest()


def _joined(needs: list[_Need]) -> _Need:
    return _Need(
        inputs=set().union(*(need.inputs for need in needs)),
        symbols=set().union(*(need.symbols for need in needs)),
    )


def _behind(sets: list[frozenset[str]]) -> tuple[frozenset[str], ...]:
    """For each position, the union of what comes after it."""
    found: list[frozenset[str]] = []
    seen: frozenset[str] = frozenset()
    for current in reversed(sets):
        found.append(seen)
        seen |= current
    return tuple(reversed(found))
