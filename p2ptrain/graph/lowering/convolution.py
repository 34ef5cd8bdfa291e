"""Gradients of convolutions: which lowering is used is a function of shapes alone.

Legend: N batch, C input channels, O output channels, G groups, K kernel taps.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import onnx

from p2ptrain.graph.ir import Axis, attribute
from p2ptrain.graph.lowering.registry import Emitter, rule
from p2ptrain.graph.lowering.windows import Windows, fixed, windows
from p2ptrain.graph.views import product

NARROW = 16
"""Input channels below which the taps of a kernel share one product."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Site:
    """One convolution: its windows, its groups, and the names that its gradient reads."""

    window: Windows
    groups: int
    dy: str
    x: str
    weight: str


@rule("com.microsoft.ConvGrad")
def conv_grad(emit: Emitter, node: onnx.NodeProto) -> None:
    """db = sum(dy); dx and dw as the functions below say."""
    dy, x, weight = node.input
    graph = emit.graph
    rank = len(graph.axes(x)) - 2
    kernel = [fixed(axis) for axis in graph.axes(weight)[2:]]
    window = windows(node, kernel, sizes=graph.axes(x)[2:], results=graph.axes(dy)[2:])
    groups = int(attribute(node, "group", 1))
    site = _Site(window=window, groups=groups, dy=dy, x=x, weight=weight)
    outputs = [*node.output, "", ""]
    if outputs[0]:
        _spread(emit, site, out=outputs[0])
    if outputs[1]:
        weight_gradient(emit, site, out=outputs[1])
    if outputs[2]:
        emit.total(dy, [0, *range(2, 2 + rank)], out=outputs[2], keep=False)


def _spread(emit: Emitter, site: _Site, *, out: str) -> None:
    """dx: dy, with zeros between its values where the stride skips, convolved with w turned round.

    A strided kernel of several taps is a ConvTranspose, which multiplies no zeros.
    """
    window = site.window
    strided = any(stride > 1 for stride in window.strides)
    if strided and prod(window.kernel) > 1:
        emit.op(
            "ConvTranspose",
            site.dy,
            site.weight,
            axes=emit.graph.axes(site.x),
            out=out,
            kernel_shape=list(window.kernel),
            strides=list(window.strides),
            dilations=list(window.dilations),
            pads=list(window.transposed_pads),
            output_padding=list(window.output_padding),
            group=site.groups,
        )
        return
    if strided and prod(window.kernel) == 1 and not any(window.pads):
        small = (*emit.graph.axes(site.x)[:2], *emit.graph.axes(site.dy)[2:])
        product_ = emit.op("Conv", site.dy, _turned(emit, site), axes=small, group=site.groups)
        _between_zeros(emit, product_, window, out=out)
        return
    dy = _between_zeros(emit, site.dy, window, out=None) if strided else site.dy
    have = [fixed(a) for a in emit.graph.axes(dy)[2:]] if strided else window.results
    ends = [size - there for size, there in zip(window.sizes, have, strict=True)]
    begins = [window.span(i) - 1 - window.begin(i) for i in range(window.rank)]
    pads = [
        *begins,
        *(e + window.span(i) - 1 - b for i, (e, b) in enumerate(zip(ends, begins, strict=True))),
    ]
    if min(pads) < 0:
        dy, pads = _cropped(emit, dy, pads), [max(pad, 0) for pad in pads]
    emit.op(
        "Conv",
        dy,
        _turned(emit, site),
        axes=emit.graph.axes(site.x),
        out=out,
        kernel_shape=list(window.kernel),
        dilations=list(window.dilations),
        pads=pads,
        group=site.groups,
    )


def _cropped(emit: Emitter, dy: str, pads: Sequence[int]) -> str:
    """dy without the edge values that only padding has read."""
    rank = len(pads) // 2
    crops = [min(pad, 0) for pad in pads]
    have = emit.graph.axes(dy)
    axes: list[Axis] = [*have[:2]]
    axes += [fixed(have[i + 2]) + crops[i] + crops[i + rank] for i in range(rank)]
    over = emit.integers(*range(2, 2 + rank))
    return emit.op("Pad", dy, emit.integers(*crops), "", over, axes=axes)


