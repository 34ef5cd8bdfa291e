"""Compare a source's traced graphs with its reference, node by node in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from p2ptrain.graph.ir import Graph
from p2ptrain.graph.measured import gradient_error, relative_error
from p2ptrain.graph.source import LOGITS, Source
from p2ptrain.graph.sources.onnx_reference import OnnxReference

Arrays = dict[str, np.ndarray[Any, Any]]


def values_of(source: Source) -> Arrays:
    """Seeded parameters and running values; variances are positive."""
    generator = np.random.Generator(np.random.Philox(21))
    values: Arrays = {}
    for name, initialiser in source.initialisers.items():
        shape = tuple(int(axis) for axis in source.training.graph.axes(name))
        drawn = (0.2 * generator.standard_normal(shape)).astype(np.float32)
        values[name] = np.abs(drawn) + np.float32(0.5) if initialiser.kind == "ones" else drawn
    return values


def masks_of(source: Source) -> list[np.ndarray[Any, Any]]:
    """One mask per dropout of the training graph, in its order."""
    generator = np.random.Generator(np.random.Philox(22))
    sizes: dict[Any, int] = {"batch": 3, "sequence": source.data.context}
    masks = []
    for node in source.training.graph.nodes:
        if node.op_type == "Dropout":
            axes = source.training.graph.axes(node.input[0])
            shape = tuple(sizes.get(axis, axis) for axis in axes)
            masks.append((generator.random(shape) < 0.8).astype(np.float32) / np.float32(0.8))
    return masks


def traced_reference(source: Source, graph: Graph) -> OnnxReference:
    """A traced graph up to its logits, run by the reference for ONNX files."""
    headless = graph.copy()
    headless.outputs = [LOGITS]
    headless.prune()
    return OnnxReference(
        graph=headless,
        data_inputs=source.data_inputs,
        parameters=source.training.parameters,
        loss=source.loss,
    )


def assert_traced_as_the_module(source: Source, *, dropouts: int, error_max: float = 2e-6) -> None:
    """Loss, every gradient, running values and inference of the traces equal the module's."""
    values, masks = values_of(source), masks_of(source)
    assert len(masks) == dropouts
    theirs = source.reference.step(values, source.example, masks)
    training = traced_reference(source, source.training.graph)
    ours = training.step(values, source.example, masks)
    assert abs(ours.loss - theirs.loss) <= error_max * abs(theirs.loss)
    assert set(theirs.gradients) == set(source.training.parameters)
    assert_close(ours.gradients, theirs.gradients, error_max)
    assert set(ours.running) == set(theirs.running) == running_names(source)
    if ours.running:
        assert relative_error(ours.running, theirs.running)[0] <= error_max
    logits = traced_reference(source, source.inference.graph).infer(values, source.example)
    expected = source.reference.infer(values, source.example)
    assert relative_error({"logits": logits}, {"logits": expected})[0] < 1e-4


def assert_close(ours: Mapping[str, Any], theirs: Mapping[str, Any], error_max: float) -> None:
    error, worst = gradient_error(dict(ours), dict(theirs))
    assert error <= error_max, worst
    assert any(np.abs(value).max() > 0 for value in theirs.values())


def running_names(source: Source) -> set[str]:
    known = {*source.data_inputs, *source.training.parameters, "labels", "loss_weight"}
    return set(source.training.graph.inputs) - known
