"""Forward operators that the builder lacks, written with operators that it knows.

Runs on the localised forward graph before it is differentiated; both forms keep the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import onnx

from p2ptrain.errors import GraphError
from p2ptrain.graph.einsum import einsum
from p2ptrain.graph.ir import INT64, Axis, Graph, attribute, full_name
from p2ptrain.graph.lowering.registry import Emitter, Rule
from p2ptrain.graph.lowering.windows import fixed
from p2ptrain.graph.planes import convolution
from p2ptrain.graph.recurrent import gru, lstm
from p2ptrain.graph.views import product

_DECOMPOSED: Final[dict[str, Rule]] = {
    "Conv": convolution,
    "Einsum": einsum,
    "GRU": gru,
    "LSTM": lstm,
}


def decomposition(name: str) -> Callable[[Rule], Rule]:
    """Register the decomposition of one operator."""

    def register(function: Rule) -> Rule:
        _DECOMPOSED[name] = function
        return function

    return register


def decomposition_names() -> tuple[str, ...]:
    """Every operator that is decomposed before the builder sees it."""
    return tuple(sorted(_DECOMPOSED))


def decompose(graph: Graph) -> None:
    """Replace in place every operator that has a decomposition."""
    emit = Emitter(graph=graph)
    for node in graph.nodes:
        found = _DECOMPOSED.get(full_name(node))
        if found is None:
            emit.nodes.append(node)
        else:
            found(emit, node)
    graph.nodes = emit.nodes
    graph.prune()


@decomposition("Sum")
def _sum(emit: Emitter, node: onnx.NodeProto) -> None:
    """Additions, first to last."""
    _fold(emit, "Add", list(node.input), node.output[0])


def _fold(emit: Emitter, kind: str, names: list[str], out: str) -> None:
    axes = emit.graph.axes(out)
    total = names[0]
    for index, name in enumerate(names[1:]):
        last = index == len(names) - 2
        total = emit.op(kind, total, name, axes=axes, out=out if last else None)
    if len(names) == 1:
        emit.like("Identity", total, out=out)


@decomposition("Mean")
def _mean(emit: Emitter, node: onnx.NodeProto) -> None:
    """The sum over how many there are."""
    total = emit.graph.fresh("sum")
    emit.graph.types[total] = emit.graph.types[node.output[0]]
    _fold(emit, "Add", list(node.input), total)
    emit.like("Mul", total, emit.scalar(1.0 / len(node.input)), out=node.output[0])


@decomposition("Pow")
def _pow(emit: Emitter, node: onnx.NodeProto) -> None:
    """Small constant exponents as products, roots and reciprocals; others stay."""
    x, exponent = node.input
    known = emit.graph.constants.get(exponent)
    value = float(known.item()) if known is not None and known.size == 1 else None
    out = node.output[0]
    if value == 2.0:
        emit.like("Mul", x, x, out=out)
    elif value == 3.0:
        emit.like("Mul", emit.like("Mul", x, x), x, out=out)
    elif value == 1.0:
        emit.like("Identity", x, out=out)
    elif value == 0.5:
        emit.like("Sqrt", x, out=out)
    elif value == -0.5:
        emit.like("Reciprocal", emit.like("Sqrt", x), out=out)
    elif value == -1.0:
        emit.like("Reciprocal", x, out=out)
    else:
        emit.nodes.append(node)


def _reduced_axes(emit: Emitter, node: onnx.NodeProto) -> list[int]:
    """The axes that a reduction takes; all of them when it names none."""
    rank = len(emit.graph.axes(node.input[0]))
    over = emit.graph.constants.get(node.input[1]) if len(node.input) > 1 else None
    if over is None:
        return list(range(rank))
    return sorted({int(axis) % rank for axis in over.ravel()})


@decomposition("ReduceL1")
def _reduce_l1(emit: Emitter, node: onnx.NodeProto) -> None:
    """The sum of absolute values."""
    _sum_of(emit, node, emit.like("Abs", node.input[0]), node.output[0])


@decomposition("ReduceSumSquare")
def _reduce_sum_square(emit: Emitter, node: onnx.NodeProto) -> None:
    """The sum of squares."""
    x = node.input[0]
    _sum_of(emit, node, emit.like("Mul", x, x), node.output[0])


def _sum_of(emit: Emitter, node: onnx.NodeProto, value: str, out: str) -> None:
    over = _reduced_axes(emit, node)
    keep = bool(attribute(node, "keepdims", 1))
    emit.total(value, over, out=out, keep=keep)


@decomposition("ReduceL2")
@decomposition("ReduceLogSumExp")
def _stated_axes(emit: Emitter, node: onnx.NodeProto) -> None:
    """The same with its axes stated: the builder fails where they are left out."""
    over = emit.integers(*_reduced_axes(emit, node))
    keep = int(attribute(node, "keepdims", 1))
    out = node.output[0]
    emit.op(node.op_type, node.input[0], over, axes=emit.graph.axes(out), out=out, keepdims=keep)


@decomposition("GlobalMaxPool")
def _global_max_pool(emit: Emitter, node: onnx.NodeProto) -> None:
    """The largest of each channel."""
    axes = emit.graph.axes(node.output[0])
    over = emit.integers(*range(2, len(axes)))
    emit.op("ReduceMax", node.input[0], over, axes=axes, out=node.output[0], keepdims=1)


@decomposition("MaxPool")
def _max_pool(emit: Emitter, node: onnx.NodeProto) -> None:
    """The same, with the indices that its gradient reads."""
    if len(node.output) == 1:
        node.output.append(emit.graph.fresh("indices"))
    known = emit.graph.types[node.output[0]]
    emit.graph.types[node.output[1]] = type(known)(dtype=INT64, axes=known.axes)
    emit.nodes.append(node)


@decomposition("LayerNormalization")
def _layer_normalization(emit: Emitter, node: onnx.NodeProto) -> None:
    """The same with a bias: the builder fails where it is left out."""
    if len(node.input) == 2:
        axes = emit.graph.axes(node.input[1])
        node.input.append(emit.graph.constant(np.zeros([fixed(a) for a in axes], np.float32)))
    emit.nodes.append(node)


@decomposition("InstanceNormalization")
def _instance_normalization(emit: Emitter, node: onnx.NodeProto) -> None:
    """Each channel of each image less its mean, over its deviation; then scale and bias."""
    x, scale, bias = node.input
    axes = emit.graph.axes(x)
    over = list(range(2, len(axes)))
    normal = _normalised(emit, x, over, float(attribute(node, "epsilon", 1e-5)))
    _scale_channels(emit, normal, scale, bias, node.output[0])


def _normalised(emit: Emitter, x: str, over: list[int], epsilon: float) -> str:
    axes = emit.graph.axes(x)
    row = [1 if i in over else axis for i, axis in enumerate(axes)]
    taken = emit.integers(*over)
    mean = emit.op("ReduceMean", x, taken, axes=row, keepdims=1)
    centred = emit.like("Sub", x, mean)
    square = emit.like("Mul", centred, centred)
    variance = emit.op("ReduceMean", square, taken, axes=row, keepdims=1)
    deviation = emit.like("Sqrt", emit.like("Add", variance, emit.scalar(epsilon)))
    return emit.like("Mul", centred, emit.like("Reciprocal", deviation))


def _scale_channels(emit: Emitter, x: str, scale: str, bias: str, out: str) -> None:
    rank = len(emit.graph.axes(x))
    wide = [
        emit.op(
            "Unsqueeze",
            name,
            emit.integers(*range(1, rank - 1)),
            axes=(*emit.graph.axes(name), *[1] * (rank - 2)),
        )
        for name in (scale, bias)
    ]
    emit.like("Add", emit.like("Mul", x, wide[0]), wide[1], out=out)


@decomposition("BatchNormalization")
def _frozen_batch_normalization(emit: Emitter, node: onnx.NodeProto) -> None:
    """With running values, which nobody differentiates: one factor and one term per channel."""
    x, scale, bias, mean, variance = node.input
    if attribute(node, "training_mode", 0):
        raise GraphError(
            f"BatchNormalization in training mode makes {node.output[0]!r}",
            hint="canonicalise_batch_norm has to run on the model's graph first",
        )
    above = emit.like("Add", variance, emit.scalar(float(attribute(node, "epsilon", 1e-5))))
    factor = emit.like("Div", scale, emit.like("Sqrt", above))
    term = emit.like("Sub", bias, emit.like("Mul", mean, factor))
    if len(emit.graph.axes(x)) == 2:
        emit.like("Add", emit.like("Mul", x, factor), term, out=node.output[0])
    else:
        _scale_channels(emit, x, factor, term, node.output[0])


@decomposition("DepthToSpace")
def _depth_to_space(emit: Emitter, node: onnx.NodeProto) -> None:
    """Channels become squares of places (pixel shuffle)."""
    batch, depth, high, wide = emit.graph.axes(node.input[0])
    size = int(attribute(node, "blocksize"))
    left = fixed(depth) // (size * size)
    rows_last = attribute(node, "mode", b"DCR") == b"DCR"
    parts: list[Axis] = [batch, size, size, left, high, wide]
    order = [0, 3, 4, 1, 5, 2]
    if not rows_last:
        parts, order = [batch, left, size, size, high, wide], [0, 1, 4, 2, 5, 3]
    split = emit.view(node.input[0], parts)
    moved = emit.transpose(split, order)
    emit.view(moved, emit.graph.axes(node.output[0]), out=node.output[0])


@decomposition("MatMul")
def _matmul(emit: Emitter, node: onnx.NodeProto) -> None:
    """A vector as a matrix of one row or column; the builder knows matrices only."""
    left, right = node.input
    have, want = emit.graph.axes(left), emit.graph.axes(right)
    if min(len(have), len(want)) > 1:
        emit.nodes.append(node)
        return
    gone = []
    out = node.output[0]
    axes = list(emit.graph.axes(out))
    if len(want) == 1:
        right = emit.op("Unsqueeze", right, emit.integers(1), axes=(*want, 1))
        axes.append(1)
        gone.append(-1)
    if len(have) == 1:
        left = emit.op("Unsqueeze", left, emit.integers(0), axes=(1, *have))
        axes.insert(len(axes) - 1, 1)
        gone.append(-2)
    result = emit.op("MatMul", left, right, axes=axes)
    emit.op("Squeeze", result, emit.integers(*gone), axes=emit.graph.axes(out), out=out)


@decomposition("Resize")
def _resize(emit: Emitter, node: onnx.NodeProto) -> None:
    """Nearest-neighbour enlargement by whole numbers: each value repeated along each axis."""
    have, want = (emit.graph.axes(name) for name in (node.input[0], node.output[0]))
    spatial = [(fixed(a), fixed(b)) for a, b in zip(have[2:], want[2:], strict=True)]
    if attribute(node, "mode", b"nearest") != b"nearest" or any(b % a for a, b in spatial):
        raise GraphError(
            f"no gradient for Resize, which makes {node.output[0]!r}",
            hint="enlarge by a whole number with the nearest value, or use ConvTranspose",
        )
    wide: list[Axis] = [*have[:2]]
    grown: list[Axis] = [*have[:2]]
    for before, after in spatial:
        wide += [before, 1]
        grown += [before, after // before]
    over = emit.integers(*(3 + 2 * i for i in range(len(spatial))))
    parted = emit.op("Unsqueeze", node.input[0], over, axes=wide)
    repeats = [1, 1, *(n for a, b in spatial for n in (1, b // a))]
    shape = emit.integers(*repeats)
    repeated = emit.op("Expand", parted, shape, axes=grown)
    emit.view(repeated, want, out=node.output[0])


def _flat_classes(axes: tuple[Axis, ...]) -> Axis:
    return product([axes[0], *axes[2:]])


@decomposition("SoftmaxCrossEntropyLoss")
def _cross_entropy(emit: Emitter, node: onnx.NodeProto) -> None:
    """Logits (batch, classes, places) as (batch * places, classes)."""
    logits, labels = node.input[:2]
    axes = emit.graph.axes(logits)
    if len(axes) == 2:
        emit.nodes.append(node)
        return
    rows = _flat_classes(axes)
    last = emit.transpose(logits, [0, *range(2, len(axes)), 1])
    flat = emit.view(last, (rows, axes[1]))
    node.input[0], node.input[1] = flat, emit.view(labels, (rows,))
    if len(node.output) > 1:
        known = emit.graph.types[flat]
        emit.graph.types[node.output[1]] = known
    emit.nodes.append(node)
