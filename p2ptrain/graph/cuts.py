"""Cut a canonical forward graph into a chain of segments.

What crosses a cut: the main values that later nodes read, and beside them the data inputs (or
what follows from these alone) that later segments need to make masks and positions again. Sizes
are read from whatever crosses. Every value that crosses is `y`, `y1`, ... of one segment and
`x`, `x1`, ... of the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import onnx

from p2ptrain.errors import GraphError
from p2ptrain.graph.canonical import MASK_PREFIX
from p2ptrain.graph.flow import SIZES, Flow, asked_axes, signature
from p2ptrain.graph.ir import INT64, Axis, Graph, Type, apply_names, attribute, make
from p2ptrain.graph.source import LOSS

PORT_IN: Final = "x"
PORT_OUT: Final = "y"
NEW: Final = "new."
DERIVED_SHARE: Final = 2
"""Data inputs cross as they are, unless what is made of them has less than half of their bytes."""


def port_name(stem: str, index: int) -> str:
    """x, x1, x2, ...: the only port has no number."""
    return f"{stem}{index}" if index else stem


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """The main nodes of one segment, from `start` up to `end`, the latter excluded."""

    start: int
    end: int
    enters: tuple[str, ...]
    leaves: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """What enters or leaves a segment: port name -> the model's value, in order."""

    values: dict[str, str]
    differentiable: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One segment cut out of the model, still with the model's parameter names."""

    graph: Graph
    """Inputs: ports, labels and loss weight, parameters, running values, masks. Outputs: ports,
    then new running values."""
    entering: Ports
    leaving: Ports
    span: Span
    late: tuple[str, ...]
    """Labels and loss weight, in the last segment."""
    trainable: tuple[str, ...]
    frozen: tuple[str, ...]
    running: tuple[str, ...]
    masks: tuple[str, ...]

    @property
    def parameters(self) -> tuple[str, ...]:
        return (*self.trainable, *self.frozen)


def cut(flow: Flow, cuts: Sequence[int]) -> tuple[Piece, ...]:
    """Cut behind the main nodes at these positions.

    Raises:
        GraphError: a size cannot be read from what crosses, or a data input has a port's name.
    """
    crossings = crossing_values(flow, cuts)
    pieces = []
    start, enters = 0, flow.roles.data
    for index, leaves in enumerate([*crossings, (flow.graph.outputs[0],)]):
        last = index == len(crossings)
        end = len(flow.order) if last else cuts[index] + 1
        span = Span(start=start, end=end, enters=enters, leaves=leaves)
        pieces.append(_piece(flow, flow.graph, span))
        start, enters = end, leaves
    return tuple(pieces)


def evaluation_piece(flow: Flow, evaluating: Graph, piece: Piece) -> Graph:
    """The same segment cut out of the model as it is evaluated: no masks, no new running values.

    Args:
        evaluating: The model's graph under the same value names, in evaluation form.
    """
    return _piece(flow, evaluating, piece.span, running=False).graph


def crossing_values(flow: Flow, cuts: Sequence[int]) -> list[tuple[str, ...]]:
    """What each cut hands on: main values as they are made, then data or what is made of it."""
    if not cuts:
        return []
    derived = [name for name in flow.border[cuts[0]] if name not in flow.late]
    raw = flow.raw[cuts[0]]
    cheaper = DERIVED_SHARE * flow.bytes_of(derived) < flow.bytes_of(raw)
    if any(flow.raw[c] and flow.border[c] & flow.late for c in cuts):
        cheaper = False  # what depends on labels too can only be made where the labels are
    order = {name: index for index, name in enumerate(flow.graph.types)}
    beside = [
        sorted(flow.border[p] - flow.late, key=order.__getitem__)
        if cheaper
        else [name for name in flow.roles.data if name in flow.raw[p]]
        for p in cuts
    ]
    _keep_alike(flow, cuts, beside)
    return [(*flow.alive[p], *more) for p, more in zip(cuts, beside, strict=True)]


