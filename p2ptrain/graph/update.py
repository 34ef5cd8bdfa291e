"""Optimizer update graphs: elementwise over flat vectors, with torch's semantics.

`parameter`, `gradient` and `state.<name>` have shape (n,), n dynamic; every hyperparameter is a
float32 scalar input, so one graph serves every step and every tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from p2ptrain.graph.ir import FLOAT, Graph, Type, depth_first, make

LENGTH = "n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """An update graph and what the manifest says of it."""

    name: str
    graph: Graph
    state: tuple[str, ...]
    scalars: tuple[str, ...]

    @property
    def in_place(self) -> bool:
        """Whether every output may share the buffer of the value it replaces."""
        replaced = {"new.parameter": "parameter"}
        replaced |= {f"new.state.{name}": f"state.{name}" for name in self.state}
        return all(overwrite_is_safe(self.graph, new, old) for new, old in replaced.items())


def overwrite_is_safe(graph: Graph, new: str, old: str) -> bool:
    """Whether every reader of `old` is done when the node that makes `new` writes.

    A reader is done if that node depends on it, in whatever order a runtime sorts the graph; the
    node itself may read `old`, since it is elementwise.
    """
    producers = graph.producers()
    last = producers[new]
    before: set[int] = {id(last)}
    waiting = [last]
    while waiting:
        node = waiting.pop()
        for name in node.input:
            below = producers.get(name)
            if below is not None and id(below) not in before:
                before.add(id(below))
                waiting.append(below)
    readers = graph.readers().get(old, [])
    direct = list(last.input).count(old) <= 1 or last.op_type in ("Mul", "Add", "Sub")
    return direct and old not in graph.outputs and all(id(node) in before for node in readers)


def adamw() -> Update:
    """AdamW: decoupled weight decay, bias corrections as scalars, gradient clipped first."""
    scalars = (
        "learning_rate",
        "clip_scale",
        "weight_decay",
        "beta1",
        "beta2",
        "one_minus_beta1",
        "one_minus_beta2",
        "epsilon",
        "correction1",
        "correction2_sqrt",
    )
    graph = _empty(("m", "v"), scalars)
    one = graph.constant(np.array(1.0, np.float32))
    nodes = [
        ("Mul", ("gradient", "clip_scale"), "clipped"),
        ("Mul", ("state.m", "beta1"), "m_kept"),
        ("Mul", ("clipped", "one_minus_beta1"), "m_added"),
        ("Add", ("m_kept", "m_added"), "new.state.m"),
        ("Mul", ("state.v", "beta2"), "v_kept"),
        ("Mul", ("clipped", "clipped"), "squared"),
        ("Mul", ("squared", "one_minus_beta2"), "v_added"),
        ("Add", ("v_kept", "v_added"), "new.state.v"),
        ("Sqrt", ("new.state.v",), "root"),
        ("Div", ("root", "correction2_sqrt"), "root_corrected"),
        ("Add", ("root_corrected", "epsilon"), "denominator"),
        ("Div", ("new.state.m", "denominator"), "direction"),
        ("Div", ("learning_rate", "correction1"), "step_size"),
        ("Mul", ("direction", "step_size"), "step"),
        ("Mul", ("learning_rate", "weight_decay"), "decay"),
        ("Sub", (one, "decay"), "kept_share"),
        ("Mul", ("parameter", "kept_share"), "decayed"),
        ("Sub", ("decayed", "step"), "new.parameter"),
    ]
    return _update("adamw", graph, nodes, ("m", "v"), scalars)


def sgd() -> Update:
    """SGD with momentum as torch.optim.SGD: weight decay joins the gradient, no dampening."""
    scalars = ("learning_rate", "clip_scale", "weight_decay", "momentum")
    graph = _empty(("momentum",), scalars)
    nodes = [
        ("Mul", ("gradient", "clip_scale"), "clipped"),
        ("Mul", ("parameter", "weight_decay"), "decay"),
        ("Add", ("clipped", "decay"), "total"),
        ("Mul", ("state.momentum", "momentum"), "kept"),
        ("Add", ("kept", "total"), "new.state.momentum"),
        ("Mul", ("new.state.momentum", "learning_rate"), "step"),
        ("Sub", ("parameter", "step"), "new.parameter"),
    ]
    return _update("sgd", graph, nodes, ("momentum",), scalars)


def _empty(state: tuple[str, ...], scalars: tuple[str, ...]) -> Graph:
    vector, single = Type(dtype=FLOAT, axes=(LENGTH,)), Type(dtype=FLOAT, axes=())
    vectors = ["parameter", "gradient", *(f"state.{name}" for name in state)]
    graph = Graph()
    graph.inputs = dict.fromkeys(vectors, vector) | dict.fromkeys(scalars, single)
    graph.outputs = ["new.parameter", *(f"new.state.{name}" for name in state)]
    graph.types = {**graph.inputs, **dict.fromkeys(graph.outputs, vector)}
    return graph


def _update(
    name: str,
    graph: Graph,
    nodes: Sequence[tuple[str, tuple[str, ...], str]],
    state: tuple[str, ...],
    scalars: tuple[str, ...],
) -> Update:
    made: list[onnx.NodeProto] = [make(op, inputs, [output]) for op, inputs, output in nodes]
    graph.nodes = made
    depth_first(graph)
    return Update(name=name, graph=graph, state=state, scalars=scalars)
