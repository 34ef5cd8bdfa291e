"""Every lowering rule against central differences in float64, and against the builder's kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest

from p2ptrain.errors import GraphError
from p2ptrain.graph.ir import FLOAT, INT64, MICROSOFT, Graph, Type, full_name, make, to_model
from p2ptrain.graph.lowering.registry import lower, rule_names
from p2ptrain.graph.runner import session_of
from p2ptrain.graph.split import Pair, differentiate
from p2ptrain.graph.views import drop_identities

pytest.importorskip("onnxruntime.capi._pybind_state")
try:
    from onnxruntime.capi._pybind_state import GradientGraphBuilder  # noqa: F401
except ImportError:
    pytest.skip("stock onnxruntime has no gradient builder", allow_module_level=True)

erf = np.vectorize(math.erf)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A one-operator forward graph, its inputs and its meaning in numpy."""

    name: str
    lowers: str
    nodes: list[onnx.NodeProto]
    inputs: dict[str, np.ndarray]
    meaning: Callable[..., np.ndarray]
    wanted: tuple[str, ...]
    types: dict[str, tuple[int | str, ...]]
    constants: dict[str, np.ndarray]


def case(
    name: str,
    lowers: str,
    nodes: list[onnx.NodeProto],
    inputs: dict[str, np.ndarray],
    meaning: Callable[..., Any],
    wanted: tuple[str, ...] = ("x",),
    types: dict[str, tuple[int | str, ...]] | None = None,
    constants: dict[str, np.ndarray] | None = None,
) -> Case:
    return Case(
        name=name,
        lowers=f"com.microsoft.{lowers}",
        nodes=nodes,
        inputs=inputs,
        meaning=meaning,
        wanted=wanted,
        types=types or {},
        constants=constants or {},
    )


