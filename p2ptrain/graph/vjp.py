"""The vector-Jacobian product of one segment, by onnxruntime-training's gradient builder.

This is the only module that touches the builder's private import.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

import onnx

from p2ptrain.errors import GraphError
from p2ptrain.graph.ir import Graph, from_model, make, to_model

SURROGATE: Final = "surrogate"


def cotangent(name: str) -> str:
    """The backward graph's name for the cotangent of a port."""
    return f"cotangent.{name}"


def build_gradient(forward: Graph, *, wanted: Sequence[str]) -> Graph:
    """Forward and gradient nodes in one graph.

    Every output gets `Identity(output) -> seed`; the surrogate is the sum of seed times
    cotangent; afterwards readers of the seed's gradient read the cotangent instead. Redirecting
    the output's own gradient would be silently wrong where other nodes read the output.

    Args:
        forward: Inputs, nodes and outputs under local names.
        wanted: Inputs whose gradients are asked for.

    Returns:
        A graph whose outputs are the forward's, then the gradients in the order of `wanted`
        under the builder's names `<name>_grad`, with inputs `cotangent.<output>` added.

    Raises:
        GraphError: the builder refused the graph; its own message is quoted.
    """
    seeded, seeds = _with_surrogate(forward)
    graph = from_model(_run_builder(seeded, wanted))
    # The builder states fewer types than are known here.
    graph.types = {**graph.types, **seeded.types}
    for name in wanted:
        graph.types[f"{name}_grad"] = forward.types[name]
    for output, seed in seeds.items():
        _cut_at_seed(graph, f"{seed}_grad", cotangent(output))
    graph.outputs = [*forward.outputs, *(f"{name}_grad" for name in wanted)]
    _type_gradients(graph, forward)
    graph.prune()
    graph.sort()
    return graph


def _with_surrogate(forward: Graph) -> tuple[Graph, dict[str, str]]:
    seeded = forward.copy()
    seeds, terms = {}, []
    for output in forward.outputs:
        seed, incoming, term = f"{output}_seed", cotangent(output), f"{output}_term"
        for name in (seed, incoming):
            seeded.types[name] = forward.types[output]
        seeded.inputs[incoming] = forward.types[output]
        seeded.nodes += [
            make("Identity", [output], [seed]),
            make("Mul", [seed, incoming], [f"{term}_product"]),
            make("ReduceSum", [f"{term}_product"], [term], keepdims=0),
        ]
        seeded.types[f"{term}_product"] = forward.types[output]
        seeds[output] = seed
        terms.append(term)
    total = terms[0]
    for index, term in enumerate(terms[1:]):
        seeded.nodes.append(make("Add", [total, term], [f"total_{index}"]))
        total = f"total_{index}"
    seeded.nodes.append(make("Identity", [total], [SURROGATE]))
    scalar = forward.types[forward.outputs[0]]
    seeded.types[SURROGATE] = type(scalar)(dtype=scalar.dtype, axes=())
    seeded.outputs = [*forward.outputs, SURROGATE]
    return seeded, seeds


def _run_builder(seeded: Graph, wanted: Sequence[str]) -> onnx.ModelProto:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        from onnxruntime.capi import _pybind_state as private

        builder_type = private.GradientGraphBuilder
    except (ImportError, AttributeError) as error:
        raise GraphError(
            "the gradient builder of onnxruntime-training is not installed",
            hint="pip install 'p2ptrain[export]' on x86-64 Linux, Python 3.11 or 3.12",
        ) from error
    values = [name for node in seeded.nodes for name in node.output if name in seeded.types]
    model = to_model(seeded, values=dict.fromkeys(values))
    try:
        builder = builder_type(
            model.SerializeToString(), {SURROGATE, *seeded.outputs}, set(wanted), SURROGATE
        )
        builder.build()
        return onnx.load_model_from_string(builder.get_model())
    except Exception as error:  # the builder raises its own untyped exceptions
        raise GraphError(f"the gradient builder refused the segment: {error}") from error


def _cut_at_seed(graph: Graph, seed_gradient: str, incoming: str) -> None:
    graph.nodes = [node for node in graph.nodes if seed_gradient not in node.output]
    graph.rename(seed_gradient, incoming)


def _type_gradients(graph: Graph, forward: Graph) -> None:
    """A gradient has the type of its value: `v3_grad`, `v3_grad_1`, ..."""
    for node in graph.nodes:
        for name in node.output:
            base, separator, _ = name.rpartition("_grad")
            if separator and base in forward.types:
                graph.types[name] = forward.types[base]
