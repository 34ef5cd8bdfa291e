"""Any tensors survive the file; any single damaged byte of a header never crashes the reader."""

from __future__ import annotations

import contextlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hn

from p2ptrain.errors import CheckpointError
from p2ptrain.training.safetensors import decode_tensors, encode_tensors

ARRAYS = st.one_of(
    hn.arrays(dtype, hn.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    for dtype in (np.float32, np.float64, np.int64, np.int32, np.uint8, np.bool_)
)
FILES = st.dictionaries(
    st.text(max_size=8).filter(lambda n: n != "__metadata__"), ARRAYS, max_size=4
)


@given(FILES, st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3))
def test_tensor_files_round_trip(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    read = decode_tensors(b"".join(encode_tensors(tensors, metadata)))
    assert read.metadata == metadata
    assert list(read.tensors) == list(tensors)
    for name, tensor in tensors.items():
        assert read.tensors[name].tobytes() == tensor.tobytes()
        assert (read.tensors[name].shape, read.tensors[name].dtype) == (tensor.shape, tensor.dtype)


@given(FILES, st.integers(min_value=0), st.integers(min_value=1, max_value=255))
def test_tensor_files_with_a_damaged_byte_are_read_or_refused(
    tensors: dict[str, np.ndarray], position: int, change: int
) -> None:
    content = bytearray(b"".join(encode_tensors(tensors, {})))
    content[position % len(content)] ^= change
    with contextlib.suppress(CheckpointError):
        decode_tensors(bytes(content))
