"""The rules. Each says what it computes; its numeric test is `tests/numerics/test_lowering.py`."""

from __future__ import annotations

import math

import numpy as np
import onnx

from p2ptrain.errors import GraphError
from p2ptrain.graph.ir import FLOAT, INT64, Axis, attribute
from p2ptrain.graph.lowering.registry import Emitter, rule

_ROOT_HALF = math.sqrt(0.5)


@rule("com.microsoft.Gelu")
def gelu(emit: Emitter, node: onnx.NodeProto) -> None:
    """z = x / sqrt 2; gate = 1 + erf z; y = z * gate / sqrt 2; and the slope for later.

    dy/dx = (gate + 2 / sqrt pi * z exp(-z^2)) / 2. Both constant factors of a half, and that of
    z, fold into the matrix products beside them; the slope is made here, where z and gate are at
    hand: keeping z * gate and the slope costs what keeping x and y would, and leaves one product
    to the backward.
    """
    x = node.input[0]
    z = emit.like("Mul", x, emit.scalar(_ROOT_HALF))
    gate = emit.like("Add", emit.like("Erf", z), emit.scalar(1.0))
    emit.like("Mul", emit.like("Mul", z, gate), emit.scalar(_ROOT_HALF), out=node.output[0])
    height = emit.scalar(math.log(2.0 / math.sqrt(math.pi)))
    exponent = emit.op("Sub", height, emit.like("Mul", z, z), axes=emit.graph.axes(x))
    bell = emit.like("Mul", emit.like("Exp", exponent), z)
    emit.notes["gelu.slope", x] = emit.like("Add", bell, gate)


@rule("com.microsoft.GeluGrad")
def gelu_grad(emit: Emitter, node: onnx.NodeProto) -> None:
    """dx = dy / 2 * slope; the factor folds into the product that makes dy."""
    dy, x = node.input
    scaled = emit.like("Mul", dy, emit.scalar(0.5))
    emit.like("Mul", scaled, emit.notes["gelu.slope", x], out=node.output[0])


@rule("com.microsoft.FusedMatMul")
def fused_matmul(emit: Emitter, node: onnx.NodeProto) -> None:
    """alpha * op(A) @ op(B), with explicit Transposes of the last two axes."""
    if attribute(node, "transBatchA", 0) or attribute(node, "transBatchB", 0):
        raise GraphError("FusedMatMul with transposed batch axes has no rule")
    left = _transposed(emit, node.input[0]) if attribute(node, "transA", 0) else node.input[0]
    right = _transposed(emit, node.input[1]) if attribute(node, "transB", 0) else node.input[1]
    axes = (*emit.graph.axes(left)[:-1], emit.graph.axes(right)[-1])
    alpha = float(attribute(node, "alpha", 1.0))
    if alpha == 1.0:
        emit.op("MatMul", left, right, axes=axes, out=node.output[0])
        return
    result = emit.op("MatMul", left, right, axes=axes)
    emit.like("Mul", result, emit.scalar(alpha), out=node.output[0])


def _transposed(emit: Emitter, name: str) -> str:
    axes = emit.graph.axes(name)
    order = [*range(len(axes) - 2), len(axes) - 1, len(axes) - 2]
    return emit.op("Transpose", name, axes=[axes[i] for i in order], perm=order)


@rule("com.microsoft.SoftmaxGrad_13")
def softmax_grad(emit: Emitter, node: onnx.NodeProto) -> None:
    """dx = y * dy - y * sum(y * dy)."""
    dy, y = node.input
    weighted = emit.like("Mul", dy, y)
    total = emit.total(weighted, [int(attribute(node, "axis", -1))], out=None, keep=True)
    emit.like("Sub", weighted, emit.like("Mul", y, total), out=node.output[0])


@rule("com.microsoft.LogSoftmaxGrad_13")
def log_softmax_grad(emit: Emitter, node: onnx.NodeProto) -> None:
    """dx = dy - exp(y) * sum(dy)."""
    dy, y = node.input
    total = emit.total(dy, [int(attribute(node, "axis", -1))], out=None, keep=True)
    emit.like("Sub", dy, emit.like("Mul", emit.like("Exp", y), total), out=node.output[0])


