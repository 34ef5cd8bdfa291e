"""Axes of the values that the gradient builder adds without saying their types."""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from p2ptrain.graph.ir import INT64, Axis, Graph, Type, attribute, full_name
from p2ptrain.graph.views import product

LIKE_OPERANDS = (
    "Add", "Sub", "Mul", "Div", "Pow", "Sum", "Neg", "Exp", "Log", "Sqrt", "Sign", "Sin", "Cos",
    "Identity", "com.microsoft.Scale", "Relu", "Sigmoid", "Tanh", "Softmax", "LogSoftmax", "Erf",
)  # fmt: skip
COMPARISONS = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Not")
BOOL = int(onnx.TensorProto.BOOL)


def infer_missing(graph: Graph) -> None:
    """Add the types that follow from operators and known types; leave the others unknown."""
    producers = graph.producers()
    for node in graph.nodes:
        if node.op_type in ("LSTM", "GRU"):
            _type_recurrent(graph, node)
        if len(node.output) != 1 or node.output[0] in graph.types:
            continue
        known = _type_of(graph, producers, node)
        if known is not None:
            graph.types[node.output[0]] = known


def _type_recurrent(graph: Graph, node: onnx.NodeProto) -> None:
    known = graph.types.get(node.input[0])
    if known is None or node.input[1] not in graph.types:
        return
    steps, batch = known.axes[:2]
    last = (graph.axes(node.input[1])[0], batch, int(attribute(node, "hidden_size")))
    for index, name in enumerate(node.output):
        axes = last if index else (steps, last[0], batch, last[2])
        if name:
            graph.types.setdefault(name, Type(dtype=known.dtype, axes=axes))


def broadcast(shapes: Sequence[Sequence[Axis]]) -> tuple[Axis, ...]:
    """The axes of an elementwise result."""
    rank = max(map(len, shapes))
    result: list[Axis] = [1] * rank
    for axes in shapes:
        for index, axis in enumerate(axes, rank - len(axes)):
            if axis != 1:
                result[index] = axis
    return tuple(result)


def _type_of(
    graph: Graph, producers: dict[str, onnx.NodeProto], node: onnx.NodeProto
) -> Type | None:
    name = full_name(node)
    if name == "Shape" and node.input[0] in graph.types:
        return Type(dtype=INT64, axes=(len(graph.axes(node.input[0])),))
    if name == "Size":
        return Type(dtype=INT64, axes=())
    operands = [graph.types.get(given) for given in node.input if given]
    known = [operand for operand in operands if operand is not None]
    if not known or known[0] is not operands[0]:
        return None
    if name in LIKE_OPERANDS or name in COMPARISONS or name == "Where":
        if len(known) != len(operands):
            return None
        dtype = BOOL if name in COMPARISONS else known[-1].dtype
        shapes = [known[0].axes] if name.endswith("Scale") else [one.axes for one in known]
        return Type(dtype=dtype, axes=broadcast(shapes))
    if name in ("InstanceNormalization", "LayerNormalization", "BatchNormalization", "Trilu"):
        return known[0]
    if name == "Cast":
        return Type(dtype=int(attribute(node, "to")), axes=known[0].axes)
    axes = _moved(graph, producers, node, known)
    return None if axes is None else Type(dtype=known[0].dtype, axes=axes)


def _moved(
    graph: Graph,
    producers: dict[str, onnx.NodeProto],
    node: onnx.NodeProto,
    known: Sequence[Type],
) -> tuple[Axis, ...] | None:
    have = known[0].axes
    name = full_name(node)
    if name in ("ReduceSum", "ReduceMean"):
        return _reduced(graph, node, have)
    if name in ("Unsqueeze", "Squeeze"):
        return _squeezed(graph, node, have)
    if name in ("Reshape", "Expand"):
        sizes = _sizes(graph, producers, node.input[1])
        if sizes is None:
            return None
        return _reshaped(have, sizes) if name == "Reshape" else broadcast([have, sizes])
    if name in ("com.microsoft.FusedMatMul", "MatMul") and len(known) == 2:
        return _multiplied(node, have, known[1].axes)
    if name == "Transpose":
        order = attribute(node, "perm", list(reversed(range(len(have)))))
        return tuple(have[axis] for axis in order)
    return None