def _turned(emit: Emitter, site: _Site) -> str:
    """w (O, C/G, *K) as (C, O/G, *K), every spatial axis reversed."""
    graph, window = emit.graph, site.window
    have = graph.axes(site.weight)
    turned = site.weight
    reversed_ = [i for i in range(window.rank) if window.kernel[i] > 1]
    if reversed_:
        count = len(reversed_)
        bounds = [emit.integers(*[value] * count) for value in (-1, -(1 << 60), -1)]
        over = emit.integers(*(i + 2 for i in reversed_))
        turned = emit.op("Slice", turned, bounds[0], bounds[1], over, bounds[2], axes=have)
    outputs, inputs = fixed(have[0]), fixed(have[1])
    if site.groups == 1:
        return emit.transpose(turned, [1, 0, *range(2, len(have))])
    each = outputs // site.groups
    if each == 1 and inputs == 1:
        return turned
    split = emit.view(turned, (site.groups, each, *have[1:]))
    swapped = emit.transpose(split, [0, 2, 1, *range(3, len(have) + 1)])
    return emit.view(swapped, (site.groups * inputs, each, *have[2:]))


def _between_zeros(emit: Emitter, name: str, window: Windows, *, out: str | None) -> str:
    """Values `stride` apart with zeros between, from the first to the last value of a row.

    With `out` the zeros go on to the size of x: the whole answer of a kernel of one tap.
    """
    have = emit.graph.axes(name)
    wide: list[Axis] = [*have[:2]]
    spread: list[Axis] = [*have[:2]]
    grown: list[Axis] = [*have[:2]]
    for axis in range(window.rank):
        stride = window.strides[axis]
        wide += [have[axis + 2], 1]
        spread += [have[axis + 2], stride]
        grown.append(fixed(have[axis + 2]) * stride)
    over = emit.integers(*(3 + 2 * i for i in range(window.rank)))
    parted = emit.op("Unsqueeze", name, over, axes=wide)
    gaps = emit.integers(*[0] * window.rank, *(stride - 1 for stride in window.strides))
    filled = emit.view(emit.op("Pad", parted, gaps, "", over, axes=spread), grown)
    if out is None:
        sizes = [fixed(grown[i + 2]) - window.strides[i] + 1 for i in range(window.rank)]
    else:
        sizes = list(window.sizes)
    ends = [sizes[i] - fixed(grown[i + 2]) for i in range(window.rank)]
    over = emit.integers(*range(2, 2 + window.rank))
    crop = emit.integers(*[0] * window.rank, *ends)
    return emit.op("Pad", filled, crop, "", over, axes=[*have[:2], *sizes], out=out)


def weight_gradient(emit: Emitter, site: _Site, *, out: str) -> None:
    """dw[o, c, k] = sum over images and places of dy[o] * x[c] shifted by tap k.

    One group: a Gemm per tap over (O, N * places) and (C, N * places), both cheap to lay out
    since rows of places move as a whole; few input channels share one Gemm for all taps. One
    channel per group (depthwise): products of shifted x with dy, summed. Other groups: a batched
    product per tap.
    """
    inputs = fixed(emit.graph.axes(site.weight)[1])
    outputs = fixed(emit.graph.axes(site.weight)[0])
    if site.groups == 1:
        _dense(emit, site, out=out)
    elif inputs == 1 and outputs == site.groups:
        _depthwise(emit, site, out=out)
    else:
        _grouped(emit, site, out=out)


def _dense(emit: Emitter, site: _Site, *, out: str) -> None:
    graph, taps = emit.graph, prod(site.window.kernel)
    outputs, inputs = (fixed(axis) for axis in graph.axes(site.weight)[:2])
    dy = _channels_first(emit, site.dy)
    places = graph.axes(dy)[1]
    shifted = [
        emit.view(tap, (inputs, places))
        for tap in _shifts(emit, _by_channel(emit, site.x), site.window)
    ]
    if taps > 1 and inputs < NARROW:
        rows = emit.op("Concat", *shifted, axes=(taps * inputs, places), axis=0)
        joined = emit.op("Gemm", dy, rows, axes=(outputs, taps * inputs), transB=1)
        by_tap = emit.view(joined, (outputs, taps, inputs))
        ordered = emit.transpose(by_tap, [0, 2, 1])
    else:
        parts = [emit.op("Gemm", dy, tap, axes=(outputs, inputs), transB=1) for tap in shifted]
        ordered = _stacked(emit, parts, (outputs, inputs))
    emit.view(ordered, graph.axes(out), out=out)


def _stacked(emit: Emitter, parts: Sequence[str], axes: tuple[Axis, ...]) -> str:
    """Results of the taps side by side on a new last axis."""
    if len(parts) == 1:
        return parts[0]
    last = emit.integers(len(axes))
    wide = [emit.op("Unsqueeze", part, last, axes=(*axes, 1)) for part in parts]
    return emit.op("Concat", *wide, axes=(*axes, len(parts)), axis=len(axes))


def _by_channel(emit: Emitter, name: str) -> str:
    """(N, C, ...) as (C, N, ...)."""
    rank = len(emit.graph.axes(name))
    return emit.transpose(name, [1, 0, *range(2, rank)])