@rule("com.microsoft.LayerNormalizationGrad")
def layer_normalization_grad(emit: Emitter, node: onnx.NodeProto) -> None:
    """With n = (x - mean) * inverse and g = dy * scale, row means written <.>:

    dscale = sum(dy * n), dbias = sum(dy), dx = inverse * (g - <g> - n * <g * n>).
    """
    dy, x, scale, mean, inverse = node.input
    axes = emit.graph.axes(x)
    axis = int(attribute(node, "axis", -1)) % len(axes)
    rows, columns = list(range(axis)), list(range(axis, len(axes)))
    normal = emit.like("Mul", emit.like("Sub", x, mean), inverse)
    slope = emit.like("Mul", dy, normal)
    if len(node.output) > 1 and node.output[1]:
        emit.total(slope, rows, out=node.output[1], keep=False)
    if len(node.output) > 2 and node.output[2]:
        emit.total(dy, rows, out=node.output[2], keep=False)
    if not node.output[0]:
        return
    row_axes = [*axes[:axis], *[1] * len(columns)]

    def row_mean(value: str) -> str:
        over = emit.integers(*columns)
        return emit.op("ReduceMean", value, over, axes=row_axes, keepdims=1)

    g = emit.like("Mul", dy, scale)
    along = row_mean(emit.like("Mul", slope, scale))
    centred = emit.like("Sub", emit.like("Sub", g, row_mean(g)), emit.like("Mul", normal, along))
    emit.like("Mul", centred, inverse, out=node.output[0])


@rule("SoftmaxCrossEntropyLoss")
def cross_entropy(emit: Emitter, node: onnx.NodeProto) -> None:
    """Minus the sum of the labels' log-probabilities, zero where the label is ignored.

    The operator is standard, but LogSoftmax and a gather do the same in a seventh of the time
    (onnxruntime 1.19.2, 512 x 4096, one thread: 11 against 1.5 ms).
    """
    _refuse_unsummed(node)
    logits, label = node.input[:2]
    tokens, classes = emit.graph.axes(logits)
    known = len(node.output) > 1 and node.output[1]
    log_probability = emit.op(
        "LogSoftmax", logits, axes=(tokens, classes), out=node.output[1] if known else None, axis=1
    )
    column, skip = _label_column(emit, node, label, tokens)
    picked = emit.op("GatherElements", log_probability, column, axes=(tokens, 1), axis=1)
    if skip is not None:
        picked = emit.op("Where", skip, emit.scalar(0.0), picked, axes=(tokens, 1))
    emit.like("Neg", emit.total(picked, [0, 1], out=None, keep=False), out=node.output[0])


@rule("com.microsoft.SoftmaxCrossEntropyLossGrad")
def cross_entropy_grad(emit: Emitter, node: onnx.NodeProto) -> None:
    """dlogits = (exp(log_probability) - one_hot(label)) * dy, zero where the label is ignored."""
    _refuse_unsummed(node)
    dy, log_probability, label = node.input[:3]
    axes = emit.graph.axes(log_probability)
    column, skip = _label_column(emit, node, label, axes[0])
    if skip is not None:
        weight = emit.op("Where", skip, emit.scalar(0.0), dy, axes=(axes[0], 1))
    else:
        weight = emit.op("Expand", dy, _shape_of(emit, column), axes=(axes[0], 1))
    spread = emit.like("Mul", emit.like("Exp", log_probability), weight)
    emit.op(
        "ScatterElements",
        spread,
        column,
        emit.like("Neg", weight),
        axes=axes,
        out=node.output[0],
        axis=1,
        reduction="add",
    )


def _refuse_unsummed(node: onnx.NodeProto) -> None:
    weighted = len(node.input) > 3 if node.domain else len(node.input) > 2
    if weighted or attribute(node, "reduction", b"mean") != b"sum":
        raise GraphError(
            f"{node.op_type} with class weights or another reduction than sum has no rule",
            hint="sum the loss in the model; loss_weight divides it",
        )


def _label_column(
    emit: Emitter, node: onnx.NodeProto, label: str, tokens: Axis
) -> tuple[str, str | None]:
    """Labels of shape (tokens, 1) that are safe to index with, and where they are ignored."""
    axes = (tokens, 1)
    column = emit.op("Unsqueeze", label, emit.integers(1), axes=axes, dtype=INT64)
    ignored = attribute(node, "ignore_index")
    if ignored is None:
        return column, None
    boolean = int(onnx.TensorProto.BOOL)
    label_ignored = emit.graph.constant(np.array(int(ignored), np.int64))
    skip = emit.op("Equal", column, label_ignored, axes=axes, dtype=boolean)
    zero = emit.graph.constant(np.array(0, np.int64))
    return emit.op("Where", skip, zero, column, axes=axes, dtype=INT64), skip


