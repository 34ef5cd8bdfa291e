"""Reshapes written so that no size which sharding may change is frozen into them.

A view is a Reshape or Flatten. `rewrite_views` composes chains of them and writes each anew from
the symbolic axes of its ends: `Flatten`, or `[0, 0, -1, head_dim]`, or the leading sizes of a
reference value read at run time with `[..., -1]` behind them; as a last resort, fixed sizes with
the only symbol left open.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from p2ptrain.errors import GraphError
from p2ptrain.graph.ir import INT64, Axis, Graph, Type, make

VIEWS = ("Reshape", "Flatten")


def product(axes: Sequence[Axis]) -> Axis:
    """Several axes as one: `batch*sequence`, `16*batch`, or a number."""
    number = 1
    symbols: list[str] = []
    for axis in axes:
        for part in [axis] if isinstance(axis, int) else axis.split("*"):
            if isinstance(part, int) or part.isdigit():
                number *= int(part)
            else:
                symbols.append(part)
    parts = ([str(number)] if number != 1 else []) + sorted(symbols)
    return "*".join(parts) if symbols else number


def rewrite_views(graph: Graph, reference: str) -> None:
    """Rewrite every view from the root of its chain; `reference` gives run-time leading sizes."""
    producers = graph.producers()
    old = graph.nodes
    graph.nodes = []
    for node in old:
        if node.op_type not in VIEWS or node.domain:
            graph.nodes.append(node)
            continue
        graph.nodes += view_nodes(graph, _root(producers, node), node.output[0], reference)
    graph.prune()


def _root(producers: dict[str, onnx.NodeProto], node: onnx.NodeProto) -> str:
    """The value that a chain of views starts from."""
    name = str(node.input[0])
    while name in producers and producers[name].op_type in VIEWS:
        name = str(producers[name].input[0])
    return name


def view_nodes(graph: Graph, source: str, target: str, reference: str) -> list[onnx.NodeProto]:
    """Nodes that make `target` from `source`, as their known axes say.

    Raises:
        GraphError: the reference does not lead with the axes that are needed.
    """
    have, want = graph.axes(source), graph.axes(target)
    if have == want:
        return [make("Identity", [source], [target])]
    split = _flatten_axis(have, want)
    if split is not None:
        return [make("Flatten", [source], [target], axis=split)]
    kept = _equal_lead(have, want)
    rest = want[kept:]
    if all(isinstance(axis, int) for axis in rest[1:]):
        sizes = [0] * kept + ([-1, *rest[1:]] if rest else [])
        shape = graph.constant(np.array(sizes, np.int64), "shape")
        return [make("Reshape", [source, shape], [target])]
    return (
        _leading(graph, source, target, reference)
        or _in_place(graph, source, target)
        or _axis_by_axis(graph, source, target, reference)
    )


def _equal_lead(have: Sequence[Axis], want: Sequence[Axis]) -> int:
    """How many leading axes are the same; a 0 in a Reshape copies each."""
    kept = 0
    while kept < min(len(have), len(want)) and have[kept] == want[kept]:
        kept += 1
    return kept


def _flatten_axis(have: Sequence[Axis], want: Sequence[Axis]) -> int | None:
    if len(want) != 2 or len(have) < 3:
        return None
    for split in range(1, len(have)):
        if product(have[:split]) == want[0] and product(have[split:]) == want[1]:
            return split
    return None


def _leading(graph: Graph, source: str, target: str, reference: str) -> list[onnx.NodeProto]:
    """Leading sizes read from the reference, numbers behind them; nothing where that cannot be."""
    want, known = graph.axes(target), graph.axes(reference)
    lead = 0
    while lead < min(len(want), len(known)) and want[lead] == known[lead]:
        lead += 1
    rest = want[lead:]
    if lead == 0 or not all(isinstance(axis, int) for axis in rest[1:]):
        return []
    sizes, shape = graph.fresh("sizes"), graph.fresh("shape")
    graph.types[sizes] = Type(dtype=INT64, axes=(lead,))
    nodes = [make("Shape", [reference], [sizes], start=0, end=lead)]
    if rest:
        graph.types[shape] = Type(dtype=INT64, axes=(len(want),))
        tail = graph.constant(np.array([-1, *rest[1:]], np.int64), "shape")
        nodes.append(make("Concat", [sizes, tail], [shape], axis=0))
    return [*nodes, make("Reshape", [source, shape if rest else sizes], [target])]


def _in_place(graph: Graph, source: str, target: str) -> list[onnx.NodeProto]:
    """Symbols that stay where they are, numbers, and one symbol that moves (grouped heads before a
    sequence); nothing where two move."""
    have, want = graph.axes(source), graph.axes(target)
    sizes = [
        axis if isinstance(axis, int) else 0 if axis in have[index : index + 1] else -1
        for index, axis in enumerate(want)
    ]
    if sizes.count(-1) > 1:
        return []
    shape = graph.constant(np.array(sizes, np.int64), "shape")
    return [make("Reshape", [source, shape], [target])]


def _axis_by_axis(graph: Graph, source: str, target: str, reference: str) -> list[onnx.NodeProto]:
    """Every symbol's size read at run time, one that nothing has left to the Reshape.

    Raises:
        GraphError: two sizes are nowhere to be read.
    """
    nodes, parts = [], []
    for axis in graph.axes(target):
        holder = next((n for n in (source, reference) if axis in graph.axes(n)), None)
        if isinstance(axis, int) or holder is None:
            number = axis if isinstance(axis, int) else -1
            parts.append(graph.constant(np.array([number], np.int64), "size"))
            continue
        parts.append(graph.fresh("size"))
        graph.types[parts[-1]] = Type(dtype=INT64, axes=(1,))
        place = graph.axes(holder).index(axis)
        nodes.append(make("Shape", [holder], [parts[-1]], start=place, end=place + 1))
    unknown = graph.constant(np.array([-1], np.int64), "size")
    if parts.count(unknown) > 1:
        raise GraphError(
            f"no Reshape from {graph.axes(source)} to {graph.axes(target)} without freezing a size",
            hint="reshape one axis at a time in the torch module",
        )
    shape = graph.fresh("shape")
    graph.types[shape] = Type(dtype=INT64, axes=(len(parts),))
    return [
        *nodes,
        make("Concat", parts, [shape], axis=0),
        make("Reshape", [source, shape], [target]),
    ]


def drop_identities(graph: Graph) -> None:
    """Let readers of an Identity read its source; one that names an output renames its source."""
    outputs = set(graph.outputs)
    made = {name for node in graph.nodes for name in node.output}
    aliases: dict[str, str] = {}
    for node in graph.nodes:
        if node.op_type != "Identity":
            continue
        source, target = _final(aliases, node.input[0]), node.output[0]
        if target not in outputs:
            aliases[target] = source
        elif source in made and source not in outputs:
            aliases[source] = target
            made.discard(source)
    graph.nodes = [node for node in graph.nodes if not _vanishes(node, aliases)]
    for node in graph.nodes:
        node.input[:] = [_final(aliases, name) for name in node.input]
        node.output[:] = [aliases.get(n, n) if n not in outputs else n for n in node.output]


def _final(aliases: dict[str, str], name: str) -> str:
    while name in aliases:
        name = aliases[name]
    return name


def _vanishes(node: onnx.NodeProto, aliases: dict[str, str]) -> bool:
    if node.op_type != "Identity":
        return False
    return node.output[0] in aliases or _final(aliases, node.input[0]) == node.output[0]


def share_equal_nodes(graph: Graph) -> None:
    """Let equal nodes be one (common subexpressions); outputs keep their names."""
    seen: dict[bytes, onnx.NodeProto] = {}
    aliases: dict[str, str] = {}
    kept = []
    for node in graph.nodes:
        for index, name in enumerate(node.input):
            node.input[index] = aliases.get(name, name)
        twin = seen.setdefault(_signature(node), node)
        if twin is node or any(name in graph.outputs for name in node.output):
            kept.append(node)
        else:
            aliases.update(zip(node.output, twin.output, strict=True))
    graph.nodes = kept


def _signature(node: onnx.NodeProto) -> bytes:
    bare = onnx.NodeProto()
    bare.CopyFrom(node)
    bare.name = bare.doc_string = ""
    del bare.metadata_props[:]
    present = [bool(name) for name in node.output]
    del bare.output[:]
    bare.output.extend("y" if there else "" for there in present)
    return bytes(bare.SerializeToString(deterministic=True))