def _channels_first(emit: Emitter, name: str) -> str:
    """(N, C, ...) as (C, N * places)."""
    moved = _by_channel(emit, name)
    axes = emit.graph.axes(moved)
    return emit.view(moved, (axes[0], product(axes[1:])))


def _shifts(emit: Emitter, x: str, window: Windows) -> Iterator[str]:
    """For each tap, the padded values that it reads: the axes of x with places for sizes."""
    moving = [i for i in range(window.rank) if window.moves(i)]
    over = emit.integers(*(i + 2 for i in moving))

    def sized(sizes: Sequence[int]) -> list[Axis]:
        axes = list(emit.graph.axes(x))
        for i in moving:
            axes[i + 2] = sizes[i]
        return axes

    begins, ends = ([side(i) for i in moving] for side in (window.begin, window.end))
    if any(begins) or any(ends):
        axes = sized([window.used(i) for i in range(window.rank)])
        x = emit.op("Pad", x, emit.integers(*begins, *ends), "", over, axes=axes)
    if prod(window.kernel) == 1 and prod(window.strides) == 1:
        yield x
        return
    steps = emit.integers(*(window.strides[i] for i in moving))
    for tap in itertools.product(*map(range, window.kernel)):
        starts = [tap[i] * window.dilations[i] for i in moving]
        stops = [
            start + (window.results[i] - 1) * window.strides[i] + 1
            for start, i in zip(starts, moving, strict=True)
        ]
        bounds = (emit.integers(*starts), emit.integers(*stops), over, steps)
        yield emit.op("Slice", x, *bounds, axes=sized(window.results))


def _depthwise(emit: Emitter, site: _Site, *, out: str) -> None:
    graph = emit.graph
    over = [0, *range(2, 2 + site.window.rank)]
    parts = [
        emit.total(emit.like("Mul", shifted, site.dy), over, out=None, keep=False)
        for shifted in _shifts(emit, site.x, site.window)
    ]
    stacked = _stacked(emit, parts, graph.axes(site.weight)[:1])
    emit.view(stacked, graph.axes(out), out=out)


def _grouped(emit: Emitter, site: _Site, *, out: str) -> None:
    graph, groups = emit.graph, site.groups
    outputs, inputs = (fixed(axis) for axis in graph.axes(site.weight)[:2])
    flat = _channels_first(emit, site.dy)
    places = graph.axes(flat)[1]
    each = outputs // groups
    dy = emit.view(flat, (groups, each, places))
    parts = []
    for shifted in _shifts(emit, _by_channel(emit, site.x), site.window):
        rows = emit.view(shifted, (groups, inputs, places))
        columns = emit.transpose(rows, [0, 2, 1])
        parts.append(emit.op("MatMul", dy, columns, axes=(groups, each, inputs)))
    emit.view(_stacked(emit, parts, (groups, each, inputs)), graph.axes(out), out=out)


@rule("com.microsoft.ConvTransposeGrad", every_form=True)
def conv_transpose_grad(emit: Emitter, node: onnx.NodeProto) -> None:
    """dx = Conv(dy, w); dw is that of the Conv which this one transposes, x and dy exchanged."""
    dy, x, weight = node.input
    graph = emit.graph
    rank = len(graph.axes(x)) - 2
    kernel = [fixed(axis) for axis in graph.axes(weight)[2:]]
    window = windows(node, kernel, sizes=graph.axes(dy)[2:], results=graph.axes(x)[2:])
    groups = int(attribute(node, "group", 1))
    outputs = [*node.output, "", ""]
    if outputs[0]:
        begins = window.pads[:rank]
        emit.op(
            "Conv",
            _without_rest(emit, dy, window),
            weight,
            axes=graph.axes(x),
            out=outputs[0],
            kernel_shape=kernel,
            strides=list(window.strides),
            dilations=list(window.dilations),
            pads=[*begins, *(max(window.end(i), 0) for i in range(rank))],
            group=groups,
        )
    if outputs[1]:
        site = _Site(window=window, groups=groups, dy=x, x=dy, weight=weight)
        weight_gradient(emit, site, out=outputs[1])
    if outputs[2]:
        emit.total(dy, [0, *range(2, 2 + rank)], out=outputs[2], keep=False)


def _without_rest(emit: Emitter, dy: str, window: Windows) -> str:
    """dy less the values behind the last window (output padding)."""
    ends = [min(window.end(i), 0) for i in range(window.rank)]
    if not any(ends):
        return dy
    have = emit.graph.axes(dy)
    sizes = [fixed(have[i + 2]) + ends[i] for i in range(window.rank)]
    over = emit.integers(*range(2, 2 + window.rank))
    crop = emit.integers(*[0] * window.rank, *ends)
    return emit.op("Pad", dy, crop, "", over, axes=[*have[:2], *sizes])
