"""Pooling: the cotangent goes to the largest value, or in equal parts to the window."""

from __future__ import annotations

from math import prod

import numpy as np
import onnx

from p2ptrain.errors import GraphError
from p2ptrain.graph.ir import attribute
from p2ptrain.graph.lowering.registry import Emitter, rule
from p2ptrain.graph.lowering.windows import Windows, fixed, windows
from p2ptrain.graph.views import product


@rule("MaxPoolGrad", every_form=True)
def max_pool_grad(emit: Emitter, node: onnx.NodeProto) -> None:
    """dy added onto zeros at the flat indices that MaxPool gave (the first of equal values).

    onnxruntime-training's own kernel takes the sizes of its result from the graph when a session is
    made, so it cannot serve a free batch, and crashes (1.19.2) where the graph does not say them.
    """
    dy, indices = node.input
    graph = emit.graph
    have, target = graph.axes(dy), graph.axes(node.output[0])
    if int(attribute(node, "storage_order", 0)) != 0:
        raise GraphError("MaxPool that stores indices by columns has no rule")
    flat_dy = emit.view(dy, (product(have),))
    flat_indices = emit.view(indices, (product(have),))
    sizes = [emit.size(dy, 0), emit.integers(*map(fixed, target[1:]))]
    shape = emit.op("Concat", *sizes, axes=(len(target),), dtype=graph.types[indices].dtype, axis=0)
    zeros = emit.view(emit.op("ConstantOfShape", shape, axes=target), (product(target),))
    added = emit.op(
        "ScatterElements",
        zeros,
        flat_indices,
        flat_dy,
        axes=(product(target),),
        axis=0,
        reduction="add",
    )
    emit.view(added, target, out=node.output[0])


@rule("AveragePoolGrad", every_form=True)
def average_pool_grad(emit: Emitter, node: onnx.NodeProto) -> None:
    """Each window's share of dy, added up where windows overlap (ConvTranspose with ones).

    A value's share is dy over the size of the window, padding not counted unless the forward did.
    """
    dy = node.input[0]
    graph = emit.graph
    have, target = graph.axes(dy), graph.axes(node.output[0])
    kernel = [int(size) for size in attribute(node, "kernel_shape")]
    window = windows(node, kernel, sizes=target[2:], results=have[2:])
    planes = product(have[:2])
    share = emit.like("Mul", dy, graph.constant(1.0 / _counts(node, window)))
    flat = emit.view(share, (planes, 1, *have[2:]))
    ones = graph.constant(np.ones((1, 1, *kernel), np.float32))
    spread = emit.op(
        "ConvTranspose",
        flat,
        ones,
        axes=(planes, 1, *target[2:]),
        kernel_shape=kernel,
        strides=list(window.strides),
        pads=list(window.transposed_pads),
        output_padding=list(window.output_padding),
    )
    emit.view(spread, target, out=node.output[0])


def _counts(node: onnx.NodeProto, window: Windows) -> np.ndarray:  # float32, per window
    """How many values each window averages over."""
    if attribute(node, "count_include_pad", 0) or not any(window.pads):
        return np.float32(prod(window.kernel)) * np.ones((), np.float32)
    counts = np.ones((), np.float32)
    for index in range(len(window.kernel)):
        counts = np.multiply.outer(counts, window.real_values(index))
    return counts.astype(np.float32)
