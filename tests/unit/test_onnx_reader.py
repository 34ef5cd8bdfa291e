"""The reader sees in an ONNX file what the onnx library put there, and nothing unbounded."""

from __future__ import annotations

import tracemalloc

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from p2ptrain import limits
from p2ptrain.bundle.onnx_reader import Constant, GraphValue, Node, read_graph
from p2ptrain.errors import BundleError

FLOAT = TensorProto.FLOAT


def model(
    *initialisers: onnx.TensorProto, nodes: list[onnx.NodeProto] | None = None
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes if nodes is not None else [helper.make_node("Clip", ["x", "", "c"], ["y"], name="n")],
        "g",
        [
            helper.make_tensor_value_info("x", FLOAT, ["batch", 3, None]),
            helper.make_tensor_value_info("anything", TensorProto.BOOL, None),
        ],
        [helper.make_tensor_value_info("y", FLOAT, [])],
        list(initialisers),
        doc_string="words",
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, ir_version=8, opset_imports=opsets, producer_name="p")


def refused(content: bytes, match: str) -> None:
    with pytest.raises(BundleError, match=match):
        read_graph(content)


def test_graph_is_read_as_it_was_written() -> None:
    nodes = [
        helper.make_node("Clip", ["x", "", "c"], ["y"], name="n"),
        helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(np.ones(2))),
        helper.make_node("GatherGrad", ["x"], ["z"], domain="com.microsoft", axis=-1, f=[1.0, 2.0]),
        helper.make_node("Add", ["y", "k"], ["w"], domain="ai.onnx"),
    ]
    found = read_graph(model(nodes=nodes).SerializeToString())
    assert (found.ir, dict(found.opsets)) == (8, {"": 18, "com.microsoft": 1})
    assert found.inputs == (
        GraphValue(name="x", dtype="float32", axes=("batch", 3, None)),
        GraphValue(name="anything", dtype="bool", axes=None),
    )
    assert found.outputs == (GraphValue(name="y", dtype="float32", axes=()),)
    assert found.nodes == (
        Node(domain="", operator="Clip", inputs=("x", "", "c"), outputs=("y",), attributes=()),
        Node(domain="", operator="Constant", inputs=(), outputs=("k",), attributes=("value",)),
        Node(
            domain="com.microsoft", operator="GatherGrad", inputs=("x",), outputs=("z",),
            attributes=("axis", "f"),
        ),
        Node(domain="", operator="Add", inputs=("y", "k"), outputs=("w",), attributes=()),
    )  # fmt: skip


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize(
    ("code", "dtype"),
    [(1, "float32"), (2, "uint8"), (3, "int8"), (6, "int32"), (7, "int64"), (9, "bool"),
     (11, "float64")],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(), (2,), (2, 3), (0,)])
def test_constants_of_every_kind_are_measured(
    raw: bool, code: int, dtype: str, shape: tuple[int, ...]
) -> None:
    values = np.ones(shape, dtype)
    tensor = (
        numpy_helper.from_array(values, "c")
        if raw
        else helper.make_tensor("c", code, shape, values.reshape(-1).tolist())
    )
    (found,) = read_graph(model(tensor).SerializeToString()).initialisers
    integers = (1,) * values.size if dtype == "int64" and len(shape) < 2 else None
    assert found == Constant(name="c", dtype=dtype, shape=shape, integers=integers)


@pytest.mark.parametrize("raw", [False, True])
def test_short_integers_keep_their_signs(raw: bool) -> None:
    values = np.array([-1, 0, 1 << 40, -(1 << 62)])
    tensor = (
        numpy_helper.from_array(values, "c")
        if raw
        else helper.make_tensor("c", TensorProto.INT64, (4,), values.tolist())
    )
    (found,) = read_graph(model(tensor).SerializeToString()).initialisers
    assert found.integers == tuple(values.tolist())


def tensor(**changes: object) -> bytes:
    made = TensorProto(name="c", data_type=FLOAT, dims=[2], raw_data=bytes(8))
    for name, value in changes.items():
        made.ClearField(name)
        if isinstance(value, list):
            getattr(made, name).extend(value)
        elif value is not None:
            setattr(made, name, value)
    return model(made).SerializeToString()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"raw_data": bytes(7)}, "does not hold the 2 elements"),
        ({"raw_data": None}, "does not hold the 2 elements"),
        ({"float_data": [1.0, 2.0]}, "data of another type"),
        ({"raw_data": None, "int32_data": [1, 2]}, "data of another type"),
        ({"raw_data": None, "float_data": [1.0]}, "does not hold"),
        ({"data_type": TensorProto.STRING}, "dtype that no graph may have: 8"),
        ({"data_type": 0}, "dtype that no graph may have: 0"),
        ({"dims": [-2]}, "an axis in the graph has size"),
        ({"dims": [1 << 62]}, "an axis in the graph has size"),
        ({"dims": [1 << 20, 1 << 20]}, "over the limit"),
        ({"dims": [1] * 9}, "more than 8 shape"),
        ({"data_location": TensorProto.EXTERNAL}, "lies in another file"),
        ({"name": "n" * 2000}, "a name in the graph has 2000 bytes"),
        ({"string_data": [b"x"]}, "tensor has a field 6"),
    ],
)
def test_bad_constant_is_refused(changes: dict[str, object], said: str) -> None:
    refused(tensor(**changes), said)


def test_bad_constant_within_a_node_is_refused_as_well() -> None:
    value = TensorProto(name="c", data_type=FLOAT, dims=[1 << 30])
    nodes = [helper.make_node("ConstantOfShape", ["x"], ["y"], value=value)]
    refused(model(nodes=nodes).SerializeToString(), "does not hold the 1073741824 elements")


def test_sequences_and_second_models_are_refused() -> None:
    made = model()
    made.graph.input.append(helper.make_tensor_sequence_value_info("s", FLOAT, [1]))
    refused(made.SerializeToString(), "type has a field 4")
    refused(model().SerializeToString() * 2, "more than 1 ir")
    refused(b"", "has no graph")


@pytest.mark.parametrize(
    "content",
    [b"\x0b", b"\x3a\x05", b"\x3a", b"\xff" * 20, b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"],
)
def test_ill_formed_files_are_refused(content: bytes) -> None:
    with pytest.raises(BundleError):
        read_graph(content)


def test_lists_and_files_over_their_limits_are_refused() -> None:
    nodes = [helper.make_node("Sum", ["x"] * (limits.NODE_VALUES_MAX + 1), ["y"])]
    refused(model(nodes=nodes).SerializeToString(), "more than 4096 input")
    refused(bytes(limits.GRAPH_BYTES_MAX + 1), "over the limit")


def test_a_file_of_many_parts_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "GRAPH_FIELDS_MAX", 1000)
    refused(b"\x12\x00" * 1001, "too many parts")


def test_memory_follows_the_file_and_not_what_it_claims() -> None:
    claims = model(TensorProto(name="c", data_type=FLOAT, dims=[1 << 15, 1 << 15]))
    content = claims.SerializeToString()
    tracemalloc.start()
    try:
        refused(content, "does not hold")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000