def _sizes(graph: Graph, producers: dict[str, onnx.NodeProto], name: str) -> list[Axis] | None:
    """The entries of an integer vector that is computed from shapes; None when not to be told."""
    if name in graph.constants:
        return [int(value) for value in graph.constants[name].ravel()]
    node = producers.get(name)
    if node is None:
        return None
    if node.op_type == "Shape":
        if node.input[0] not in graph.types:
            return None
        axes = graph.axes(node.input[0])
        return list(axes[attribute(node, "start", 0) : attribute(node, "end", len(axes))])
    parts = [_sizes(graph, producers, given) for given in node.input if given]
    known = [part for part in parts if part is not None]
    if len(known) != len(parts) or not known:
        return None
    return _combined(node, known)


def _combined(node: onnx.NodeProto, parts: Sequence[list[Axis]]) -> list[Axis] | None:
    kind = node.op_type
    numbers = [[axis for axis in part if isinstance(axis, int)] for part in parts[1:]]
    if kind == "Concat":
        return [axis for part in parts for axis in part]
    if kind == "Mul" and all(len(part) == 1 for part in parts):
        return [product([part[0] for part in parts])]
    if kind in ("Reshape", "Squeeze", "Unsqueeze", "Identity", "Cast"):
        return parts[0]
    if kind == "Gather" and len(numbers[0]) == 1:
        return [parts[0][numbers[0][0]]]
    if kind == "Slice" and len(parts) <= 4 and all(len(part) == 1 for part in numbers):
        return parts[0][numbers[0][0] : numbers[1][0]]
    return None


def _reduced(graph: Graph, node: onnx.NodeProto, have: Sequence[Axis]) -> tuple[Axis, ...] | None:
    taken = set(range(len(have)))
    if len(node.input) > 1 and node.input[1]:
        if node.input[1] not in graph.constants:
            return None
        taken = {int(axis) % len(have) for axis in graph.constants[node.input[1]]}
    if attribute(node, "keepdims", 1):
        return tuple(1 if i in taken else a for i, a in enumerate(have))
    return tuple(a for i, a in enumerate(have) if i not in taken)


def _squeezed(graph: Graph, node: onnx.NodeProto, have: Sequence[Axis]) -> tuple[Axis, ...] | None:
    over = graph.constants.get(node.input[1]) if len(node.input) > 1 else None
    if over is None:
        return None
    if node.op_type == "Squeeze":
        gone = {int(axis) % len(have) for axis in over.ravel()}
        return tuple(a for i, a in enumerate(have) if i not in gone)
    rank = len(have) + over.size
    new = {int(axis) % rank for axis in over.ravel()}
    rest = iter(have)
    return tuple(1 if i in new else next(rest) for i in range(rank))


def _reshaped(have: Sequence[Axis], want: Sequence[Axis]) -> tuple[Axis, ...] | None:
    result: list[Axis] = [have[i] if size == 0 else size for i, size in enumerate(want)]
    if -1 not in result:
        return tuple(result)
    left, divisor = list(have), 1
    for axis in result:
        if axis in left:
            left.remove(axis)
        elif axis != -1:
            divisor *= axis if isinstance(axis, int) else 0
    rest = product(left)
    if isinstance(rest, int) and divisor:
        rest //= divisor
    elif divisor != 1:
        return None
    result[result.index(-1)] = rest
    return tuple(result)


def _multiplied(
    node: onnx.NodeProto, left: Sequence[Axis], right: Sequence[Axis]
) -> tuple[Axis, ...] | None:
    if min(len(left), len(right)) < 2:
        return None
    rows = left[-1] if attribute(node, "transA", 0) else left[-2]
    columns = right[-2] if attribute(node, "transB", 0) else right[-1]
    return (*broadcast([left[:-2], right[:-2]]), rows, columns)
