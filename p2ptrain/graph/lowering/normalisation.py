"""Softmax and the normalisations: row totals against the cotangent."""

from __future__ import annotations

import numpy as np
import onnx

from p2ptrain.graph.ir import FLOAT, INT64, attribute, make
from p2ptrain.graph.lowering.registry import Emitter, rule
from p2ptrain.graph.lowering.windows import fixed


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


@rule("SimplifiedLayerNormalization")
def simplified_layer_normalization(emit: Emitter, node: onnx.NodeProto) -> None:
    """inverse = 1 / sqrt(mean(x^2) + epsilon); y = x * inverse * scale (RMSNorm)."""
    x, scale = node.input
    axes = emit.graph.axes(x)
    axis = int(attribute(node, "axis", -1)) % len(axes)
    columns = range(axis, len(axes))
    row = [*axes[:axis], *[1] * len(columns)]
    square = emit.like("Mul", x, x)
    power = emit.op("ReduceMean", square, emit.integers(*columns), axes=row, keepdims=1)
    above = emit.like("Add", power, emit.scalar(float(attribute(node, "epsilon", 1e-5))))
    kept = node.output[1] if len(node.output) > 1 and node.output[1] else None
    inverse = emit.like("Reciprocal", emit.like("Sqrt", above), out=kept)
    emit.like("Mul", emit.like("Mul", x, inverse), scale, out=node.output[0])


@rule("com.microsoft.SimplifiedLayerNormalizationGrad")
def simplified_layer_normalization_grad(emit: Emitter, node: onnx.NodeProto) -> None:
    """With n = x * inverse: dscale = sum(dy * n), dx = inverse * (dy * scale - n * <dy*n*scale>).

    <.> is the mean of a row.
    """
    dy, x, scale, inverse = node.input
    axes = emit.graph.axes(x)
    axis = int(attribute(node, "axis", -1)) % len(axes)
    columns = range(axis, len(axes))
    normal = emit.like("Mul", x, inverse)
    slope = emit.like("Mul", dy, normal)
    if len(node.output) > 1 and node.output[1]:
        emit.total(slope, range(axis), out=node.output[1], keep=False)
    if not node.output[0]:
        return
    row = [*axes[:axis], *[1] * len(columns)]
    weighted = emit.like("Mul", slope, scale)
    along = emit.op("ReduceMean", weighted, emit.integers(*columns), axes=row, keepdims=1)
    centred = emit.like("Sub", emit.like("Mul", dy, scale), emit.like("Mul", normal, along))
    emit.like("Mul", centred, inverse, out=node.output[0])


@rule("com.microsoft.BatchNormInternal", every_form=True)
def batch_norm(emit: Emitter, node: onnx.NodeProto) -> None:
    """Over all axes but the second: inverse = 1 / sqrt(var + epsilon), var biased;

    y = (x - mean) * (scale * inverse) + bias. One BatchNormalization in training mode reads x for
    the mean, the variance and the result without a tensor in between; with momentum 0 its running
    values are the batch's own. The kernel writes these over the old ones, which the graph still
    reads: it is given values of its own.
    """
    x, scale, bias, *old = node.input
    y, mean, variance, saved, inverse = node.output
    epsilon = float(attribute(node, "epsilon", 1e-5))
    emit.nodes.append(
        make(
            "BatchNormalization",
            [x, scale, bias, *(emit.like("Neg", name) for name in old)],
            [y, mean, variance],
            epsilon=epsilon,
            momentum=0.0,
            training_mode=1,
        )
    )
    emit.like("Identity", mean, out=saved)
    above = emit.like("Add", variance, emit.scalar(epsilon))
    emit.like("Reciprocal", emit.like("Sqrt", above), out=inverse)
    wide = per_channel(emit, mean, x)
    emit.notes["batch_norm.centred", x] = emit.op("Sub", x, wide, axes=emit.graph.axes(x))


def per_channel(emit: Emitter, name: str, x: str) -> str:
    """A vector of channels that broadcasts along the second axis of x."""
    rank = len(emit.graph.axes(x))
    if rank == 2:
        return name
    axes = (*emit.graph.axes(name), *[1] * (rank - 2))
    return emit.op("Unsqueeze", name, emit.integers(*range(1, rank - 1)), axes=axes)


@rule("com.microsoft.BatchNormalizationGrad", every_form=True)
def batch_norm_grad(emit: Emitter, node: onnx.NodeProto) -> None:
    """With c = x - mean, n values per channel, and totals written [.] per channel:

    dbias = [dy], dscale = [dy * c] * inverse,
    dx = scale * inverse * (dy - c * inverse^2 * [dy * c] / n - [dy] / n).
    The factors of a channel are multiplied first; what a channel multiplies and adds is one
    BatchNormalization with constant mean and variance, a single pass over the tensor.
    """
    dy, x, scale, _, inverse = node.input
    axes, channels = emit.graph.axes(x), emit.graph.axes(scale)
    over = [i for i in range(len(axes)) if i != 1]
    centred = emit.notes["batch_norm.centred", x]
    kept = [node.output[i] if len(node.output) > i and node.output[i] else None for i in (1, 2)]
    total = emit.total(dy, over, out=kept[1], keep=False)
    along = emit.total(emit.like("Mul", dy, centred), over, out=None, keep=False)
    if kept[0]:
        emit.like("Mul", along, inverse, out=kept[0])
    if not node.output[0]:
        return
    gain = emit.like("Mul", scale, inverse)
    share = emit.like("Neg", emit.like("Mul", gain, reciprocal_count(emit, x)))
    slope = emit.like("Mul", emit.like("Mul", share, emit.like("Mul", inverse, inverse)), along)
    level = emit.like("Mul", share, total)
    count = [fixed(axis) for axis in channels]
    zeros, ones = (emit.graph.constant(np.full(count, v, np.float32)) for v in (0, 1))
    lowered = emit.op(
        "BatchNormalization", centred, slope, level, zeros, ones, axes=axes, epsilon=0.0
    )
    raised = emit.like("Mul", dy, per_channel(emit, gain, x))
    emit.like("Add", raised, lowered, out=node.output[0])


def reciprocal_count(emit: Emitter, x: str) -> str:
    """1 / (how many values a channel has), read from the run-time shape."""
    count = channel_count(emit, x)
    return emit.op("Reciprocal", count, axes=())


def channel_count(emit: Emitter, x: str) -> str:
    """How many values of x share a channel, float32."""
    size = emit.op("Size", x, axes=(), dtype=INT64)
    channels = emit.op("Squeeze", emit.size(x, 1), axes=(), dtype=INT64)
    count = emit.op("Div", size, channels, axes=(), dtype=INT64)
    return emit.op("Cast", count, axes=(), to=FLOAT)
