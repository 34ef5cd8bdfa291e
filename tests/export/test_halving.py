"""Backwards cut in two: what goes where, and the values that are both."""

from __future__ import annotations

import numpy as np
import onnx

from p2ptrain.graph.halving import halve
from p2ptrain.graph.ir import FLOAT, Graph, Type, make, to_model
from p2ptrain.graph.runner import Arrays, session_function

PORT = Type(dtype=FLOAT, axes=("batch", 4))
SEED, X, W = "cotangent.y", "x", "w"


def backward(nodes: list[onnx.NodeProto], outputs: dict[str, Type], inner: list[str]) -> Graph:
    inputs = {SEED: PORT, X: PORT, W: Type(dtype=FLOAT, axes=(4, 4))}
    types = {**inputs, **outputs, **dict.fromkeys(inner, PORT)}
    return Graph(inputs=dict(inputs), nodes=nodes, outputs=list(outputs), constants={}, types=types)


def run(graph: Graph, feeds: Arrays) -> Arrays:
    return session_function(to_model(graph).SerializeToString(), {})(feeds)


def assert_same(whole: Graph, gradients: list[str]) -> tuple[str, ...]:
    """Both parts give what the whole gives; the kept values."""
    generator = np.random.Generator(np.random.Philox(4))
    shapes = {SEED: (3, 4), X: (3, 4), W: (4, 4)}
    feeds = {n: generator.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    expected = run(whole, feeds)
    halves = halve(whole, gradients=gradients)
    assert halves is not None
    first = run(halves.cotangents, feeds)
    second = run(halves.gradients, {**feeds, **first})
    assert set(first) == {*(set(whole.outputs) - set(gradients)), *halves.kept}
    assert list(second) == gradients
    for name, value in expected.items():
        np.testing.assert_array_equal({**first, **second}[name], value)
    return halves.kept


def test_a_product_has_one_part_each_and_shares_what_both_read() -> None:
    whole = backward(
        [
            make("Tanh", [SEED], ["shared"]),
            make("Gemm", ["shared", W], ["cotangent.x"], transB=1),
            make("Gemm", [X, "shared"], ["gradient.w"], transA=1),
        ],
        {"cotangent.x": PORT, "gradient.w": Type(dtype=FLOAT, axes=(4, 4))},
        ["shared"],
    )
    assert assert_same(whole, ["gradient.w"]) == ("kept_0",)
    halves = halve(whole, gradients=["gradient.w"])
    assert halves is not None
    assert list(halves.gradients.inputs) == [X, "kept_0"]


def test_a_gradient_that_reads_a_cotangent_is_kept_a_copy() -> None:
    whole = backward(
        [
            make("Gemm", [SEED, W], ["cotangent.x"], transB=1),
            make("ReduceSum", ["cotangent.x"], ["gradient.b"], keepdims=0),
        ],
        {"cotangent.x": PORT, "gradient.b": Type(dtype=FLOAT, axes=())},
        [],
    )
    assert assert_same(whole, ["gradient.b"]) == ("kept_0",)


def test_a_gradient_on_the_way_to_a_cotangent_is_handed_on() -> None:
    whole = backward(
        [
            make("Gemm", [SEED, W], ["gradient.v"], transB=1),
            make("Tanh", ["gradient.v"], ["cotangent.x"]),
        ],
        {"cotangent.x": PORT, "gradient.v": PORT},
        [],
    )
    assert assert_same(whole, ["gradient.v"]) == ("kept_0",)


def test_what_is_cheap_is_made_again() -> None:
    whole = backward(
        [
            make("Mul", [SEED, X], ["scaled"]),
            make("Gemm", ["scaled", W], ["cotangent.x"], transB=1),
            make("Gemm", [X, "scaled"], ["gradient.w"], transA=1),
        ],
        {"cotangent.x": PORT, "gradient.w": Type(dtype=FLOAT, axes=(4, 4))},
        ["scaled"],
    )
    assert assert_same(whole, ["gradient.w"]) == ()


def test_nothing_is_cut_where_one_part_would_be_all() -> None:
    only = backward([make("Tanh", [SEED], ["cotangent.x"])], {"cotangent.x": PORT}, [])
    assert halve(only, gradients=[]) is None
    assert halve(only, gradients=["cotangent.x"]) is None
    assert halve(Graph(), gradients=[]) is None
