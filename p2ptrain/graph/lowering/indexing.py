"""Gathers and slices: the cotangent goes back to where its values were taken."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from p2ptrain.errors import GraphError
from p2ptrain.graph.ir import INT64, Axis, attribute
from p2ptrain.graph.lowering.registry import Emitter, rule
from p2ptrain.graph.views import product


@rule("com.microsoft.GatherGrad")
def gather_grad(emit: Emitter, node: onnx.NodeProto) -> None:
    """Slices of dy added onto zeros at their indices, one after the other.

    One constant index, or a run of them, is a Pad. A table of rows (an embedding) is scattered
    as (rows, width). ScatterElements adds in order, so the bits do not depend on threads.
    """
    shape, indices, dy = node.input
    graph = emit.graph
    table = graph.axes(node.output[0])
    axis = int(attribute(node, "axis", 0)) % len(table)
    rank = len(graph.axes(indices))
    first = _run_start(emit, indices)
    if first is not None and rank < 2:
        if rank == 0:
            kept = [*graph.axes(dy)[:axis], 1, *graph.axes(dy)[axis:]]
            dy = emit.op("Unsqueeze", dy, emit.integers(axis), axes=kept)
        pad_into(emit, dy, axis, first, table[axis], shape, out=node.output[0])
        return
    if axis == 0 and len(table) == 2:
        scatter_rows(emit, dy, indices, shape, out=node.output[0])
        return
    count = _count(graph.axes(indices))
    column = emit.view(indices, (count,))
    flat_dy = emit.view(dy, [*table[:axis], count, *table[axis + 1 :]])
    _scatter_along(emit, flat_dy, column, shape, axis, out=node.output[0])


def _count(axes: Sequence[Axis]) -> Axis:
    return axes[0] if len(axes) == 1 else (1 if not axes else "rows")


def _run_start(emit: Emitter, indices: str) -> int | None:
    """First of the constant, consecutive, non-negative indices; None for others."""
    known = emit.graph.constants.get(indices)
    if known is None or known.size == 0 or known.min() < 0:
        return None
    flat = known.ravel()
    return int(flat[0]) if (np.diff(flat) == 1).all() else None


def scatter_rows(emit: Emitter, dy: str, indices: str, shape: str, *, out: str) -> None:
    """Rows of dy added onto a two-dimensional table of zeros."""
    table = emit.graph.axes(out)
    rows = _count(emit.graph.axes(indices))
    flat_dy = emit.view(dy, (rows, table[1]))
    column = emit.view(indices, (rows, 1))
    every = emit.op("Expand", column, emit.shape(flat_dy), axes=(rows, table[1]), dtype=INT64)
    _add_at(emit, emit.zeros_like(shape, out), every, flat_dy, 0, out=out)


def _scatter_along(
    emit: Emitter, dy: str, indices: str, shape: str, axis: int, *, out: str
) -> None:
    """Slices of dy along one axis added onto zeros; one index per slice."""
    graph = emit.graph
    have = graph.axes(dy)
    others = [i for i in range(len(have)) if i != axis]
    column = [have[axis] if i == axis else 1 for i in range(len(have))]
    wide = emit.op("Unsqueeze", indices, emit.integers(*others), axes=column, dtype=INT64)
    every = emit.op("Expand", wide, emit.shape(dy), axes=have, dtype=INT64)
    _add_at(emit, emit.zeros_like(shape, out), every, dy, axis, out=out)


def _add_at(emit: Emitter, zeros: str, indices: str, dy: str, axis: int, *, out: str | None) -> str:
    return emit.op(
        "ScatterElements",
        zeros,
        indices,
        dy,
        axes=emit.graph.axes(zeros),
        out=out,
        axis=axis,
        reduction="add",
    )


@rule("com.microsoft.GatherElementsGrad")
def gather_elements_grad(emit: Emitter, node: onnx.NodeProto) -> None:
    """Elements of dy added onto zeros at their indices along one axis (also after TopK)."""
    dy, shape, indices = node.input
    zeros = emit.zeros_like(shape, node.output[0])
    _add_at(emit, zeros, indices, dy, int(attribute(node, "axis", 0)), out=node.output[0])


@rule("com.microsoft.GatherNDGrad")
def gather_nd_grad(emit: Emitter, node: onnx.NodeProto) -> None:
    """Slices of dy added onto zeros; index tuples become row numbers of a flattened table."""
    shape, indices, dy = node.input
    graph = emit.graph
    if int(attribute(node, "batch_dims", 0)) != 0:
        raise GraphError(
            "GatherNDGrad with batch_dims has no rule",
            hint="index with gather or take_along_dim in the model",
        )
    data, depth = graph.axes(node.output[0]), graph.axes(indices)[-1]
    if not isinstance(depth, int):
        raise GraphError("GatherND whose index depth is not fixed has no rule")
    width = product(data[depth:])
    number = _row_number(emit, emit.view(indices, ("rows", depth)), shape, depth)
    column = emit.op("Unsqueeze", number, emit.integers(1), axes=("rows", 1), dtype=INT64)
    flat_dy = emit.view(dy, ("rows", width))
    every = emit.op("Expand", column, emit.shape(flat_dy), axes=("rows", width), dtype=INT64)
    table = emit.view(emit.zeros_like(shape, node.output[0]), ("table", width))
    emit.view(_add_at(emit, table, every, flat_dy, 0, out=None), data, out=node.output[0])


def _row_number(emit: Emitter, tuples: str, shape: str, depth: int) -> str:
    """Row-major number of each index tuple; negative indices count from the end."""

    def column(source: str, position: int, axis: int, axes: tuple[Axis, ...]) -> str:
        at = emit.graph.constant(np.array(position))
        return emit.op("Gather", source, at, axes=axes, dtype=INT64, axis=axis)

    number: str | None = None
    for position in range(depth):
        size = column(shape, position, 0, ())
        part = column(tuples, position, 1, ("rows",))
        part = emit.op("Mod", part, size, axes=("rows",), dtype=INT64)
        if number is not None:
            raised = emit.op("Mul", number, size, axes=("rows",), dtype=INT64)
            part = emit.op("Add", raised, part, axes=("rows",), dtype=INT64)
        number = part
    if number is None:
        raise GraphError("GatherND without an index has no rule")
    return number


@rule("com.microsoft.SliceGrad")
def slice_grad(emit: Emitter, node: onnx.NodeProto) -> None:
    """dy with zeros around it, one sliced axis after the other: a Pad, or a scatter for steps."""
    dy, shape, *bounds = node.input
    graph = emit.graph
    starts, _, axes, steps = (_integers(emit, name) for name in (*bounds, "", "")[:4])
    target = graph.axes(node.output[0])
    if starts is None:
        raise GraphError("SliceGrad with a start that is not constant has no rule")
    order = axes if axes is not None else list(range(len(starts)))
    value = dy
    for index, (axis, start) in enumerate(zip(order, starts, strict=True)):
        axis %= len(target)
        last = index == len(order) - 1
        out = node.output[0] if last else None
        step = steps[index] if steps is not None else 1
        have = graph.axes(value)
        if have[axis] == target[axis] and step == 1 and isinstance(target[axis], int):
            value = emit.like("Identity", value, out=out)
        elif step == 1 and start >= 0:
            value = pad_into(emit, value, axis, start, target[axis], shape, out=out)
        else:
            ends = [bounds[0], bounds[1]]
            one = [_pick(emit, name, index) for name in ends]
            value = _scatter_range(emit, value, axis, (one[0], one[1], step), shape, out=out)


def _integers(emit: Emitter, name: str) -> list[int] | None:
    known = emit.graph.constants.get(name)
    return None if known is None else [int(value) for value in known.ravel()]


def _pick(emit: Emitter, name: str, index: int) -> str:
    """One entry of a constant or run-time vector, as a vector."""
    known = _integers(emit, name)
    if known is not None:
        return emit.integers(known[index])
    return emit.op("Gather", name, emit.integers(index), axes=(1,), dtype=INT64)


def _scatter_range(
    emit: Emitter,
    dy: str,
    axis: int,
    bounds: tuple[str, str, int],
    shape: str,
    *,
    out: str | None,
) -> str:
    """dy onto zeros at every `step`-th place between the bounds, along one axis."""
    graph = emit.graph
    have, start, step = graph.axes(dy), bounds[0], bounds[2]
    at = graph.constant(np.array(axis))
    length = emit.op("Gather", shape, at, axes=(), dtype=INT64)
    zero, one = (graph.constant(np.array(value)) for value in (0, 1))
    full = "length"
    every = emit.op("Range", zero, length, one, axes=(full,), dtype=INT64)
    window = (start, bounds[1], emit.integers(0), emit.integers(step))
    taken = emit.op("Slice", every, *window, axes=(have[axis],), dtype=INT64)
    wide = [have[axis] if i == axis else 1 for i in range(len(have))]
    others = emit.integers(*(i for i in range(len(have)) if i != axis))
    column = emit.op("Unsqueeze", taken, others, axes=wide, dtype=INT64) if len(have) > 1 else taken
    indices = emit.op("Expand", column, emit.shape(dy), axes=have, dtype=INT64)
    whole = emit.op("Unsqueeze", length, emit.integers(0), axes=(1,), dtype=INT64)
    sizes = [whole if i == axis else emit.size(dy, i) for i in range(len(have))]
    room = emit.op("Concat", *sizes, axes=(len(have),), dtype=INT64, axis=0)
    axes = [full if i == axis else have[i] for i in range(len(have))]
    zeros = emit.op("ConstantOfShape", room, axes=axes)
    return emit.op("ScatterElements", zeros, indices, dy, axes=axes, out=out, axis=axis)


def pad_into(
    emit: Emitter, dy: str, axis: int, start: int, size: Axis, shape: str, *, out: str | None
) -> str:
    """dy with zeros before and after it along one axis, `size` long in all."""
    have = emit.graph.axes(dy)
    axes = [size if i == axis else known for i, known in enumerate(have)]
    length = have[axis]
    if isinstance(size, int) and isinstance(length, int):
        pads = emit.integers(start, size - start - length)
    else:
        at = emit.integers(axis)
        whole = emit.op("Gather", shape, at, axes=(1,), dtype=INT64)
        before = emit.integers(start)
        left = emit.op("Sub", whole, emit.size(dy, axis), axes=(1,), dtype=INT64)
        after = emit.op("Sub", left, before, axes=(1,), dtype=INT64)
        pads = emit.op("Concat", before, after, axes=(2,), dtype=INT64, axis=0)
    return emit.op("Pad", dy, pads, "", emit.integers(axis), axes=axes, out=out)


@rule("com.microsoft.Trilu")
def trilu(emit: Emitter, node: onnx.NodeProto) -> None:
    """The standard operator of the same name, which the builder spells with its own domain."""
    upper = int(attribute(node, "upper", 1))
    name = node.input[0]
    emit.op("Trilu", *node.input, axes=emit.graph.axes(name), out=node.output[0], upper=upper)
