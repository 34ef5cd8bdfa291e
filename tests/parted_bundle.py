"""Any hand-made bundle with its backwards in two parts as well, cut as the exporter does."""

from __future__ import annotations

import dataclasses

import onnx
from onnx import helper

from p2ptrain.bundle.manifest import BackwardParts, GraphFile, GraphPair, SegmentKind, Value
from p2ptrain.graph.halving import Halves, halve
from p2ptrain.graph.ir import IR_VERSION, OPSET, Graph, Type, from_model, to_model
from p2ptrain.ids import Digest
from p2ptrain.store.bundles import Bundle, bundle_from_parts
from tests.bundles import GraphStore, graph_files


def parted_bundle(bundle: Bundle) -> Bundle:
    """The same model; every portable backward that gives both also has its two parts."""
    store = GraphStore()
    store.graphs = dict(graph_files(bundle))
    kinds = {
        name: dataclasses.replace(
            kind, forms={"portable": _in_parts(kind, kind.forms["portable"], store)}
        )
        for name, kind in bundle.manifest.kinds.items()
    }
    files = {
        digest: GraphFile(bytes=len(content), opset=OPSET, ir=IR_VERSION, dtype="float32")
        for digest, content in store.graphs.items()
    }
    manifest = dataclasses.replace(bundle.manifest, kinds=kinds, graphs=files)
    return bundle_from_parts(manifest.to_bytes(), store.graphs)


def _in_parts(kind: SegmentKind, pair: GraphPair, store: GraphStore) -> GraphPair:
    halves = _halves(store.graphs[Digest(pair.backward)], kind)
    if halves is None:
        return pair
    frozen = {value.name for value in kind.parameters} - {
        name.removeprefix("gradient.") for name in halves.gradients.outputs
    }
    parts = BackwardParts(
        cotangents=store.add(_bytes(halves.cotangents, frozen)),
        gradients=store.add(_bytes(halves.gradients, frozen)),
        kept=tuple(
            Value(name=name, shape=tuple(map(str, halves.cotangents.axes(name))))
            for name in halves.kept
        ),
    )
    return dataclasses.replace(pair, parts=parts)


def _halves(content: bytes, kind: SegmentKind) -> Halves | None:
    model = onnx.load_model_from_string(content)
    declared = {value.name for value in model.graph.input}
    for value in kind.parameters:  # a frozen one is read without being declared
        if value.name not in declared:
            shape = [int(axis) for axis in value.shape]
            model.graph.input.append(
                helper.make_tensor_value_info(value.name, onnx.TensorProto.FLOAT, shape)
            )
    graph = from_model(onnx.shape_inference.infer_shapes(model))
    for name in {name for node in graph.nodes for name in node.output} - graph.types.keys():
        graph.types[name] = Type(dtype=onnx.TensorProto.FLOAT, axes=())
    gradients = [name for name in graph.outputs if name.startswith("gradient.")]
    return halve(graph, gradients=gradients)


def _bytes(graph: Graph, frozen: set[str]) -> bytes:
    declared = graph.copy()
    for name in frozen:
        declared.inputs.pop(name, None)
    content: bytes = to_model(declared).SerializeToString(deterministic=True)
    return content
