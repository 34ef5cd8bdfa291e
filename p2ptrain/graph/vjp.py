"""The vector-Jacobian product of one segment, by onnxruntime-training's gradient builder.

This is the only module that touches the builder's private import.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

import numpy as np
import onnx

from p2ptrain.errors import GraphError
from p2ptrain.graph.differentiable import carrying, on_path, refuse_unknown, stops
from p2ptrain.graph.ir import FLOAT, Graph, Type, attribute, from_model, make, to_model
from p2ptrain.graph.lowering.windows import fixed
from p2ptrain.graph.shapes import infer_missing
from p2ptrain.graph.stand_ins import StandIn, find_stand_ins, has_slope, slope_names

SURROGATE: Final = "surrogate"
NEW: Final = "new."
"""Outputs of this prefix are new values of state (running statistics): no cotangent."""


def cotangent(name: str) -> str:
    """The backward graph's name for the cotangent of a port."""
    return f"cotangent.{name}"


def differentiable_outputs(forward: Graph) -> list[str]:
    """The outputs that have a cotangent: real ones that are not state."""
    return [
        name
        for name in forward.outputs
        if forward.types[name].dtype == FLOAT and not name.startswith(NEW)
    ]


def build_gradient(forward: Graph, *, wanted: Sequence[str]) -> Graph:
    """Forward and gradient nodes in one graph.

    Every output gets `Identity(output) -> seed`; the surrogate is the sum of seed times
    cotangent; afterwards readers of the seed's gradient read the cotangent instead. Redirecting
    the output's own gradient would be silently wrong where other nodes read the output.

    Operators without a gradient of their own are first replaced by stand-ins, and put back
    afterwards; outputs that are integers or state have no cotangent.

    Args:
        forward: Inputs, nodes and outputs under local names; slopes are added to its nodes.
        wanted: Inputs whose gradients are asked for.

    Returns:
        A graph whose outputs are the forward's, then the gradients in the order of `wanted`
        under the builder's names `<name>_grad`, with inputs `cotangent.<output>` added.

    Raises:
        GraphError: an operator without a gradient, by name; or the builder refused the graph,
            its own message is quoted.
    """
    outputs = differentiable_outputs(forward)
    if not outputs:
        raise GraphError("the segment has no output that can be differentiated")
    slice_partly_used_splits(forward, carrying(forward, outputs))
    _tell_apart(forward)
    path = on_path(forward, wanted, outputs)
    refuse_unknown(path, slope_names())
    replaced = find_stand_ins(forward, path, stops)
    _take_in(forward, replaced)
    seeded, seeds = _with_surrogate(_shown(forward, replaced), outputs)
    seeded.prune()
    graph = from_model(_run_builder(seeded, wanted))
    _put_back(graph, forward, replaced)
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
    infer_missing(graph)
    return graph


def _take_in(forward: Graph, replaced: Sequence[StandIn]) -> None:
    """Let the forward graph make the slopes as well."""
    true = {name for one in replaced for node in one.true for name in node.output if name}
    forward.nodes = [node for node in forward.nodes if true.isdisjoint(node.output)]
    forward.nodes += [node for one in replaced for node in one.true]
    forward.sort()


def _shown(forward: Graph, replaced: Sequence[StandIn]) -> Graph:
    """The forward graph as the builder may see it: stand-ins for what it cannot differentiate."""
    graph = forward.copy()
    true = {name for one in replaced for node in one.true for name in node.output}
    graph.nodes = [node for node in graph.nodes if true.isdisjoint(node.output)]
    graph.nodes += [node for one in replaced for node in one.linear]
    for name in dict.fromkeys(name for one in replaced for name in one.given):
        graph.inputs[name] = graph.types[name]
    graph.sort()
    return graph


def _tell_apart(graph: Graph) -> None:
    """Give an operand that a node reads twice a second name: the builder names gradients by it."""
    for node in [node for node in graph.nodes if not has_slope(node)]:
        for index, name in enumerate(node.input):
            again = name in list(node.input)[:index] and name not in graph.constants
            if again and name in graph.types and graph.types[name].dtype == FLOAT:
                twin = graph.fresh("twin")
                graph.types[twin] = graph.types[name]
                graph.nodes.append(make("Identity", [name], [twin]))
                node.input[index] = twin
    graph.sort()


def slice_partly_used_splits(graph: Graph, useful: set[str]) -> None:
    """Slices for a Split of which some part has no cotangent.

    The builder would join the cotangents of the others, and be silently wrong.
    """
    nodes = []
    for node in graph.nodes:
        used = [name for name in node.output if name in useful]
        if node.op_type != "Split" or not used or len(used) == len(node.output):
            nodes.append(node)
            continue
        axis = int(attribute(node, "axis", 0)) % len(graph.axes(node.input[0]))
        start = 0
        for name in node.output:
            size = fixed(graph.axes(name)[axis])
            bounds = [graph.constant(np.array([v])) for v in (start, start + size, axis)]
            nodes.append(make("Slice", [node.input[0], *bounds], [name]))
            start += size
    graph.nodes = nodes


def _put_back(graph: Graph, forward: Graph, replaced: Sequence[StandIn]) -> None:
    """The true operators for the stand-ins, and what only they or state outputs need."""
    linear = {name for one in replaced for node in one.linear for name in node.output}
    graph.nodes = [node for node in graph.nodes if linear.isdisjoint(node.output)]
    for node in (node for one in replaced for node in one.linear):
        # The builder may ask for the shape of a product: one of its factors has the same.
        twins = [n for n in node.input if forward.types[n].axes == forward.axes(node.output[0])]
        if node.output[0] not in {name for one in forward.nodes for name in one.output} and twins:
            graph.rename(node.output[0], twins[0])
    shown = {node.output[0]: node for node in graph.nodes}
    known = {name for node in forward.nodes for name in node.output}
    later = [node for node in graph.nodes if known.isdisjoint(node.output)]
    graph.nodes = [*(shown.get(node.output[0], node) for node in forward.nodes), *later]
    graph.inputs = {name: given for name, given in graph.inputs.items() if name not in known}
    graph.inputs = {**forward.inputs, **graph.inputs}
    graph.constants = {**forward.constants, **graph.constants}


def _with_surrogate(forward: Graph, outputs: Sequence[str]) -> tuple[Graph, dict[str, str]]:
    seeded = forward.copy()
    seeds, terms = {}, []
    for output in outputs:
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
    seeded.types[SURROGATE] = Type(dtype=FLOAT, axes=())
    seeded.outputs = [*outputs, SURROGATE]
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
