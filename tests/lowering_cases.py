"""One case or more for every lowering rule, each with its meaning in float64 numpy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from p2ptrain.graph.ir import MICROSOFT, make
from tests.lowering import Case, Shape, draw

erf = np.vectorize(math.erf)
Array = np.ndarray


def softmax(x: Array, axis: int = -1) -> Array:
    raised = np.exp(x - x.max(axis, keepdims=True))
    return raised / raised.sum(axis, keepdims=True)


def layer_norm(x: Array, scale: Array, bias: Array) -> Array:
    axes = tuple(range(-scale.ndim, 0))
    centred = x - x.mean(axes, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axes, keepdims=True) + 1e-5) * scale + bias


def rms_norm(x: Array, scale: Array) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale


def batch_norm(x: Array, scale: Array, bias: Array) -> Array:
    over = (0, *range(2, x.ndim))
    wide = (-1, *[1] * (x.ndim - 2))
    centred = x - x.mean(over, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(over, keepdims=True) + 1e-5)
    return normal * scale.reshape(wide) + bias.reshape(wide)


def cross_entropy(x: Array, labels: Array) -> Array:
    chosen = labels >= 0
    rows = np.arange(len(labels))[chosen]
    return -np.log(softmax(x))[rows, labels[chosen]].sum()


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def convolve(x: Array, w: Array, b: Array | None = None, **how: Any) -> Array:
    """Convolution over any number of axes, one tap at a time."""
    rank = x.ndim - 2
    strides, dilations = how.get("strides", [1] * rank), how.get("dilations", [1] * rank)
    pads, groups = how.get("pads", [0] * 2 * rank), how.get("group", 1)
    x = np.pad(x, [(0, 0), (0, 0), *((pads[i], pads[i + rank]) for i in range(rank))])
    spans = [(k - 1) * d + 1 for k, d in zip(w.shape[2:], dilations, strict=True)]
    sizes = [(n - s) // t + 1 for n, s, t in zip(x.shape[2:], spans, strides, strict=True)]
    y = np.zeros((x.shape[0], w.shape[0], *sizes))
    inputs, outputs = w.shape[1], w.shape[0] // groups
    for tap in itertools.product(*map(range, w.shape[2:])):
        window = tuple(
            slice(t * d, t * d + (n - 1) * s + 1, s)
            for t, d, n, s in zip(tap, dilations, sizes, strides, strict=True)
        )
        for g in range(groups):
            part = x[(slice(None), slice(g * inputs, (g + 1) * inputs), *window)]
            own = slice(g * outputs, (g + 1) * outputs)
            y[:, own] += np.einsum("nc...,oc->no...", part, w[(own, slice(None), *tap)])
    return y if b is None else y + b.reshape(-1, *[1] * rank)


def transposed(x: Array, w: Array, shape: tuple[int, ...], **how: Any) -> Array:
    """The transpose of `convolve` as a linear map, from its matrix."""
    size = math.prod(shape[1:])
    columns = [convolve(unit.reshape(1, *shape[1:]), w, **how).ravel() for unit in np.eye(size)]
    return (x.reshape(len(x), -1) @ np.stack(columns, 1)).reshape(len(x), *shape[1:])


def pooled(x: Array, kernel: Sequence[int], reduce: Callable[..., Any], **how: Any) -> Array:
    """Pooling over two axes, one window at a time."""
    strides, pads = how.get("strides", [1, 1]), how.get("pads", [0] * 4)
    edge = np.nan
    x = np.pad(x, [(0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])], constant_values=edge)
    sizes = [(x.shape[i + 2] - kernel[i]) // strides[i] + 1 for i in (0, 1)]
    y = np.zeros((*x.shape[:2], *sizes))
    for i, j in np.ndindex(*sizes):
        top, left = i * strides[0], j * strides[1]
        y[:, :, i, j] = reduce(x[:, :, top : top + kernel[0], left : left + kernel[1]], axis=(2, 3))
    return y


def same(*axes: int | str) -> dict[str, Shape]:
    return {"x": axes, "y": axes}


def unary(kind: str, lowers: str, meaning: Callable[[Array], Array], **how: Any) -> list[Case]:
    """An activation over two shapes."""
    node = make(kind, ["x"], ["y"], **how)
    return [
        Case(
            name=f"{kind}-{'x'.join(map(str, shape))}",
            lowers=lowers,
            nodes=[node],
            inputs={"x": draw(*shape)},
            meaning=meaning,
            types=same("batch", *shape[1:]),
        )
        for shape in ((4, 5), (2, 3, 4))
    ]


ACTIVATIONS: Final = [
    *unary(
        "Gelu", "com.microsoft.GeluGrad",
        lambda x: x * 0.5 * (1 + erf(x / math.sqrt(2))), domain=MICROSOFT,
    ),
    *unary("Gelu", "com.microsoft.Gelu",
           lambda x: x * 0.5 * (1 + erf(x / math.sqrt(2))), domain=MICROSOFT),
    *unary("Tanh", "com.microsoft.TanhGrad", lambda x: np.tanh(x)),
    *unary("Sigmoid", "com.microsoft.SigmoidGrad", sigmoid),
    *unary("Relu", "com.microsoft.ReluGrad", lambda x: np.maximum(x, 0)),
    *unary("LeakyRelu", "com.microsoft.LeakyReluGrad",
           lambda x: np.where(x > 0, x, 0.2 * x), alpha=0.2),
]  # fmt: skip


def normalised(shape: tuple[int, ...], axis: int) -> Case:
    row = ("batch", *shape[1:axis], *[1] * (len(shape) - axis))
    scale = draw(*shape[axis:], seed=4)
    return Case(
        name=f"layer_norm-{len(shape)}-{axis}",
        lowers="com.microsoft.LayerNormalizationGrad",
        nodes=[
            make("LayerNormalization", ["x", "scale", "bias"], ["y", "mean", "inverse"], axis=axis)
        ],
        inputs={"x": draw(*shape), "scale": scale, "bias": draw(*shape[axis:], seed=5)},
        meaning=layer_norm,
        wanted=("x", "scale", "bias"),
        types=same("batch", *shape[1:]) | {"mean": row, "inverse": row},
    )


def batch_normalised(*shape: int) -> Case:
    channels = shape[1]
    extra = ["old_mean", "old_variance", "mean", "inverse"]
    running = {"m": np.zeros(channels, np.float32), "v": np.ones(channels, np.float32)}
    return Case(
        name=f"batch_norm-{len(shape)}",
        lowers="com.microsoft.BatchNormalizationGrad",
        nodes=[make("BatchNormInternal", ["x", "scale", "bias", "m", "v"], ["y", *extra],
                    domain=MICROSOFT, training_mode=1)],
        inputs={"x": draw(*shape), "scale": draw(channels, seed=4), "bias": draw(channels, seed=5)},
        meaning=batch_norm,
        wanted=("x", "scale", "bias"),
        types=same("batch", *shape[1:]) | dict.fromkeys(extra, (channels,)),
        constants=running,
        trains=False,
    )  # fmt: skip


def rms(*shape: int, lowers: str) -> Case:
    return Case(
        name=f"rms_norm-{len(shape)}",
        lowers=lowers,
        nodes=[make("SimplifiedLayerNormalization", ["x", "scale"], ["y", "inverse"], axis=-1)],
        inputs={"x": draw(*shape), "scale": draw(shape[-1], seed=4)},
        meaning=rms_norm,
        wanted=("x", "scale"),
        types=same("batch", *shape[1:]) | {"inverse": ("batch", *shape[1:-1], 1)},
    )


NORMALISATIONS: Final = [
    normalised((2, 3, 6), 2),
    normalised((5, 4), 1),
    normalised((2, 3, 2, 3), 2),
    batch_normalised(4, 3, 2, 3),
    batch_normalised(6, 5),
    batch_normalised(3, 2, 4),
    rms(2, 3, 6, lowers="com.microsoft.SimplifiedLayerNormalizationGrad"),
    rms(4, 5, lowers="SimplifiedLayerNormalization"),
    *(
        Case(
            name=f"{kind}-{axis}",
            lowers=f"com.microsoft.{kind}Grad_13",
            nodes=[make(kind, ["x"], ["y"], axis=axis)],
            inputs={"x": draw(2, 3, 5)},
            meaning=lambda x, axis=axis, log=kind == "LogSoftmax": (
                np.log(softmax(x, axis)) if log else softmax(x, axis)
            ),
            types=same("batch", 3, 5),
        )
        for kind, axis in itertools.product(("Softmax", "LogSoftmax"), (-1, 1))
    ),
]


def matrices(x: tuple[int, ...], w: tuple[int, ...], x_axes: Shape, w_axes: Shape) -> Case:
    shape = (draw(*x) @ draw(*w)).shape
    axes = tuple("batch" if a == "batch" else n for a, n in zip(x_axes, shape, strict=False))
    return Case(
        name=f"matmul-{len(x)}-{len(w)}-{x[0]}",
        lowers="com.microsoft.FusedMatMul",
        nodes=[make("MatMul", ["x", "w"], ["y"])],
        inputs={"x": draw(*x), "w": draw(*w, seed=6)},
        meaning=lambda x, w: x @ w,
        wanted=("x", "w"),
        types={"x": x_axes, "w": w_axes, "y": axes},
    )


PRODUCTS: Final = [
    matrices((2, 3, 4), (2, 4, 5), ("batch", 3, 4), ("batch", 4, 5)),
    matrices((2, 3, 4), (4, 5), ("batch", 3, 4), (4, 5)),
    matrices((2, 2, 3, 4), (2, 4, 5), ("batch", 2, 3, 4), (2, 4, 5)),
]


def divided(x: Shape, w: Shape, sizes: dict[str, int]) -> Case:
    def real(axes: Shape) -> tuple[int, ...]:
        return tuple(sizes[a] if isinstance(a, str) else a for a in axes)

    return Case(
        name=f"div-{len(w)}-{'-'.join(map(str, w))}",
        lowers="com.microsoft.DivGrad",
        nodes=[make("Div", ["x", "w"], ["y"])],
        inputs={"x": draw(*real(x)), "w": draw(*real(w), seed=6) ** 2 + 1},
        meaning=lambda x, w: x / w,
        wanted=("x", "w"),
        types={"x": x, "w": w, "y": x},
    )


def mean(axes: list[int], keep: bool, shape: Shape) -> Case:
    return Case(
        name=f"reduce_mean-{axes}-{keep}",
        lowers="com.microsoft.Scale",
        nodes=[make("ReduceMean", ["x", "axes"], ["y"], keepdims=int(keep))],
        inputs={"x": draw(4, 6, 3)},
        meaning=lambda x: x.mean(tuple(axes), keepdims=keep),
        types={"x": ("batch", 6, 3), "y": shape},
        constants={"axes": np.array(axes)},
    )


BROADCASTING: Final = [
    divided(("batch", "s", 4), (4,), {"batch": 2, "s": 3}),
    divided(("batch", "s", 4), ("s", 1), {"batch": 2, "s": 3}),
    divided(("batch", "s", 4), ("batch", 1, 4), {"batch": 2, "s": 3}),
    divided(("batch", "s", 4), ("batch", "s", 4), {"batch": 2, "s": 3}),
    mean([-1], True, ("batch", 6, 1)),
    mean([1, 2], False, ("batch",)),
    mean([0], False, (6, 3)),
    Case(
        name="global_average", lowers="com.microsoft.Scale",
        nodes=[make("GlobalAveragePool", ["x"], ["y"])], inputs={"x": draw(2, 3, 4, 5)},
        meaning=lambda x: x.mean((2, 3), keepdims=True),
        types={"x": ("batch", 3, 4, 5), "y": ("batch", 3, 1, 1)},
    ),
]  # fmt: skip


def gathered(indices: Any, axis: int, shape: tuple[int, ...], *, constant: bool) -> Case:
    ids = np.array(indices, np.int64)
    x = draw(*shape)
    axes = ("batch", *shape[1:]) if axis else shape
    result = np.take(x, ids, axis).shape
    y = ("batch", *result[1:]) if axis else result
    return Case(
        name=f"gather-{axis}-{len(shape)}-{ids.ndim}-{constant}",
        lowers="com.microsoft.GatherGrad",
        nodes=[make("Gather", ["x", "ids"], ["y"], axis=axis)],
        inputs={"x": x} if constant else {"x": x, "ids": ids},
        meaning=lambda x, ids=ids: np.take(x, ids, axis),
        types={"x": axes, "y": y, "ids": ids.shape},
        constants={"ids": ids} if constant else {},
    )


def sliced(shape: tuple[int, ...], entries: list[tuple[int, int, int, int]]) -> Case:
    """Entries of axis, start, end, step."""
    cut: list[slice] = [slice(None)] * len(shape)
    for axis, start, end, step in entries:
        cut[axis] = slice(start, end, step)
    result = draw(*shape)[tuple(cut)].shape
    columns = zip(*entries, strict=True)
    names = ("axes", "starts", "ends", "steps")
    return Case(
        name=f"slice-{entries}",
        lowers="com.microsoft.SliceGrad",
        nodes=[make("Slice", ["x", "starts", "ends", "axes", "steps"], ["y"])],
        inputs={"x": draw(*shape)},
        meaning=lambda x: x[tuple(cut)],
        types={"x": ("batch", *shape[1:]) if 0 not in [e[0] for e in entries] else shape,
               "y": ("batch", *result[1:]) if 0 not in [e[0] for e in entries] else result},
        constants={n: np.array(c, np.int64) for n, c in zip(names, columns, strict=True)},
    )  # fmt: skip


INDEXING: Final = [
    gathered([[1, 5, 1], [0, 1, 6]], 0, (7, 3), constant=False),
    gathered([1, 5, 1], 0, (7, 3, 2), constant=False),
    gathered([[2, 0], [2, 1]], 1, (2, 3, 4), constant=True),
    gathered(1, 1, (2, 3, 4), constant=True),
    gathered([1, 2], 2, (2, 3, 4), constant=True),
    gathered([2, 0, 2], 1, (2, 3, 4), constant=True),
    sliced((7, 3), [(0, -6, 6, 2)]),
    sliced((3, 7), [(1, 2, 5, 1)]),
    sliced((3, 7), [(1, -3, 1 << 40, 1)]),
    sliced((3, 7, 4), [(1, 1, 6, 1), (2, 0, 2, 1)]),
    sliced((3, 7, 4), [(2, 1, 4, 2), (1, 6, 0, -2)]),
    Case(
        name="gather_nd", lowers="com.microsoft.GatherNDGrad",
        nodes=[make("GatherND", ["x", "ids"], ["y"])],
        inputs={"x": draw(3, 4, 5), "ids": np.array([[0, 1], [2, -1], [0, 1]])},
        meaning=lambda x, ids: x[ids[:, 0], ids[:, 1]],
        types={"x": ("batch", 4, 5), "ids": ("rows", 2), "y": ("rows", 5)},
    ),
    Case(
        name="gather_nd-whole", lowers="com.microsoft.GatherNDGrad",
        nodes=[make("GatherND", ["x", "ids"], ["y"])],
        inputs={"x": draw(3, 4), "ids": np.array([[[0, 1]], [[2, 3]]])},
        meaning=lambda x, ids: x[ids[..., 0], ids[..., 1]],
        types={"x": ("batch", 4), "ids": ("rows", 1, 2), "y": ("rows", 1)},
    ),
    *(
        Case(
            name=f"gather_elements-{axis}", lowers="com.microsoft.GatherElementsGrad",
            nodes=[make("GatherElements", ["x", "ids"], ["y"], axis=axis)],
            inputs={"x": draw(2, 4), "ids": np.array([[0, 1, 1], [1, 0, 1]])},
            meaning=lambda x, ids, axis=axis: np.take_along_axis(x[:, :3] if not axis else x,
                                                                 ids, axis),
            types={"x": ("batch", 4), "ids": ("batch", 3), "y": ("batch", 3)},
        )
        for axis in (0, 1)
    ),
    Case(
        name="trilu", lowers="com.microsoft.Trilu", nodes=[make("Trilu", ["x"], ["y"], upper=0)],
        inputs={"x": draw(2, 4, 4)}, meaning=lambda x: np.tril(x), types=same("batch", 4, 4),
        trains=False,
    ),
]  # fmt: skip


def labelled(ignored: bool) -> Case:
    labels = np.array([3, 0, -100 if ignored else 2, 1, 3], np.int64)
    extra = {"ignore_index": -100} if ignored else {}
    rule = "com.microsoft.SoftmaxCrossEntropyLossGrad" if ignored else "SoftmaxCrossEntropyLoss"
    return Case(
        name=f"cross_entropy-{ignored}",
        lowers=rule,
        nodes=[make("SoftmaxCrossEntropyLoss", ["x", "labels"], ["y", "log"], reduction="sum",
                    **extra)],
        inputs={"x": draw(5, 4), "labels": labels},
        meaning=cross_entropy,
        types={"x": ("tokens", 4), "labels": ("tokens",), "log": ("tokens", 4), "y": ()},
    )  # fmt: skip


LOSSES: Final = [labelled(True), labelled(False)]


def convolution(
    x: tuple[int, ...],
    w: tuple[int, ...],
    *,
    lowers: str = "com.microsoft.ConvGrad",
    **how: Any,  # Any: attributes of Conv
) -> Case:
    result = convolve(draw(*x), draw(*w), **how).shape
    return Case(
        name=f"conv-{'x'.join(map(str, (*x[2:], *w)))}-{how}",
        lowers=lowers,
        nodes=[make("Conv", ["x", "w", "b"], ["y"], **how)],
        inputs={"x": draw(*x), "w": draw(*w, seed=4), "b": draw(w[0], seed=5)},
        meaning=lambda x, w, b: convolve(x, w, b, **how),
        wanted=("x", "w", "b"),
        types={"x": ("batch", *x[1:]), "y": ("batch", *result[1:])},
    )


def transposed_convolution(x: tuple[int, ...], w: tuple[int, ...], **how: Any) -> Case:
    rank = len(x) - 2
    pads, strides = how.get("pads", [0] * 2 * rank), how.get("strides", [1] * rank)
    rest = how.get("output_padding", [0] * rank)
    groups = how.get("group", 1)
    sizes = [
        (x[i + 2] - 1) * strides[i] + w[i + 2] - pads[i] - pads[i + rank] + rest[i]
        for i in range(rank)
    ]
    shape = (x[0], w[1] * groups, *sizes)
    plain = {name: value for name, value in how.items() if name != "output_padding"}
    return Case(
        name=f"conv_transpose-{'x'.join(map(str, w))}-{how}",
        lowers="com.microsoft.ConvTransposeGrad",
        nodes=[make("ConvTranspose", ["x", "w", "b"], ["y"], **how)],
        inputs={"x": draw(*x), "w": draw(*w, seed=4), "b": draw(shape[1], seed=5)},
        meaning=lambda x, w, b: transposed(x, w, shape, **plain) + b.reshape(-1, *[1] * rank),
        wanted=("x", "w", "b"),
        types={"x": ("batch", *x[1:]), "y": ("batch", *shape[1:])},
        trains=False,
    )


CONVOLUTIONS: Final = [
    convolution((2, 3, 5, 4), (4, 3, 3, 3), pads=[1, 1, 1, 1]),
    convolution((2, 3, 5, 4), (4, 3, 1, 1)),
    convolution((2, 3, 5, 4), (4, 3, 1, 1), strides=[2, 2]),
    convolution((2, 16, 4, 4), (3, 16, 3, 3), pads=[1, 1, 1, 1]),
    convolution((2, 3, 6, 7), (2, 3, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1]),
    convolution((2, 3, 7, 6), (2, 3, 3, 2), strides=[2, 3], pads=[0, 1, 2, 0]),
    convolution((2, 2, 7, 7), (3, 2, 3, 3), dilations=[2, 1], pads=[2, 0, 1, 1]),
    convolution((2, 2, 9, 9), (2, 1, 3, 3), group=2, pads=[1, 1, 1, 1]),
    convolution((2, 2, 9, 8), (2, 1, 3, 3), group=2, pads=[1, 1, 1, 1], strides=[2, 2]),
    convolution((2, 2, 8, 9), (2, 1, 3, 2), group=2, pads=[0, 1, 2, 0], strides=[2, 3]),
    convolution((2, 2, 9, 9), (2, 1, 3, 3), group=2, pads=[2, 0, 1, 1], dilations=[2, 1]),
    convolution((2, 2, 5, 5), (6, 1, 3, 3), group=2, pads=[1, 1, 1, 1], strides=[2, 2]),
    convolution((2, 2, 4, 4), (4, 1, 3, 3), group=2, pads=[1, 1, 1, 1]),
    convolution((2, 4, 5, 4), (6, 2, 3, 3), group=2, pads=[1, 1, 1, 1]),
    convolution((2, 4, 5, 5), (6, 2, 2, 2), group=2, strides=[2, 2]),
    convolution((2, 3, 9), (4, 3, 3), pads=[1, 1]),
    convolution((2, 3, 9), (4, 3, 4), pads=[0, 3], strides=[2]),
    convolution((2, 2, 4, 4), (2, 2, 1, 1), pads=[1, 1, 1, 1]),
    convolution((1, 2, 3, 4, 3), (2, 2, 2, 2, 2), pads=[1, 0, 1, 0, 1, 0]),
    convolution((2, 3, 8, 8), (2, 3, 4, 4), strides=[4, 4]),
    transposed_convolution((2, 3, 4, 3), (3, 2, 3, 3)),
    transposed_convolution((2, 3, 4, 3), (3, 2, 2, 2), strides=[2, 2]),
    transposed_convolution(
        (2, 3, 3, 3), (3, 2, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]
    ),
    transposed_convolution((2, 4, 3, 3), (4, 1, 3, 3), group=2, pads=[1, 1, 1, 1]),
]


def largest(x: tuple[int, ...], kernel: list[int], **how: Any) -> Case:
    result = pooled(draw(*x), kernel, np.nanmax, **how).shape
    return Case(
        name=f"max_pool-{kernel}-{how}",
        lowers="MaxPoolGrad",
        nodes=[make("MaxPool", ["x"], ["y"], kernel_shape=kernel, **how)],
        inputs={"x": draw(*x)},
        meaning=lambda x: pooled(x, kernel, np.nanmax, **how),
        types={"x": ("batch", *x[1:]), "y": ("batch", *result[1:])},
    )


def average(x: tuple[int, ...], kernel: list[int], *, padding_counts: int = 0, **how: Any) -> Case:
    result = pooled(draw(*x), kernel, np.nanmean, **how).shape

    def reduce(window: Array, axis: tuple[int, int]) -> Array:
        if padding_counts:
            return np.nansum(window, axis=axis) / math.prod(kernel)
        return np.nanmean(window, axis=axis)

    return Case(
        name=f"average_pool-{kernel}-{padding_counts}-{how}",
        lowers="AveragePoolGrad",
        nodes=[make("AveragePool", ["x"], ["y"], kernel_shape=kernel,
                    count_include_pad=padding_counts, **how)],
        inputs={"x": draw(*x)},
        meaning=lambda x: pooled(x, kernel, reduce, **how),
        types={"x": ("batch", *x[1:]), "y": ("batch", *result[1:])},
    )  # fmt: skip


POOLING: Final = [
    largest((2, 3, 6, 4), [2, 2], strides=[2, 2]),
    largest((2, 2, 5, 7), [3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    largest((2, 2, 5, 5), [3, 2]),
    average((2, 3, 6, 4), [2, 2], strides=[2, 2]),
    average((2, 2, 5, 7), [3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    average((2, 2, 5, 7), [3, 3], padding_counts=1, strides=[2, 2], pads=[1, 1, 1, 1]),
    average((2, 2, 6, 7), [2, 3], strides=[2, 2]),
]

CASES: Final = [
    *ACTIVATIONS,
    *NORMALISATIONS,
    *PRODUCTS,
    *BROADCASTING,
    *INDEXING,
    *LOSSES,
    *CONVOLUTIONS,
    *POOLING,
]