def draw(*shape: int, seed: int = 3) -> np.ndarray:
    return np.random.Generator(np.random.Philox(seed)).standard_normal(shape).astype(np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
    raised = np.exp(x - x.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def layer_norm(x: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + bias


def cross_entropy(x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    chosen = labels >= 0
    rows = np.arange(len(labels))[chosen]
    return -np.log(softmax(x))[rows, labels[chosen]].sum()


def x_shape(*axes: int | str) -> dict[str, tuple[int | str, ...]]:
    return {"x": axes, "y": axes}


CASES = [
    case(
        "gelu", "GeluGrad", [make("Gelu", ["x"], ["y"], domain=MICROSOFT)], {"x": draw(6, 5)},
        lambda x: x * 0.5 * (1 + erf(x / math.sqrt(2))), types=x_shape("tokens", 5),
    ),
    case(
        "softmax", "SoftmaxGrad_13", [make("Softmax", ["x"], ["y"], axis=-1)],
        {"x": draw(2, 3, 5)}, softmax, types=x_shape("batch", 3, 5),
    ),
    case(
        "log_softmax", "LogSoftmaxGrad_13", [make("LogSoftmax", ["x"], ["y"], axis=-1)],
        {"x": draw(4, 5)}, lambda x: np.log(softmax(x)), types=x_shape("batch", 5),
    ),
    case(
        "layer_norm", "LayerNormalizationGrad",
        [make("LayerNormalization", ["x", "scale", "bias"], ["y", "mean", "inverse"], axis=-1)],
        {"x": draw(2, 3, 6), "scale": draw(6, seed=4), "bias": draw(6, seed=5)},
        layer_norm, ("x", "scale", "bias"),
        x_shape("batch", 3, 6) | {"mean": ("batch", 3, 1), "inverse": ("batch", 3, 1)},
    ),
    case(
        "matmul", "FusedMatMul", [make("MatMul", ["x", "w"], ["y"])],
        {"x": draw(2, 3, 4), "w": draw(2, 4, 5, seed=6)}, lambda x, w: x @ w, ("x", "w"),
        {"x": ("batch", 3, 4), "w": ("batch", 4, 5), "y": ("batch", 3, 5)},
    ),
    case(
        "gather", "GatherGrad", [make("Gather", ["x", "ids"], ["y"], axis=0)],
        {"x": draw(7, 3), "ids": np.array([[1, 5, 1], [0, 1, 6]], np.int64)},
        lambda x, ids: x[ids], types={"x": (7, 3), "ids": ("batch", 3), "y": ("batch", 3, 3)},
    ),
    case(
        "slice", "SliceGrad",
        [make("Slice", ["x", "starts", "ends", "axes", "steps"], ["y"])],
        {"x": draw(7, 3)}, lambda x: x[-6:6:2],
        types={"x": (7, 3), "y": (3, 3)},
        constants={
            "starts": np.array([-6]), "ends": np.array([6]),
            "axes": np.array([0]), "steps": np.array([2]),
        },
    ),
    case(
        "cross_entropy", "SoftmaxCrossEntropyLossGrad",
        [make("SoftmaxCrossEntropyLoss", ["x", "labels"], ["y", "log"],
              reduction="sum", ignore_index=-100)],
        {"x": draw(5, 4), "labels": np.array([3, 0, -100, 1, 3], np.int64)}, cross_entropy,
        types={"x": ("tokens", 4), "labels": ("tokens",), "log": ("tokens", 4), "y": ()},
    ),
    case(
        "tanh", "TanhGrad", [make("Tanh", ["x"], ["y"])], {"x": draw(4, 5)}, lambda x: np.tanh(x),
        types=x_shape("batch", 5),
    ),
    case(
        "sigmoid", "SigmoidGrad", [make("Sigmoid", ["x"], ["y"])], {"x": draw(4, 5)},
        lambda x: 1 / (1 + np.exp(-x)), types=x_shape("batch", 5),
    ),
    case(
        "relu", "ReluGrad", [make("Relu", ["x"], ["y"])], {"x": draw(4, 5)},
        lambda x: np.maximum(x, 0), types=x_shape("batch", 5),
    ),
    case(
        "reduce_mean", "Scale", [make("ReduceMean", ["x", "axes"], ["y"], keepdims=1)],
        {"x": draw(4, 6)}, lambda x: x.mean(-1, keepdims=True),
        types={"x": ("batch", 6), "y": ("batch", 1)}, constants={"axes": np.array([-1])},
    ),
]  # fmt: skip


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


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule_agrees_with_central_differences_and_with_the_kernel(case: Case) -> None:
    shape = case.meaning(**case.inputs).shape
    cotangent = np.asarray(draw(*shape, seed=7)) if shape else np.array(0.7, np.float32)
    portable = gradients(case, portable=True, cotangent=cotangent)
    training = gradients(case, portable=False, cotangent=cotangent)
    for name in case.wanted:
        reference = central_difference(case, name, cotangent)
        scale = np.abs(reference).max()
        for found in (portable, training):
            assert np.abs(found[f"gradient.{name}"] - reference).max() < 2e-6 * scale


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_portable_form_holds_standard_operators_only(case: Case) -> None:
    pair = built(case, portable=True)
    assert {node.domain for g in (pair.forward, pair.backward) for node in g.nodes} == {""}
    for graph in (pair.forward, pair.backward):
        onnx.checker.check_model(to_model(graph), full_check=True)


def test_every_rule_is_reached_by_a_case() -> None:
    reached = {case.lowers for case in CASES} | {"com.microsoft.Gelu", "SoftmaxCrossEntropyLoss"}
    assert reached == set(rule_names())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_builder_really_leaves_the_operator_a_case_is_for(case: Case) -> None:
    pair = built(case, portable=False)
    names = {full_name(node) for node in (*pair.forward.nodes, *pair.backward.nodes)}
    assert case.lowers in names


def test_an_operator_without_a_rule_is_refused_by_name() -> None:
    graph = Graph(outputs=["y"], nodes=[make("RareGrad", ["x"], ["y"], domain=MICROSOFT)])
    with pytest.raises(GraphError, match=r"com\.microsoft\.RareGrad, which makes 'y'") as caught:
        lower(graph, set())
    assert "graph/lowering" in caught.value.hint


def test_identities_vanish_and_outputs_keep_their_names() -> None:
    graph = Graph(
        outputs=["a", "b"],
        nodes=[
            make("Neg", ["x"], ["n"]),
            make("Identity", ["n"], ["m"]),
            make("Identity", ["m"], ["a"]),
            make("Exp", ["m"], ["b"]),
        ],
    )
    drop_identities(graph)
    assert [(n.op_type, n.input[0], n.output[0]) for n in graph.nodes] == [
        ("Neg", "x", "a"),
        ("Exp", "a", "b"),
    ]
