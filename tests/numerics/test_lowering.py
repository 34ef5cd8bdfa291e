"""Every lowering rule against central differences in float64, and against the builder's kernel."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx
import pytest

from p2ptrain.bundle.operators import STANDARD
from p2ptrain.errors import GraphError
from p2ptrain.graph.decompositions import decompose
from p2ptrain.graph.ir import FLOAT, MICROSOFT, Graph, Type, full_name, make, to_model
from p2ptrain.graph.lowering.registry import lower, rule_names
from p2ptrain.graph.views import drop_identities
from p2ptrain.graph.vjp import build_gradient
from tests.lowering import (
    Case,
    Shape,
    built,
    central_difference,
    draw,
    forward_graph,
    gradients,
    run,
)
from tests.lowering_cases import CASES

pytest.importorskip("onnxruntime.capi._pybind_state")
try:
    from onnxruntime.capi._pybind_state import GradientGraphBuilder  # noqa: F401
except ImportError:
    pytest.skip("stock onnxruntime has no gradient builder", allow_module_level=True)

ROOT = math.sqrt(2 / math.pi)
TESTED_BELOW = {
    "com.microsoft.BatchNormInternal",  # with its gradient, which needs it
    "com.microsoft.BroadcastGradientArgs",
    "com.microsoft.FastGelu",
    "com.microsoft.QuickGelu",
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule_agrees_with_central_differences_and_with_the_kernel(case: Case) -> None:
    shape = case.meaning(**case.inputs).shape
    cotangent = np.asarray(draw(*shape, seed=7)) if shape else np.array(0.7, np.float32)
    forms = [gradients(case, portable=True, cotangent=cotangent)]
    if case.trains:
        forms.append(gradients(case, portable=False, cotangent=cotangent))
    for name in case.wanted:
        reference = central_difference(case, name, cotangent)
        scale = np.abs(reference).max()
        for found in forms:
            assert np.abs(found[f"gradient.{name}"] - reference).max() < case.tolerance * scale


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_portable_form_holds_standard_operators_only(case: Case) -> None:
    pair = built(case, portable=True)
    assert {node.domain for g in (pair.forward, pair.backward) for node in g.nodes} == {""}
    for graph in (pair.forward, pair.backward):
        assert {(node.domain, node.op_type) for node in graph.nodes} <= STANDARD
        onnx.checker.check_model(to_model(graph), full_check=True)


def test_every_rule_has_a_case() -> None:
    assert {case.lowers for case in CASES} | TESTED_BELOW == set(rule_names())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_builder_really_leaves_the_operator_a_case_is_for(case: Case) -> None:
    forward = forward_graph(case)
    decompose(forward)
    whole = build_gradient(forward, wanted=case.wanted)
    assert case.lowers in {full_name(node) for node in whole.nodes}


@pytest.mark.parametrize(
    ("kind", "meaning"),
    [
        ("QuickGelu", lambda x: x / (1 + np.exp(-1.702 * x))),
        ("FastGelu", lambda x: 0.5 * x * (1 + np.tanh(ROOT * (x + 0.044715 * x**3)))),
    ],
)
def test_an_activation_of_an_inference_graph_is_lowered(
    kind: str, meaning: Callable[[np.ndarray], np.ndarray]
) -> None:
    graph = Graph(outputs=["y"], nodes=[make(kind, ["x"], ["y"], domain=MICROSOFT)])
    graph.types = {name: Type(dtype=FLOAT, axes=("batch", 5)) for name in ("x", "y")}
    graph.inputs = {"x": graph.types["x"]}
    lower(graph, set())
    x = draw(4, 5) * 3
    assert np.abs(run(graph, {"x": x})["y"] - meaning(x.astype(np.float64))).max() < 1e-6


@pytest.mark.parametrize(
    ("left", "right", "taken"),
    [
        (("batch", "s", 4), ("s", 1), ([], [0, 2])),
        (("batch", 1, 4), ("batch", "s", 4), ([1], [])),
        (("batch", "s", 4), ("batch", "t", 4), ([], [])),
        ((4,), ("batch", "s", 4), ([0, 1], [])),
    ],
)
def test_broadcast_axes_are_told_from_the_symbols(
    left: Shape, right: Shape, taken: tuple[list[int], list[int]]
) -> None:
    """The builder asks at run time only where it cannot tell; the symbols can."""
    args = make("BroadcastGradientArgs", ["sa", "sb"], ["ra", "rb"], domain=MICROSOFT)
    graph = Graph(outputs=["p", "q"])
    graph.types = {"a": Type(dtype=FLOAT, axes=left), "b": Type(dtype=FLOAT, axes=right)}
    graph.inputs = dict(graph.types)
    graph.nodes = [
        make("Shape", ["a"], ["sa"]),
        make("Shape", ["b"], ["sb"]),
        args,
        make("ReduceSum", ["a", "ra"], ["p"], keepdims=1, noop_with_empty_axes=1),
        make("ReduceSum", ["b", "rb"], ["q"], keepdims=1, noop_with_empty_axes=1),
    ]
    lower(graph, set())
    found = [graph.constants[node.input[1]].tolist() for node in graph.nodes]
    assert found == list(taken)


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
