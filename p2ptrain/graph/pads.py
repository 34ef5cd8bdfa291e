"""Pads of all axes where onnxruntime may move a transposition across a Pad.

Its transpose optimizer (seen in 1.19.2; 1.32 warns instead) permutes the pads of a Pad as if there
were some for every axis, also where the node names the axes that it pads, as opset 18 allows: of
pads for one axis it then picks those of others. A Pad between two transpositions, which the
optimizer likes to bring together, therefore states the pads of every axis.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Final

import numpy as np
import onnx

from p2ptrain.graph.ir import Graph, Type, make

INT64: Final = int(onnx.TensorProto.INT64)
STOPS: Final = frozenset({
    "BatchNormalization", "Conv", "ConvTranspose", "Flatten", "Gather", "Gemm", "MatMul",
    "Reshape", "Shape",
})  # fmt: skip
"""What no transposition is moved across."""


def state_all_axes(graph: Graph) -> None:
    """Give each Pad between transpositions the pads of all axes, in place; the values stay."""
    producers, readers = graph.producers(), defaultdict[str, list[onnx.NodeProto]](list)
    for node in graph.nodes:
        for name in node.input:
            readers[name].append(node)

    def above(node: onnx.NodeProto) -> Iterable[onnx.NodeProto]:
        return (producers[name] for name in node.input if name in producers)

    def below(node: onnx.NodeProto) -> Iterable[onnx.NodeProto]:
        return (reader for name in node.output for reader in readers[name])

    nodes, changed = list[onnx.NodeProto](), False
    for node in graph.nodes:
        named = node.op_type == "Pad" and len(node.input) > 3 and node.input[3] in graph.constants
        if named and _transposed(node, above) and _transposed(node, below):
            nodes += _whole(graph, node)
            changed = True
        else:
            nodes.append(node)
    if not changed:
        return
    graph.nodes = nodes
    read = {name for node in nodes for name in node.input}
    graph.constants = {name: value for name, value in graph.constants.items() if name in read}


def _transposed(
    node: onnx.NodeProto, beside: Callable[[onnx.NodeProto], Iterable[onnx.NodeProto]]
) -> bool:
    """Whether a transposition is reached in one direction."""
    waiting, seen = [node], set[int]()
    while waiting:
        for other in beside(waiting.pop()):
            if other.op_type == "Transpose":
                return True
            if other.op_type not in STOPS and id(other) not in seen:
                seen.add(id(other))
                waiting.append(other)
    return False


def _whole(graph: Graph, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The Pad without names of axes, after what its pads are made by if they are computed."""
    data, pads, value, axes = node.input[:4]
    rank = len(graph.axes(data))
    over = np.array([int(axis) % rank for axis in graph.constants[axes].ravel()], np.int64)
    places, zeros = np.concatenate([over, over + rank]), np.zeros(2 * rank, np.int64)
    settings = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    before: list[onnx.NodeProto] = []
    if pads in graph.constants:
        zeros[places] = graph.constants[pads].ravel()
        every = graph.constant(zeros)
    else:
        every = graph.fresh("pads")
        graph.types[every] = Type(dtype=INT64, axes=(2 * rank,))
        names = [graph.constant(zeros), graph.constant(places), pads]
        before.append(make("ScatterElements", names, [every], axis=0))
    given = [data, every, value] if value else [data, every]
    return [*before, make("Pad", given, list(node.output), **settings)]
