"""Append weights to an ONNX file as protobuf bytes, without importing onnx.

Protobuf messages merge by concatenation: a second `graph` field behind the first adds its
repeated fields to it. Field numbers are those of onnx.proto (ModelProto.graph = 7,
GraphProto.initializer = 5, TensorProto dims 1, data_type 2, name 8, raw_data 9,
external_data 13, data_location 14).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from p2ptrain.errors import BundleError

_MODEL_GRAPH: Final = 7
_GRAPH_INITIALIZER: Final = 5
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 8, 9
_TENSOR_EXTERNAL, _TENSOR_LOCATION = 13, 14
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_EXTERNAL: Final = 1
_TYPES: Final = {"float32": 1, "uint8": 2, "int32": 6, "int64": 7, "bool": 9}
_VARINT, _LENGTH = 0, 2
PROTOBUF_BYTES_MAX: Final = (1 << 31) - 1
"""Readers refuse larger messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExternalInitialiser:
    """A constant whose values lie outside the model."""

    name: str
    array: NDArray[Any]  # Any: every dtype of the table above
    """Gives shape and dtype; its values are not read."""
    file_name: str
    """Of the file, in the folder that the runtime is told."""
    offset: int
    """Of its first byte in that file."""


def append_externals(model: bytes, externals: Iterable[ExternalInitialiser]) -> bytes:
    """`model` with constants declared that the runtime finds elsewhere.

    Raises:
        BundleError: a dtype that has no place in a bundle.
    """
    parts = [model]
    for external in externals:
        places = {
            "location": external.file_name,
            "offset": str(external.offset),
            "length": str(external.array.nbytes),
        }
        content = _tensor_head(external.name, external.array)
        for key, value in places.items():
            entry = _field(_ENTRY_KEY, key.encode()) + _field(_ENTRY_VALUE, value.encode())
            content += _field(_TENSOR_EXTERNAL, entry)
        content += _varint(_TENSOR_LOCATION << 3 | _VARINT) + _varint(_EXTERNAL)
        parts.append(_field(_MODEL_GRAPH, _field(_GRAPH_INITIALIZER, content)))
    return b"".join(parts)


def append_initialisers(
    model: bytes,
    tensors: Iterable[tuple[str, NDArray[Any]]],  # Any: every dtype of the table above
) -> Iterator[bytes]:
    """The bytes of `model` with initialisers added, one chunk per tensor.

    The file reads parameters by name and neither declares nor holds them; with initialisers of
    those names it becomes an ordinary model that any onnxruntime loads.

    Raises:
        BundleError: a dtype that has no place in a bundle, or a model over 2 GiB; what was
            written so far is not a model, delete it.
    """
    written = len(model)
    yield model
    for name, array in tensors:
        if written + array.nbytes > PROTOBUF_BYTES_MAX:
            raise BundleError("the model with its weights is larger than 2 GiB")
        chunk = _field(_MODEL_GRAPH, _field(_GRAPH_INITIALIZER, _tensor(name, array)))
        written += len(chunk)
        yield chunk


def _tensor(name: str, array: NDArray[Any]) -> bytes:  # Any: as above
    head = _tensor_head(name, array)
    little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
    return head + _field(_TENSOR_RAW, little.tobytes())


def _tensor_head(name: str, array: NDArray[Any]) -> bytes:  # Any: as above
    kind = _TYPES.get(array.dtype.name)
    if kind is None:
        raise BundleError(f"tensor {name!r} has dtype {array.dtype}, which a bundle cannot hold")
    parts = [_varint(_TENSOR_DIMS << 3 | _VARINT) + _varint(size) for size in array.shape]
    parts.append(_varint(_TENSOR_TYPE << 3 | _VARINT) + _varint(kind))
    parts.append(_field(_TENSOR_NAME, name.encode()))
    return b"".join(parts)


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | _LENGTH) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
