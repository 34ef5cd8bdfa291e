"""Depthwise convolution of small planes as dense products over whole rows or planes.

A runtime convolves channel by channel and image by image: for planes of a few dozen values the
calls cost more than the arithmetic. Spread over its plane, the kernel of a channel becomes a matrix
that is mostly zeros, and one product serves all images. The gradients are made from this form.

Legend: N batch, C channels, K kernel taps, H x W a plane and U x V its results, X = H * W and
Y = U * V for planes of any rank.
"""

from __future__ import annotations

import itertools
from math import prod
from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray

from p2ptrain.graph.ir import attribute
from p2ptrain.graph.lowering.normalisation import per_channel
from p2ptrain.graph.lowering.registry import Emitter
from p2ptrain.graph.lowering.windows import Windows, fixed, windows

PLANE_MAX: Final = 64
"""Values of the largest plane that is spread: from 16 x 16 on the zeros cost more than the calls,
as measured in ARCHITECTURE.md."""


def convolution(emit: Emitter, node: onnx.NodeProto) -> None:
    """A depthwise convolution of small planes by rows, or by planes where it strides.

    Every other convolution stays as it is.
    """
    window = _small_depthwise(emit, node)
    if window is None:
        emit.nodes.append(node)
        return
    spread = _by_rows if window.rank == 2 and prod(window.strides) == 1 else _by_planes
    y, out = spread(emit, node, window), node.output[0]
    if len(node.input) > 2 and node.input[2]:
        emit.like("Add", y, per_channel(emit, node.input[2], y), out=out)
    else:
        emit.like("Identity", y, out=out)


def _small_depthwise(emit: Emitter, node: onnx.NodeProto) -> Windows | None:
    """The windows of a convolution with one input and one output channel per group, if its planes
    are small and of fixed size."""
    x, weight = (emit.graph.axes(name) for name in node.input[:2])
    results = emit.graph.axes(node.output[0])[2:]
    kernel = [axis for axis in weight[2:] if isinstance(axis, int)]
    depthwise = weight[:2] == (x[1], 1) and attribute(node, "group", 1) == x[1] != 1
    known = all(isinstance(axis, int) for axis in (*weight, *x[2:], *results))
    stated = attribute(node, "auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
    if not (depthwise and known and stated) or prod(kernel) == 1:
        return None
    window = windows(node, kernel, sizes=x[2:], results=results)
    return window if max(prod(window.sizes), prod(window.results)) <= PLANE_MAX else None


def _by_rows(emit: Emitter, node: onnx.NodeProto, window: Windows) -> str:
    """Rows as channels: a convolution along W from the H rows of a channel to its U rows.

    Laid out as (C, H, N, W), all images of a channel lie in one product of (U, H * taps) and
    (H * taps, N * V).
    """
    x = node.input[0]
    batch = emit.graph.axes(x)[0]
    channels, height, width = map(fixed, emit.graph.axes(x)[1:])
    up, across = window.results
    taps = window.kernel[1]
    kernels = _spread_weight(emit, node, tap_rows(window), (up, height, taps))
    dense = emit.view(kernels, (channels * up, height, 1, taps))
    laid = emit.transpose(x, [1, 2, 0, 3])
    moved = emit.op(
        "Conv",
        emit.view(laid, (1, channels * height, batch, width)),
        dense,
        axes=(1, channels * up, batch, across),
        kernel_shape=[1, taps],
        dilations=[1, window.dilations[1]],
        pads=[0, window.pads[1], 0, window.pads[3]],
        group=channels,
    )
    return emit.transpose(emit.view(moved, (channels, up, batch, across)), [2, 0, 1, 3])


def _by_planes(emit: Emitter, node: onnx.NodeProto, window: Windows) -> str:
    """y[c] (N, Y) = x[c] (N, X) @ t[c] (X, Y), the batch moved inside the channels."""
    x = node.input[0]
    batch, channels = emit.graph.axes(x)[:2]
    values, results = prod(window.sizes), prod(window.results)
    planes = _spread_weight(emit, node, tap_planes(window), (values, results))
    by_channel = emit.transpose(emit.view(x, (batch, channels, values)), [1, 0, 2])
    product = emit.op("MatMul", by_channel, planes, axes=(channels, batch, results))
    by_image = emit.transpose(product, [1, 0, 2])
    return emit.view(by_image, (batch, channels, *window.results))


def _spread_weight(
    emit: Emitter, node: onnx.NodeProto, spread: NDArray[np.float32], axes: tuple[int, ...]
) -> str:
    """w (C, K) @ spread (K, ...) as (C, *axes)."""
    graph, weight = emit.graph, node.input[1]
    channels, taps = graph.axes(weight)[0], len(spread)
    constant = graph.constant(spread.reshape(taps, prod(axes)))
    rows = emit.view(weight, (channels, taps))
    product = emit.op("MatMul", rows, constant, axes=(channels, prod(axes)))
    return emit.view(product, (channels, *axes))


def tap_rows(window: Windows) -> NDArray[np.float32]:
    """(K, U, H, taps of a row): one where a tap of the kernel carries row h to row u."""
    height, width = window.kernel
    found = np.zeros((height, width, window.results[0], window.sizes[0], width), np.float32)
    for row, tap in itertools.product(range(window.results[0]), range(height)):
        value = row * window.strides[0] + tap * window.dilations[0] - window.begin(0)
        if 0 <= value < window.sizes[0]:
            found[tap, range(width), row, value, range(width)] = 1.0
    return found.reshape(height * width, *found.shape[2:])


def tap_planes(window: Windows) -> NDArray[np.float32]:
    """(K, *sizes, *results): one where a tap of the kernel carries a value to a result."""
    found = np.zeros((prod(window.kernel), *window.sizes, *window.results), np.float32)
    for result in itertools.product(*map(range, window.results)):
        for index, tap in enumerate(itertools.product(*map(range, window.kernel))):
            value = tuple(
                result[i] * window.strides[i] + tap[i] * window.dilations[i] - window.begin(i)
                for i in range(window.rank)
            )
            if all(0 <= value[i] < window.sizes[i] for i in range(window.rank)):
                found[(index, *value, *result)] = 1.0
    return found
