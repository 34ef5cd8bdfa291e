"""Pads between transpositions, which onnxruntime would pull across them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from p2ptrain.errors import GraphError
from p2ptrain.graph.ir import Graph, Type, make, to_model
from p2ptrain.graph.kinds import Files
from p2ptrain.graph.pads import state_all_axes
from p2ptrain.graph.runner import session_of

pytestmark = pytest.mark.export

FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
X = np.arange(2 * 3 * 4 * 6, dtype=np.float32).reshape(2, 3, 4, 6)
WIDER = np.concatenate([np.zeros((2, 3, 4, 1), np.float32), X[..., :5]], -1)


def between(*, computed: bool = False) -> Graph:
    """The backward of a partial rotation: x moved on by one along its last axis, of a value that
    comes transposed, is divided and joined, and goes on transposed."""
    typed = {name: Type(dtype=FLOAT, axes=("batch", 4, 6, 3)) for name in ("x", "y")}
    graph = Graph(inputs={"x": typed["x"]}, outputs=["y"], types=dict(typed))
    for name, last in (("t", 6), ("a", 5), ("b", 1), ("p", 6)):
        graph.types[name] = Type(dtype=FLOAT, axes=("batch", 3, 4, last))
    sizes = graph.constant(np.array([5, 1], np.int64))
    pads = graph.constant(np.array([1, 0], np.int64))
    axis = graph.constant(np.array([-1], np.int64))
    if computed:
        graph.inputs["pads"] = graph.types["pads"] = Type(dtype=INT64, axes=(2,))
        pads = "pads"
    graph.nodes = [
        make("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]),
        make("Split", ["t", sizes], ["a", "b"], axis=-1),
        make("Pad", ["a", pads, "", axis], ["p"]),
        make("Transpose", ["p"], ["y"], perm=[0, 2, 3, 1]),
    ]
    return graph


def run(content: bytes, **feeds: np.ndarray) -> np.ndarray:
    session = session_of(content)
    names = {entry.name for entry in session.get_inputs()}
    given = {"x": X.transpose(0, 2, 3, 1), **feeds}
    return session.run(["y"], {name: value for name, value in given.items() if name in names})[0]


@pytest.mark.parametrize("computed", [False, True])
def test_a_stored_graph_states_the_pads_of_all_axes(computed: bool) -> None:
    files = Files()
    content = files.contents[files.put(between(computed=computed), "between")]
    found = run(content, pads=np.array([1, 0], np.int64))
    np.testing.assert_array_equal(found, WIDER.transpose(0, 2, 3, 1))
    (pad,) = (node for node in onnx.load_from_string(content).graph.node if node.op_type == "Pad")
    assert len(pad.input) == 2


def test_another_pad_is_left_alone() -> None:
    graph = between()
    graph.nodes[-1:] = [make("Identity", ["p"], ["y"])]
    graph.types["y"] = graph.types["p"]
    before = to_model(graph).SerializeToString(deterministic=True)
    state_all_axes(graph)
    assert to_model(graph).SerializeToString(deterministic=True) == before


def test_what_onnxruntime_refuses_is_a_sentence() -> None:
    graph = between()
    graph.nodes[0].op_type = "Transposition"
    with pytest.raises(GraphError, match="refuses a graph that was made of the model") as refused:
        session_of(to_model(graph).SerializeToString())
    assert "report" in refused.value.hint
