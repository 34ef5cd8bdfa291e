"""Cut what a shard computes at its collectives: each part is a graph of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import onnx

from p2ptrain.graph.ir import Graph, Type, apply_names, depth_first, make
from p2ptrain.graph.local import rename_inner
from p2ptrain.graph.sharding.partition import Partition
from p2ptrain.graph.sharding.sharder import DOMAIN
from p2ptrain.graph.split import choose_stash
from p2ptrain.graph.views import drop_identities, share_equal_nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """One collective, by names of the parts' graphs."""

    kind: str
    sent: str
    got: str
    axis: int
    whole: Type


Side = tuple[tuple[Graph, tuple[Meeting, ...]], ...]
"""Forward or backward: graphs, each with the collectives after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A segment's forward and backward as graphs between collectives."""

    forward: Side
    backward: Side
    values: dict[str, Type]
    """What crosses between parts, in a shard's types."""
    stash: tuple[str, ...]


def cut(found: Partition, *, outputs: Sequence[str]) -> Cut:
    """Cut a partition in its parts.

    Args:
        outputs: The output ports; the others are cotangents and gradients.
    """
    graph, made = _tidied(found)
    gradients = [name for name in graph.outputs if name not in outputs]
    stash, again = choose_stash(graph, set(made), gradients)
    forward = [n for n in graph.nodes if made.intersection(n.output)]
    backward = [
        n for n in graph.nodes if not made.intersection(n.output) or again.intersection(n.output)
    ]
    kept, renamed = _kept_ports(graph, stash, outputs)
    backward = [_reading(node, renamed) for node in backward]
    stash = [renamed.get(name, name) for name in stash]
    sides = [
        _side(graph, found, [*forward, *kept], [*outputs, *stash]),
        _side(graph, found, backward, gradients),
    ]
    return _named(graph, found, sides, stash)


def _tidied(found: Partition) -> tuple[Graph, frozenset[str]]:
    """What several conversions emitted alike, once."""
    graph = found.graph
    share_equal_nodes(graph)
    drop_identities(graph)
    graph.prune()
    return graph, found.forward


def _kept_ports(
    graph: Graph, stash: Sequence[str], outputs: Sequence[str]
) -> tuple[list[onnx.NodeProto], dict[str, str]]:
    """Stash values of their own for output ports that the backward reads."""
    kept, renamed = [], {}
    for name in stash:
        if name in outputs:
            renamed[name] = graph.fresh("kept")
            graph.types[renamed[name]] = graph.types[name]
            kept.append(make("Identity", [name], [renamed[name]]))
    return kept, renamed


def _reading(node: onnx.NodeProto, names: Mapping[str, str]) -> onnx.NodeProto:
    """A node that reads other names."""
    copied = onnx.NodeProto()
    copied.CopyFrom(node)
    copied.input[:] = [names.get(name, name) for name in node.input]
    return copied


@dataclass(slots=True, kw_only=True)
class _Side:
    """Forward or backward: parts, meetings by part, what it hands on within itself."""

    parts: list[Graph]
    meetings: list[list[Meeting]]


def _side(
    graph: Graph, found: Partition, nodes: Sequence[onnx.NodeProto], outputs: Sequence[str]
) -> _Side:
    nodes = _needed(nodes, outputs)
    levels = _levels(nodes)
    count = 1 + max((levels[n.output[0]] for n in nodes if n.domain != DOMAIN), default=0)
    meetings: list[list[Meeting]] = [[] for _ in range(count)]
    grouped: list[list[onnx.NodeProto]] = [[] for _ in range(count)]
    for node in nodes:
        if node.domain != DOMAIN:
            grouped[levels[node.output[0]]].append(node)
            continue
        level = levels[node.output[0]] - 1
        sent = _sent(graph, grouped[level], node.input[0], outputs)
        axis = int(onnx.helper.get_attribute_value(node.attribute[0]))
        meetings[level].append(
            Meeting(
                kind=node.op_type,
                sent=sent,
                got=node.output[0],
                axis=axis,
                whole=found.whole[node.output[0]],
            )
        )
    wanted = {*outputs, *(meeting.sent for part in meetings for meeting in part)}
    return _Side(parts=_parts(graph, grouped, wanted), meetings=meetings)


def _needed(nodes: Sequence[onnx.NodeProto], outputs: Sequence[str]) -> list[onnx.NodeProto]:
    needed = set(outputs)
    kept = []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    return kept[::-1]


def _levels(nodes: Sequence[onnx.NodeProto]) -> dict[str, int]:
    """How many collectives lie above each value."""
    levels: dict[str, int] = {}
    for node in nodes:
        above = max((levels.get(name, 0) for name in node.input), default=0)
        for name in node.output:
            levels[name] = above + (node.domain == DOMAIN)
    return levels


def _sent(graph: Graph, nodes: list[onnx.NodeProto], name: str, outputs: Sequence[str]) -> str:
    """What a part makes for a collective; a value of its own where others have a use for it."""
    made_here = any(name in node.output for node in nodes)
    if made_here and name not in outputs:
        return name
    copied = graph.fresh("sent")
    graph.types[copied] = graph.types[name]
    nodes.append(make("Identity", [name], [copied]))
    return copied


def _parts(graph: Graph, grouped: Sequence[list[onnx.NodeProto]], wanted: set[str]) -> list[Graph]:
    parts = []
    for index, nodes in enumerate(grouped):
        made = {name for node in nodes for name in node.output if name}
        later = {name for group in grouped[index + 1 :] for node in group for name in node.input}
        read = dict.fromkeys(name for node in nodes for name in node.input if name)
        entering = [n for n in read if n not in made and n not in graph.constants]
        order = [name for node in nodes for name in node.output if name]
        part = Graph(
            inputs={name: graph.types[name] for name in sorted(entering)},
            nodes=list(nodes),
            constants={n: graph.constants[n] for n in read if n in graph.constants},
            outputs=[name for name in order if name in wanted or name in later],
            types=dict(graph.types),
        )
        parts.append(part.copy())  # both directions may make a value again
    return parts


def _named(graph: Graph, found: Partition, sides: Sequence[_Side], stash: Sequence[str]) -> Cut:
    """Give what crosses between parts its names, and each part canonical inner ones."""
    kept = {name: f"stash_{index}" for index, name in enumerate(stash)}
    public = {*found.graph.inputs, *graph.outputs}
    values = {new: graph.types[old] for old, new in kept.items()}
    named = []
    for stem, side in zip(("f", "b"), sides, strict=True):
        crossing = [n for part in side.parts for n in (*part.inputs, *part.outputs)]
        crossing += [n for part in side.meetings for m in part for n in (m.sent, m.got)]
        inner = [n for n in dict.fromkeys(crossing) if n not in public and n not in kept]
        names = {name: f"{stem}_{index}" for index, name in enumerate(inner)}
        values |= {new: graph.types[old] for old, new in names.items()}
        named.append(_renamed(side, {**kept, **names}))
    return Cut(forward=named[0], backward=named[1], values=values, stash=tuple(kept.values()))


def _renamed(side: _Side, names: Mapping[str, str]) -> Side:
    for part in side.parts:
        apply_names(part, names)
        depth_first(part)
        rename_inner(part, "v")
    return tuple(
        (part, tuple(_meeting(meeting, names) for meeting in meetings))
        for part, meetings in zip(side.parts, side.meetings, strict=True)
    )


def _meeting(meeting: Meeting, names: Mapping[str, str]) -> Meeting:
    return replace(
        meeting,
        sent=names.get(meeting.sent, meeting.sent),
        got=names.get(meeting.got, meeting.got),
    )
