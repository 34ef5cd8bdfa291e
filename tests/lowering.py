"""What the tests of lowering rules share: one-operator graphs and how they are run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from p2ptrain.graph.ir import FLOAT, INT64, Graph, Type, to_model
from p2ptrain.graph.runner import session_of
from p2ptrain.graph.split import Pair, differentiate

Shape = tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A small forward graph from x (and others) to y, its inputs and its meaning in numpy."""

    name: str
    lowers: str
    """The operator whose rule the case is for."""
    nodes: Sequence[onnx.NodeProto]
    inputs: dict[str, np.ndarray]
    meaning: Callable[..., Any]
    wanted: tuple[str, ...] = ("x",)
    types: dict[str, Shape] = field(default_factory=dict)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    tolerance: float = 2e-6
    trains: bool = True
    """Whether onnxruntime-training itself has the kernel on a CPU."""


def draw(*shape: int, seed: int = 3) -> np.ndarray:
    return np.random.Generator(np.random.Philox(seed)).standard_normal(shape).astype(np.float32)


def forward_graph(case: Case) -> Graph:
    """The case as the exporter would hold it."""
    graph = Graph(nodes=list(case.nodes), constants=dict(case.constants), outputs=["y"])
    graph.types = {name: Type(dtype=FLOAT, axes=axes) for name, axes in case.types.items()}
    for name, value in (case.inputs | case.constants).items():
        dtype = FLOAT if value.dtype == np.float32 else INT64
        axes = case.types.get(name, value.shape)
        graph.types[name] = Type(dtype=dtype, axes=tuple(axes))
    graph.inputs = {name: graph.types[name] for name in case.inputs}
    return graph.copy()


def built(case: Case, *, portable: bool) -> Pair:
    wanted = {name: f"gradient.{name}" for name in case.wanted}
    return differentiate(forward_graph(case), wanted=wanted, reference="x", portable=portable)


def run(graph: Graph, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = session_of(to_model(graph).SerializeToString())
    names = [entry.name for entry in session.get_outputs()]
    wanted = {entry.name for entry in session.get_inputs()}
    return dict(zip(names, session.run(names, {n: feeds[n] for n in wanted}), strict=True))


def gradients(case: Case, *, portable: bool, cotangent: np.ndarray) -> dict[str, np.ndarray]:
    pair = built(case, portable=portable)
    feeds: dict[str, np.ndarray] = dict(case.inputs)
    feeds |= run(pair.forward, feeds)
    return run(pair.backward, feeds | {"cotangent.y": cotangent})


def central_difference(case: Case, name: str, cotangent: np.ndarray) -> np.ndarray:
    step = 1e-5
    exact = {
        n: v.astype(np.float64) if v.dtype == np.float32 else v for n, v in case.inputs.items()
    }
    slope = np.zeros_like(exact[name])
    for index in np.ndindex(slope.shape):
        sides = []
        for sign in (1, -1):
            moved = exact[name].copy()
            moved[index] += sign * step
            sides.append((case.meaning(**exact | {name: moved}) * cotangent).sum())
        slope[index] = (sides[0] - sides[1]) / (2 * step)
    return slope