def _shape_of(emit: Emitter, name: str) -> str:
    return emit.op("Shape", name, axes=(len(emit.graph.axes(name)),), dtype=INT64)


@rule("com.microsoft.GatherGrad")
def gather_grad(emit: Emitter, node: onnx.NodeProto) -> None:
    """Rows of dy added onto zeros at their indices, one after the other (ScatterElements)."""
    shape, indices, dy = node.input
    if int(attribute(node, "axis", 0)) != 0:
        raise GraphError("GatherGrad along another axis than 0 has no rule")
    table = emit.graph.axes(node.output[0])
    index_rank = len(emit.graph.axes(indices))
    if len(table) != 2 or len(emit.graph.axes(dy)) != index_rank + 1:
        raise GraphError("GatherGrad of a table that is not two-dimensional has no rule")
    zeros = emit.op("ConstantOfShape", shape, axes=table)
    flat_dy = emit.op("Reshape", dy, emit.integers(-1, _int(table[1])), axes=("rows", table[1]))
    column = emit.op("Reshape", indices, emit.integers(-1, 1), axes=("rows", 1), dtype=INT64)
    every = emit.op(
        "Expand", column, _shape_of(emit, flat_dy), axes=("rows", table[1]), dtype=INT64
    )
    emit.op(
        "ScatterElements",
        zeros,
        every,
        flat_dy,
        axes=table,
        out=node.output[0],
        axis=0,
        reduction="add",
    )


def _int(axis: Axis) -> int:
    if isinstance(axis, str):
        raise GraphError(f"axis {axis!r} was expected to have a fixed size")
    return axis


@rule("com.microsoft.SliceGrad")
def slice_grad(emit: Emitter, node: onnx.NodeProto) -> None:
    """dy written onto zeros where the slice was taken; one sliced axis, any start, end and step."""
    dy, shape, starts, ends, axes_name, *steps = node.input
    graph = emit.graph
    axes = graph.constants.get(axes_name)
    if axes is None or axes.size != 1 or int(axes.item()) != 0:
        raise GraphError("SliceGrad over another axis than the first has no rule")
    table = graph.axes(node.output[0])
    length = emit.op("Gather", shape, graph.constant(np.array(0, np.int64)), axes=(), dtype=INT64)
    zero, one = (graph.constant(np.array(value, np.int64)) for value in (0, 1))
    every = emit.op("Range", zero, length, one, axes=(table[0],), dtype=INT64)
    kept = graph.axes(dy)[0]
    taken = emit.op("Slice", every, starts, ends, axes_name, *steps, axes=(kept,), dtype=INT64)
    rows = emit.op("Unsqueeze", taken, emit.integers(1), axes=(kept, 1), dtype=INT64)
    zeros = emit.op("ConstantOfShape", shape, axes=table)
    emit.op("ScatterND", zeros, rows, dy, axes=table, out=node.output[0])


@rule("com.microsoft.TanhGrad")
def tanh_grad(emit: Emitter, node: onnx.NodeProto) -> None:
    """dx = dy - dy * y * y."""
    dy, y = node.input
    product = emit.like("Mul", emit.like("Mul", dy, y), y)
    emit.like("Sub", dy, product, out=node.output[0])


@rule("com.microsoft.SigmoidGrad")
def sigmoid_grad(emit: Emitter, node: onnx.NodeProto) -> None:
    """dx = p - p * y with p = dy * y."""
    dy, y = node.input
    product = emit.like("Mul", dy, y)
    emit.like("Sub", product, emit.like("Mul", product, y), out=node.output[0])


@rule("com.microsoft.ReluGrad")
def relu_grad(emit: Emitter, node: onnx.NodeProto) -> None:
    """dx = dy where the output is positive, else 0."""
    dy, y = node.input
    boolean = int(onnx.TensorProto.BOOL)
    positive = emit.op("Greater", y, emit.scalar(0.0), axes=emit.graph.axes(y), dtype=boolean)
    emit.op("Where", positive, dy, emit.scalar(0.0), axes=emit.graph.axes(y), out=node.output[0])


@rule("com.microsoft.Scale")
def scale(emit: Emitter, node: onnx.NodeProto) -> None:
    """y = x * s, or x / s with scale_down."""
    kind = "Div" if attribute(node, "scale_down", 0) else "Mul"
    value, factor = node.input
    factor = emit.op("Cast", factor, axes=(), to=FLOAT)
    emit.like(kind, value, factor, out=node.output[0])
