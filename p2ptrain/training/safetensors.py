"""The safetensors format: 8 bytes of length, a JSON header, then raw little-endian tensors.

Pure: bytes in, arrays out. `store.tensors` reads and writes the files. Everything read is hostile
until checked: length, JSON, names, dtypes, shapes, and offsets that cover the data without gap or
overlap.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeGuard

import numpy as np
from numpy.typing import NDArray

from p2ptrain.errors import CheckpointError, InvariantBroken
from p2ptrain.ids import Digest

Array = NDArray[Any]  # Any: the element type is data here

HEADER_BYTES_MAX: Final = 16 * 1024 * 1024
RANK_MAX: Final = 8
_PREFIX: Final = struct.Struct("<Q")
_METADATA: Final = "__metadata__"
_DTYPES: Final = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "U8": "|u1",
    "BOOL": "|b1",
}
_NAMES: Final = {np.dtype(code): name for name, code in _DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFile:
    """Named tensors in file order, and text about them. Arrays are read only."""

    tensors: dict[str, Array]
    metadata: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlace:
    """Where one tensor lies in a file."""

    dtype: np.dtype[Any]  # Any: the element type is data here
    shape: tuple[int, ...]
    start: int
    """Of its first byte, counted from the beginning of the file."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class FileLayout:
    """The checked header of a file; names are in file order."""

    places: dict[str, TensorPlace]
    metadata: dict[str, str]


def encode_tensors(
    tensors: Mapping[str, Array], metadata: Mapping[str, str]
) -> list[bytes | memoryview]:
    """The file's bytes as chunks that share memory with the tensors where they can."""
    raw = {name: _little_endian(tensor) for name, tensor in tensors.items()}
    head = encode_head({name: (each.dtype, each.shape) for name, each in raw.items()}, metadata)
    return [head, *(raw_bytes(each) for each in raw.values() if each.nbytes)]


def encode_head(
    tensors: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]],  # Any: as above
    metadata: Mapping[str, str],
) -> bytes:
    """What comes before the tensors' bytes in a file of these dtypes and shapes."""
    header: dict[str, object] = {_METADATA: dict(metadata)}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype.newbyteorder("<")],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _PREFIX.pack(len(text)) + text


def raw_bytes(tensor: Array) -> memoryview:
    """A tensor's little-endian bytes, shared with it where it is laid out so already."""
    return _little_endian(tensor).reshape(-1).view(np.uint8).data


def tensor_digest(tensor: Array) -> Digest:
    """sha256 of a tensor's bytes: `Tensor.digest` of a bundle's manifest."""
    return Digest(hashlib.sha256(raw_bytes(tensor)).hexdigest())


def decode_tensors(content: bytes | memoryview) -> TensorFile:
    """The tensors of a file, as read-only views into `content`.

    Raises:
        CheckpointError: not a whole, consistent safetensors file; nothing of it was used.
    """
    view = memoryview(content).toreadonly()
    layout = read_layout(view)
    tensors: dict[str, Array] = {
        name: np.frombuffer(view[place.start : place.start + place.nbytes], place.dtype).reshape(
            place.shape
        )
        for name, place in layout.places.items()
    }
    return TensorFile(tensors=tensors, metadata=layout.metadata)


def read_layout(view: memoryview) -> FileLayout:
    """Check a whole file, which may be mapped: only its header is read.

    Raises:
        CheckpointError: as `decode_tensors`.
    """
    header, start = _header(view)
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged("its metadata is not text")
    places: dict[str, TensorPlace] = {}
    covered, length = 0, len(view) - start
    for name, entry in header.items():
        places[name] = _place(name, entry, covered, start, length)
        covered += places[name].nbytes
    if covered != length:
        raise _damaged(f"its tensors cover {covered} of {length} bytes")
    return FileLayout(places=places, metadata=metadata)


def _header(view: memoryview) -> tuple[dict[str, Any], int]:  # Any: JSON values
    if len(view) < _PREFIX.size:
        raise _damaged(f"it has {len(view)} bytes")
    (length,) = _PREFIX.unpack(view[: _PREFIX.size])
    if length > HEADER_BYTES_MAX or _PREFIX.size + length > len(view):
        raise _damaged(f"its header claims {length} bytes")
    start = _PREFIX.size + length
    try:
        header = json.loads(bytes(view[_PREFIX.size : start]), object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as error:
        raise _damaged(f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _damaged("its header is not a map")
    return header, start


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:  # Any: JSON values
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a name appears twice")
    return dict(pairs)


def _place(name: str, entry: object, offset: int, start: int, length: int) -> TensorPlace:
    """The tensor at `offset` of the `length` bytes of data that begin at `start`."""
    if not isinstance(entry, dict):
        raise _damaged(f"{name!r:.80} is not described by a map")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _damaged(f"{name!r:.80} has unknown dtype {dtype!r:.20}")
    if not _whole_numbers(shape) or len(shape) > RANK_MAX:
        raise _damaged(f"{name!r:.80} has no valid shape")
    element = np.dtype(_DTYPES[dtype])
    end = offset + math.prod(shape) * element.itemsize
    if not _whole_numbers(offsets) or offsets != [offset, end] or end > length:
        raise _damaged(f"{name!r:.80} does not lie where its shape puts it")
    return TensorPlace(dtype=element, shape=tuple(shape), start=start + offset)


def _whole_numbers(value: Any) -> TypeGuard[list[int]]:  # Any: a JSON value
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _little_endian(tensor: Array) -> Array:
    raw = np.ascontiguousarray(tensor, dtype=tensor.dtype.newbyteorder("<")).reshape(tensor.shape)
    if raw.dtype not in _NAMES:
        raise InvariantBroken(f"dtype {tensor.dtype} is not stored")
    return raw


def _damaged(why: str) -> CheckpointError:
    return CheckpointError(f"not a whole safetensors file: {why}")
