"""Find where a canonical forward graph may be cut, and cut it into a chain of segments.

A frontier is a point of the order where a single value carries everything that the rest needs
from the data: the residual stream between two half blocks. What follows from shapes alone
(positions, causal masks) is recomputed in each segment.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import onnx

from p2ptrain.errors import GraphError
from p2ptrain.graph.ir import Graph, attribute

PRODUCTS: Final = ("Gemm", "MatMul", "Conv", "ConvTranspose", "Einsum")
PORT_IN: Final = "x"
PORT_OUT: Final = "y"


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One segment cut out of the model, still with the model's parameter names."""

    graph: Graph
    """Inputs: port, other data inputs, parameters, masks; one output."""
    parameters: tuple[str, ...]
    masks: tuple[str, ...]


def cut(graph: Graph, *, data: str, parameters: Iterable[str]) -> tuple[Piece, ...]:
    """Cut at every residual frontier: first | half block | ... | last with the loss.

    Raises:
        GraphError: a parameter is read in two segments, or a value other than the frontier
            crosses; the message names it.
    """
    carriers = _carriers(graph, data)
    groups = _join(_regions(graph, carriers))
    pieces = []
    entry = data
    known = tuple(parameters)
    for index, group in enumerate(groups):
        last = index == len(groups) - 1
        exit_value = graph.outputs[0] if last else _exit(graph, group, carriers)
        pieces.append(_piece(graph, entry, exit_value, data, known, carriers))
        entry = exit_value
    _refuse_ties(pieces)
    return tuple(pieces)


def _carriers(graph: Graph, data: str) -> set[str]:
    """Values that depend on the data's content, not only on its shape."""
    carrying = {data}
    for node in graph.nodes:
        if node.op_type != "Shape" and carrying.intersection(node.input):
            carrying.update(name for name in node.output if name)
    return carrying


def _regions(graph: Graph, carriers: set[str]) -> list[list[onnx.NodeProto]]:
    """Runs of carrying nodes between points where exactly one carried value is alive."""
    nodes = [n for n in graph.nodes if n.op_type != "Shape" and carriers.intersection(n.input)]
    last_read: dict[str, int] = {}
    for position, node in enumerate(nodes):
        for name in node.input:
            last_read[name] = position
    regions: list[list[onnx.NodeProto]] = [[]]
    alive: set[str] = set()
    for position, node in enumerate(nodes):
        regions[-1].append(node)
        alive.update(name for name in node.output if name in last_read)
        alive = {name for name in alive if last_read[name] > position}
        if len(alive) == 1 and position < len(nodes) - 1:
            regions.append([])
    return regions


def _join(regions: list[list[onnx.NodeProto]]) -> list[list[onnx.NodeProto]]:
    """Parallel regions with a matrix product are segments; what lies around joins its neighbour.

    Before the first and after the last parallel region the rest makes a segment of its own
    (embedding, head); between two of them it joins the following one.
    """
    groups: list[list[onnx.NodeProto]] = []
    pending: list[onnx.NodeProto] = []
    for region in regions:
        block = len(region) > 1 and any(node.op_type in PRODUCTS for node in region)
        if block and not groups and pending:
            groups.append(pending)
            pending = []
        pending = pending + region
        if block:
            groups.append(pending)
            pending = []
    return [*groups, pending] if pending else groups


def _exit(graph: Graph, group: list[onnx.NodeProto], carriers: set[str]) -> str:
    """The one carried value of a group that later nodes read."""
    inside = {id(node) for node in group}
    made = {name for node in group for name in node.output if name in carriers}
    read = {
        name
        for node in graph.nodes
        if id(node) not in inside
        for name in node.input
        if name in made
    }
    if len(read) != 1:
        raise GraphError(f"the cut is crossed by {sorted(read)}, one value was expected")
    return str(read.pop())


def _piece(
    graph: Graph,
    entry: str,
    exit_value: str,
    data: str,
    parameters: tuple[str, ...],
    carriers: set[str],
) -> Piece:
    piece = graph.copy()
    piece.outputs = [exit_value]
    piece.nodes = [node for node in piece.nodes if entry not in node.output]
    if entry != data:
        _shapes_from(piece, data, entry)
    piece.prune()
    used = {name for node in piece.nodes for name in node.input}
    crossing = {n for n in used & carriers if n in piece.inputs and n != entry}
    if crossing:
        raise GraphError(
            f"{sorted(crossing)} is needed beyond the first segment",
            hint="only one value may cross a cut; compute masks from shapes",
        )
    names = [entry] + [n for n in piece.inputs if n in used and n != entry]
    piece.inputs = {name: piece.types[name] for name in names}
    _rename_value(piece, entry, PORT_IN if entry != data else data)
    _rename_value(piece, exit_value, PORT_OUT if exit_value != graph.outputs[0] else "loss")
    return Piece(
        graph=piece,
        parameters=tuple(n for n in parameters if n in piece.inputs),
        masks=tuple(n for n in piece.inputs if n.startswith("mask.")),
    )


def _shapes_from(piece: Graph, data: str, entry: str) -> None:
    """Read sizes of the data from the entering value, which has the same leading axes."""
    for node in piece.nodes:
        if node.op_type != "Shape" or node.input[0] != data:
            continue
        end = int(attribute(node, "end", len(piece.axes(data))))
        if piece.axes(data)[:end] != piece.axes(entry)[:end]:
            raise GraphError(f"{entry!r} does not begin with the axes of {data!r}")
        node.input[0] = entry


def _rename_value(graph: Graph, old: str, new: str) -> None:
    if old == new:
        return
    graph.rename(old, new)
    for node in graph.nodes:
        for index, name in enumerate(node.output):
            if name == old:
                node.output[index] = new
    graph.types[new] = graph.types.pop(old)
    graph.inputs = {(new if n == old else n): t for n, t in graph.inputs.items()}


def _refuse_ties(pieces: Iterable[Piece]) -> None:
    seen: set[str] = set()
    for piece in pieces:
        for name in piece.parameters:
            if name in seen:
                raise GraphError(
                    f"parameter {name!r} is used in two segments",
                    hint="untie the weights in the torch module; ties are not exported yet",
                )
            seen.add(name)
