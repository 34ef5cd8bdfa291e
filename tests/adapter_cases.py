"""A small canonical graph with every way of reading a matrix, for tests of adapters."""

from __future__ import annotations

import numpy as np

from p2ptrain.graph.check import session_of
from p2ptrain.graph.fine_tuning import Lora
from p2ptrain.graph.ir import FLOAT, INT64, Graph, Type, make, to_model

SHAPES = {
    "table": (7, 6),
    "query.weight": (4, 6),
    "query.bias": (4,),
    "mixer": (4, 6),
    "twice": (6, 6),
    "norm": (6,),
    "unread": (3, 3),
}
"""query is (out, in), as torch has it, mixer (in, out); `twice` is read by two linears."""
PARAMETERS = tuple(SHAPES)


def small_graph() -> Graph:
    """ids -> table -> twice, twice -> query -> mixer -> product with the table."""
    types = {
        **{name: Type(dtype=FLOAT, axes=shape) for name, shape in SHAPES.items()},
        "ids": Type(dtype=INT64, axes=("batch",)),
        **{n: Type(dtype=FLOAT, axes=("batch", 6)) for n in ("x", "a", "b", "m", "scaled")},
        "q": Type(dtype=FLOAT, axes=("batch", 4)),
        "y": Type(dtype=FLOAT, axes=("batch", 7)),
    }
    nodes = [
        make("Gather", ["table", "ids"], ["x"]),
        make("Gemm", ["x", "twice"], ["a"], transB=1),
        make("Gemm", ["a", "twice"], ["b"], transB=1),
        make("Gemm", ["b", "query.weight", "query.bias"], ["q"], transB=1),
        make("Gemm", ["q", "mixer"], ["m"]),
        make("Mul", ["m", "norm"], ["scaled"]),
        make("Gemm", ["scaled", "table"], ["y"], transB=1),
    ]
    inputs = {name: types[name] for name in ("ids", *PARAMETERS)}
    return Graph(inputs=inputs, nodes=nodes, outputs=["y"], types=types)


def lora(*targets: str, rank: int = 2, alpha: float = 3.0) -> Lora:
    return Lora(rank=rank, alpha=alpha, targets=targets)


def drawn(graph: Graph, seed: int = 5) -> dict[str, np.ndarray]:
    generator = np.random.Generator(np.random.Philox(seed))
    values: dict[str, np.ndarray] = {
        name: generator.standard_normal(kind.axes).astype(np.float32)
        for name, kind in graph.inputs.items()
        if kind.dtype == FLOAT
    }
    return {**values, "ids": np.array([3, 0, 6], np.int64)}


def run(graph: Graph, values: dict[str, np.ndarray]) -> np.ndarray:
    session = session_of(to_model(graph).SerializeToString())
    found: np.ndarray = session.run(["y"], {name: values[name] for name in graph.inputs})[0]
    return found
