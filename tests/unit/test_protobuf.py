"""Weights appended as protobuf bytes give a model that onnx and onnxruntime load."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from p2ptrain.bundle.protobuf import (
    ExternalInitialiser,
    append_externals,
    append_initialisers,
)
from p2ptrain.errors import BundleError

FLOAT = onnx.TensorProto.FLOAT


def model() -> bytes:
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "block.0.weight"], ["y"])],
        "g",
        [
            helper.make_tensor_value_info("x", FLOAT, ["n", 300]),
            helper.make_tensor_value_info("block.0.weight", FLOAT, [300]),
        ],
        [helper.make_tensor_value_info("y", FLOAT, ["n", 300])],
    )
    return helper.make_model(
        graph, ir_version=8, opset_imports=[helper.make_opsetid("", 18)]
    ).SerializeToString()


@pytest.mark.parametrize("dtype", ["float32", "int64", "int32", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 200)])
def test_appended_tensors_are_read_back_equal(dtype: str, shape: tuple[int, ...]) -> None:
    value = np.arange(np.prod(shape, dtype=int), dtype=np.int64).reshape(shape).astype(dtype)
    merged = onnx.load_model_from_string(b"".join(append_initialisers(model(), [("t", value)])))
    found = numpy_helper.to_array(merged.graph.initializer[0])
    assert merged.graph.initializer[0].name == "t"
    assert found.dtype == value.dtype
    assert found.shape == shape
    assert np.array_equal(found, value)
    assert len(merged.graph.node) == 1


def test_a_model_with_appended_weights_runs_without_being_fed_them() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    weight = np.linspace(-1, 1, 300, dtype=np.float32)
    content = b"".join(append_initialisers(model(), [("block.0.weight", weight)]))
    onnx.checker.check_model(onnx.load_model_from_string(content), full_check=True)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    x = np.ones((2, 300), np.float32)
    assert np.array_equal(session.run(["y"], {"x": x})[0], x + weight)


def test_strided_and_big_endian_arrays_are_written_in_order() -> None:
    value = np.arange(12, dtype=">i4").reshape(3, 4).T
    merged = onnx.load_model_from_string(b"".join(append_initialisers(model(), [("t", value)])))
    assert np.array_equal(numpy_helper.to_array(merged.graph.initializer[0]), value)


def test_a_dtype_without_a_place_is_refused() -> None:
    with pytest.raises(BundleError, match="complex64"):
        b"".join(append_initialisers(model(), [("t", np.zeros(2, np.complex64))]))


def test_a_model_over_two_gigabytes_is_refused_before_it_is_written() -> None:
    huge = np.broadcast_to(np.uint8(0), (1 << 31,))
    pieces = append_initialisers(model(), [("t", huge)])
    assert next(pieces) == model()
    with pytest.raises(BundleError, match="2 GiB"):
        next(pieces)


def test_external_constants_are_declared_by_their_place_in_a_file() -> None:
    array = np.zeros((3, 200), np.int32)
    external = ExternalInitialiser(name="t", array=array, file_name="w.bin", offset=4096)
    (found,) = onnx.load_model_from_string(append_externals(model(), [external])).graph.initializer
    assert (found.name, tuple(found.dims), found.data_type) == ("t", (3, 200), 6)
    assert found.data_location == onnx.TensorProto.EXTERNAL
    places = {entry.key: entry.value for entry in found.external_data}
    assert places == {"location": "w.bin", "offset": "4096", "length": "2400"}
