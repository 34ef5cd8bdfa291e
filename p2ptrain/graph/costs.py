"""What a graph costs and which of its axes can be sharded, read off its matrix products."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import onnx

from p2ptrain.bundle.manifest import ShardGroup
from p2ptrain.graph.canonical import UNARY, WITH_SCALAR
from p2ptrain.graph.ir import Axis, Graph, attribute
from p2ptrain.graph.views import VIEWS

HEADS = "heads"
COLUMNS = "columns"
RECURRENT: Final = ("LSTM", "GRU", "RNN")
PRODUCTS: Final = ("Gemm", "MatMul", "Conv", "ConvTranspose", "Einsum", *RECURRENT)


def product_flops(graph: Graph, sizes: Mapping[str, int]) -> int:
    """Floating-point operations of all matrix products and convolutions, 2 per multiply-add.

    Args:
        sizes: The size of every symbol, `batch` included.
    """
    return sum(node_flops(graph, node, sizes) for node in graph.nodes)


def node_flops(graph: Graph, node: onnx.NodeProto, sizes: Mapping[str, int]) -> int:
    """Floating-point operations of one node; 0 for what is not a product."""
    if node.op_type in ("Gemm", "MatMul", "FusedMatMul"):
        left = _sizes(graph, node.input[0], sizes)
        inner = left[-2 if attribute(node, "transA", 0) and len(left) > 1 else -1]
        return 2 * inner * math.prod(_sizes(graph, node.output[0], sizes))
    if node.op_type in ("Conv", "ConvTranspose"):
        moved = node.output[0] if node.op_type == "Conv" else node.input[0]
        kernel = _sizes(graph, node.input[1], sizes)[1:]
        return 2 * math.prod(kernel) * math.prod(_sizes(graph, moved, sizes))
    if node.op_type in RECURRENT:
        steps = math.prod(_sizes(graph, node.input[0], sizes)[:2])
        return 2 * steps * sum(math.prod(_sizes(graph, w, sizes)) for w in node.input[1:3])
    if node.op_type == "Einsum":
        return _einsum_flops(graph, node, sizes)
    return 0


def _einsum_flops(graph: Graph, node: onnx.NodeProto, sizes: Mapping[str, int]) -> int:
    """One multiply-add for every combination of the letters; `...` stands for leading axes."""
    terms = bytes(attribute(node, "equation")).decode().replace(" ", "").split("->")[0].split(",")
    letters: dict[str, int] = {}
    leading = 1
    for term, name in zip(terms, node.input, strict=True):
        axes = list(_sizes(graph, name, sizes))
        named = term.replace("...", "")
        leading = max(leading, math.prod(axes[: len(axes) - len(named)]))
        letters.update(zip(named, axes[len(axes) - len(named) :], strict=True))
    return 2 * leading * math.prod(letters.values()) if len(terms) > 1 else 0


def _sizes(graph: Graph, name: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(axis_size(axis, sizes) for axis in graph.axes(name))


def axis_size(axis: Axis, sizes: Mapping[str, int]) -> int:
    """The size of one axis; symbols may be products such as `batch*sequence`."""
    if isinstance(axis, int):
        return axis
    parts = axis.split("*")
    return math.prod(int(part) if part.isdigit() else sizes[part] for part in parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """How a segment can be sharded: its symbols' sizes and each parameter's group."""

    sizes: dict[str, int]
    groups: dict[str, ShardGroup]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sharded:
    """One parameter that one node lets be sharded."""

    parameter: str
    size: int
    """Of the symbol."""
    group: ShardGroup


def find_shards(graph: Graph) -> Shards:
    """Heads where a linear's result is split into heads, columns between two linears.

    A symbol with several sizes (grouped heads), or a parameter that it would slice in two ways,
    cannot be told apart by the symbol's name: the segment then has no such symbol.
    """
    producers = graph.producers()
    found: list[_Sharded] = []
    for node in graph.nodes:
        if node.op_type == "Gemm" and node.input[1] in graph.inputs:
            found += _merging(graph, producers, node)
    for node in graph.nodes:
        found += _head_split(graph, producers, node)
    symbols = dict.fromkeys(each.group.symbol for each in found)
    clear = [symbol for symbol in symbols if _is_clear(symbol, found)]
    kept = [each for each in found if each.group.symbol in clear]
    return Shards(
        sizes={each.group.symbol: each.size for each in kept},
        groups={each.parameter: each.group for each in kept},
    )


def _is_clear(symbol: str, found: Sequence[_Sharded]) -> bool:
    own = [each for each in found if each.group.symbol == symbol]
    names = {each.parameter for each in own}
    ways = {(each.parameter, each.group) for each in found if each.parameter in names}
    return len({each.size for each in own}) == 1 and len(ways) == len(names)


def _merging(
    graph: Graph, producers: dict[str, onnx.NodeProto], node: onnx.NodeProto
) -> list[_Sharded]:
    """A linear that sums over heads, or over the columns of a linear before it."""
    source = _back(graph, producers, node.input[0])
    below = producers.get(source)
    axes = graph.axes(source)
    if below is None:
        return []
    if below.op_type == "Transpose" and len(axes) == 4:
        heads, width = axes[2:]
        if isinstance(heads, int) and isinstance(width, int):
            return _sharded(node, HEADS, heads, width, inner=True)
    columns = graph.axes(node.input[0])[-1]
    if below.op_type == "Gemm" and isinstance(columns, int):
        before = _sharded(below, COLUMNS, columns, 1, inner=False)
        return [*_sharded(node, COLUMNS, columns, 1, inner=True), *before]
    return []


def _head_split(
    graph: Graph, producers: dict[str, onnx.NodeProto], node: onnx.NodeProto
) -> list[_Sharded]:
    """A linear whose result is split into heads."""
    if node.op_type not in VIEWS or len(graph.types[node.output[0]].axes) != 4:
        return []
    heads, width = graph.axes(node.output[0])[2:]
    below = producers.get(_back(graph, producers, node.input[0]))
    if below is None or below.op_type != "Gemm":
        return []
    if isinstance(heads, int) and isinstance(width, int):
        return _sharded(below, HEADS, heads, width, inner=False)
    return []


def _back(graph: Graph, producers: dict[str, onnx.NodeProto], name: str) -> str:
    """Go up through views and elementwise nodes of one tensor."""
    while True:
        node = producers.get(name)
        if node is None:
            return name
        single = node.op_type in UNARY or node.op_type in VIEWS
        scaled = node.op_type in WITH_SCALAR and node.input[1] in graph.constants
        if not (single or scaled):
            return name
        name = node.input[0]


def _sharded(
    gemm: onnx.NodeProto, symbol: str, size: int, block: int, *, inner: bool
) -> list[_Sharded]:
    """A Gemm's weight along its inner or outer axis; an outer group takes the bias along."""
    transposed = bool(attribute(gemm, "transB", 0))
    axis = int(inner) if transposed else 1 - int(inner)
    group = ShardGroup(symbol=symbol, axis=axis, block=block)
    found = [_Sharded(parameter=gemm.input[1], size=size, group=group)]
    if not inner and len(gemm.input) > 2:
        bias = ShardGroup(symbol=symbol, axis=0, block=block)
        found.append(_Sharded(parameter=gemm.input[2], size=size, group=bias))
    return found