def _keep_alike(flow: Flow, cuts: Sequence[int], beside: list[list[str]]) -> None:
    """Let a segment hand on what the equal one before it hands on, even if nobody needs it: the
    last of many equal blocks stays of their kind."""
    starts = [0, *(position + 1 for position in cuts)]
    handing: dict[str, list[str]] = {}
    for index, position in enumerate(cuts):
        told = signature(flow, flow.order[starts[index] : position + 1])
        before = beside[index - 1] if index else []
        main = flow.bytes_of(flow.alive[position])
        for name in handing.setdefault(told, beside[index]):
            if name in before and name not in beside[index] and flow.bytes_of([name]) <= main:
                beside[index] = [n for n in before if n in (*beside[index], name)]


def _piece(flow: Flow, whole: Graph, span: Span, *, running: bool = True) -> Piece:
    made = {name for node in flow.order[span.start : span.end] for name in node.output if name}
    state = [n for n in flow.graph.outputs[1:] if n in made] if running else []
    graph = _cone(whole, [*span.leaves, *state], stop=set(span.enters))
    first = span.enters == flow.roles.data
    _settle_sizes(flow, graph, span.enters, made)
    read = {name for node in graph.nodes for name in node.input} | set(span.leaves)
    entering = [name for name in span.enters if name in read or not first]
    names = [name if first else port_name(PORT_IN, i) for i, name in enumerate(entering)]
    ends = span.leaves == (flow.graph.outputs[0],)
    outputs = [LOSS if ends else port_name(PORT_OUT, i) for i in range(len(span.leaves))]
    _refuse_names(names, outputs)
    graph.types |= {name: flow.graph.types[name] for name in (*entering, *span.leaves)}
    _name_ports(graph, dict(zip(entering, names, strict=True)), span.leaves, outputs)
    graph.outputs = [*outputs, *state]
    others = [name for name in whole.inputs if name in read and name not in flow.roles.data]
    graph.inputs = {name: graph.types[name] for name in (*names, *others)}
    return Piece(
        graph=graph,
        entering=_ports(flow, names, entering),
        leaving=_ports(flow, outputs, span.leaves),
        span=span,
        late=tuple(name for name in flow.roles.late if name in others),
        trainable=tuple(name for name in flow.roles.trainable if name in others),
        frozen=tuple(name for name in flow.roles.frozen if name in others),
        running=tuple(name for name in flow.roles.running if name in others),
        masks=tuple(name for name in others if name.startswith(MASK_PREFIX)),
    )


def _ports(flow: Flow, names: Sequence[str], values: Sequence[str]) -> Ports:
    ports = dict(zip(names, values, strict=True))
    return Ports(
        values=ports,
        differentiable=frozenset(port for port, name in ports.items() if flow.differentiable(name)),
    )


def _cone(whole: Graph, outputs: Sequence[str], stop: set[str]) -> Graph:
    """A copy of the nodes that make `outputs`, without what lies above the values of `stop`."""
    needed = set(outputs)
    kept = []
    for node in reversed(whole.nodes):
        if any(name in needed and name not in stop for name in node.output):
            needed.update(name for name in node.input if name)
            copied = onnx.NodeProto()
            copied.CopyFrom(node)
            kept.append(copied)
    known = needed | stop | {name for node in kept for name in node.output}
    return Graph(
        inputs={name: kind for name, kind in whole.inputs.items() if name in needed},
        nodes=kept[::-1],
        constants={name: value for name, value in whole.constants.items() if name in needed},
        outputs=list(outputs),
        types={name: kind for name, kind in whole.types.items() if name in known},
    )


def _settle_sizes(flow: Flow, graph: Graph, enters: Sequence[str], made: set[str]) -> None:
    """Read the sizes of what lies outside the segment from what enters it."""
    nodes: list[onnx.NodeProto] = []
    present = {name for node in graph.nodes for name in node.output} & made | set(enters)
    for node in graph.nodes:
        source = node.input[0] if node.op_type in SIZES else ""
        if not source or source in present or source not in flow.main | flow.side:
            nodes.append(node)
        else:
            nodes += _sizes_from(flow, graph, node, enters)
    graph.nodes = nodes
    graph.prune()


