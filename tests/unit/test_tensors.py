"""Tensor files: round trip, and every way in which one can be hostile."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from p2ptrain.errors import CheckpointError, InvariantBroken, NotFound
from p2ptrain.store.tensors import read_tensors, write_tensors
from p2ptrain.training.safetensors import decode_tensors, encode_tensors

TENSORS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.array([1, -2], np.int64),
    "none": np.zeros((0, 4), np.float32),
    "scalar": np.float64(2.5).reshape(()),
    "flags": np.array([True, False]),
}


def file_of(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(
    dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_tensors_come_back_in_order_with_their_metadata(tmp_path: Path) -> None:
    write_tensors(tmp_path / "t", TENSORS, {"about": "these"})
    read = read_tensors(tmp_path / "t")
    assert list(read.tensors) == list(TENSORS)
    assert read.metadata == {"about": "these"}
    for name, tensor in TENSORS.items():
        assert read.tensors[name].dtype == tensor.dtype
        np.testing.assert_array_equal(read.tensors[name], tensor)
    with pytest.raises(ValueError, match="read-only"):
        read.tensors["b"][0, 0] = 1.0


def test_tensors_file_has_the_layout_of_the_format() -> None:
    content = b"".join(encode_tensors({"x": np.array([1.0], ">f4")}, {}))
    (length,) = struct.unpack("<Q", content[:8])
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    assert header["x"] == {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    assert content[8 + length :] == struct.pack("<f", 1.0)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 100) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 3) + b"{x}",
        file_of({"x": 3}),
        file_of({"x": entry(dtype="F99")}, b"0000"),
        file_of({"x": entry(dtype=["F32"])}, b"0000"),
        file_of({"x": entry(shape=[-1])}, b"0000"),
        file_of({"x": entry(shape=[True])}, b"0000"),
        file_of({"x": entry(shape=[1] * 9)}, b"0000"),
        file_of({"x": entry(shape=None)}, b"0000"),
        file_of({"x": entry(offsets=[0, 8])}, b"00000000"),
        file_of({"x": entry(offsets=[4, 8])}, b"00000000"),
        file_of({"x": entry(shape=[1 << 62, 1 << 62], offsets=[0, 4])}, b"0000"),
        file_of({"x": entry()}, b"000"),
        file_of({"x": entry()}, b"00000"),
        file_of({"x": entry(), "y": entry()}, b"0000"),
        file_of({"__metadata__": {"a": 1}}),
        file_of({"__metadata__": []}),
        struct.pack("<Q", 13) + b'{"x":1,"x":1}',
        struct.pack("<Q", 100_000) + b"[" * 100_000,
    ],
)
def test_tensors_refuse_damaged_content(content: bytes) -> None:
    with pytest.raises(CheckpointError, match="safetensors"):
        decode_tensors(content)


def test_tensors_refuse_dtypes_that_are_not_stored() -> None:
    with pytest.raises(InvariantBroken):
        encode_tensors({"x": np.zeros(1, np.complex64)}, {})


def test_read_tensors_reports_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        read_tensors(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_tensors(tmp_path)