def _sizes_from(
    flow: Flow, graph: Graph, node: onnx.NodeProto, enters: Sequence[str]
) -> list[onnx.NodeProto]:
    """Nodes that give what a Shape node gave, from the shapes of entering values.

    Raises:
        GraphError: no entering value has an axis that is needed.
    """
    axes = asked_axes(flow.graph, node)
    begin, end = int(attribute(node, "start", 0)), int(attribute(node, "end", len(axes)))
    types = flow.graph.types
    for name in enters:
        symbolic = node.op_type == "Shape" and any(isinstance(axis, str) for axis in axes)
        if symbolic and begin >= 0 and end >= 0 and types[name].axes[begin:end] == axes:
            return [make("Shape", [name], node.output, start=begin, end=end)]
    if node.op_type == "Shape" and all(isinstance(axis, int) for axis in axes):
        return [make("Identity", [graph.constant(np.array(axes, np.int64), "size")], node.output)]
    parts: list[str] = []
    nodes: list[onnx.NodeProto] = []
    for axis in axes:
        if isinstance(axis, int):
            parts.append(graph.constant(np.array([axis], np.int64), "size"))
            continue
        name, place = _holder(types, enters, axis, node.input[0])
        parts.append(_fresh(graph, "size"))
        nodes.append(make("Shape", [name], [parts[-1]], start=place, end=place + 1))
    if node.op_type == "Size":
        return [*nodes, *_multiplied(graph, parts, node.output[0])]
    return [*nodes, make("Concat", parts, node.output, axis=0)]


def _holder(
    types: Mapping[str, Type], enters: Sequence[str], axis: Axis, wanted: str
) -> tuple[str, int]:
    for name in enters:
        if name in types and axis in types[name].axes:
            return name, types[name].axes.index(axis)
    raise GraphError(
        f"the size {axis!r} of {wanted!r} is needed beyond a cut that no such axis crosses",
        hint="cut elsewhere",
    )


def _multiplied(graph: Graph, parts: Sequence[str], target: str) -> list[onnx.NodeProto]:
    """The product of several sizes, as the scalar that Size gives."""
    sizes = _fresh(graph, "size", len(parts))
    return [
        make("Concat", parts, [sizes], axis=0),
        make("ReduceProd", [sizes], [target], keepdims=0),
    ]


def _fresh(graph: Graph, stem: str, count: int = 1) -> str:
    name = graph.fresh(stem)
    while name in graph.types:
        name = graph.fresh(stem)
    graph.types[name] = Type(dtype=INT64, axes=(count,))
    return name


def _refuse_names(names: Sequence[str], outputs: Sequence[str]) -> None:
    clash = set(names) & set(outputs)
    if clash:
        raise GraphError(
            f"a data input has the name {clash.pop()!r}, which is kept for boundaries",
            hint="rename the argument of the model's forward",
        )


def _name_ports(
    graph: Graph, entering: Mapping[str, str], leaves: Sequence[str], outputs: Sequence[str]
) -> None:
    """Give the ports their names; what only passes through gets an output of its own."""
    leaving: dict[str, str] = {}
    passing = []
    for value, output in zip(leaves, outputs, strict=True):
        through = value in entering or value in leaving or value in graph.inputs
        if through:
            source = entering.get(value, leaving.get(value, value))
            passing.append(make("Identity", [source], [output]))
        else:
            leaving[value] = output
    ports = {*entering.values(), *outputs}
    values = {name for node in graph.nodes for name in node.output} | set(graph.constants)
    inner = values - set(entering) - set(leaving)
    aside = {name: f"{name}.inner" for name in inner & ports}
    types = {out: graph.types[value] for value, out in zip(leaves, outputs, strict=True)}
    apply_names(graph, {**aside, **leaving, **entering})
    graph.types.update(types)
    graph.nodes += passing


@dataclass(frozen=True, slots=True, kw_only=True)
class CutRow:
    """One segment and the cut behind it, as the exporter tells it."""

    segment: str
    kind: str
    flops: int
    """Forward, for one sample."""
    values: tuple[str, ...]
    """The model's names of what crosses to the next segment; empty after the last."""
    shapes: tuple[str, ...]
    bytes: int
    """Of these, for one sample."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CutReport:
    """What was cut, where and why; `notes` say what was joined."""

    rows: tuple[CutRow, ...]
    notes: tuple[str, ...] = field(default=())
