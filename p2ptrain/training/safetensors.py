"""The safetensors format: 8 bytes of length, a JSON header, then raw little-endian tensors.

Pure: bytes in, arrays out. `store.tensors` reads and writes the files. Everything read is hostile
until checked: length, JSON, names, dtypes, shapes, and offsets that cover the data without gap or
overlap.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeGuard

import numpy as np
from numpy.typing import NDArray

from p2ptrain.errors import CheckpointError, InvariantBroken

Array = NDArray[Any]  # Any: the element type is data here

HEADER_BYTES_MAX: Final = 16 * 1024 * 1024
RANK_MAX: Final = 8
_PREFIX: Final = struct.Struct("<Q")
PREFIX_BYTES: Final = _PREFIX.size
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
    """What one tensor is, and where its bytes lie behind the header."""

    dtype: np.dtype[Any]  # Any: the element type is data here
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorHeader:
    """The places of named tensors, in file order and without a gap, and text about them."""

    places: dict[str, TensorPlace]
    metadata: dict[str, str]


def encode_tensors(
    tensors: Mapping[str, Array], metadata: Mapping[str, str]
) -> list[bytes | memoryview]:
    """The file's bytes as chunks that share memory with the tensors where they can."""
    header: dict[str, object] = {_METADATA: dict(metadata)}
    chunks: list[bytes | memoryview] = []
    offset = 0
    for name, tensor in tensors.items():
        raw = _little_endian(tensor)
        header[name] = {
            "dtype": _NAMES[raw.dtype],
            "shape": list(raw.shape),
            "data_offsets": [offset, offset + raw.nbytes],
        }
        offset += raw.nbytes
        if raw.nbytes:
            chunks.append(raw.reshape(-1).view(np.uint8).data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [_PREFIX.pack(len(text)), text, *chunks]


def decode_tensors(content: bytes | memoryview) -> TensorFile:
    """The tensors of a file, as read-only views into `content`.

    Raises:
        CheckpointError: not a whole, consistent safetensors file; nothing of it was used.
    """
    view = memoryview(content).toreadonly()
    start = PREFIX_BYTES + header_length(bytes(view[:PREFIX_BYTES]), file_bytes=len(view))
    data = view[start:]
    header = decode_header(bytes(view[PREFIX_BYTES:start]), data_bytes=len(data))
    tensors = {
        name: np.frombuffer(data[place.start : place.stop], place.dtype).reshape(place.shape)
        for name, place in header.places.items()
    }
    return TensorFile(tensors=tensors, metadata=header.metadata)


def header_length(prefix: bytes, *, file_bytes: int) -> int:
    """The length of the header from a file's first PREFIX_BYTES; CheckpointError if impossible."""
    if len(prefix) < PREFIX_BYTES:
        raise _damaged(f"it has {len(prefix)} bytes")
    (length,) = _PREFIX.unpack(prefix)
    if length > HEADER_BYTES_MAX or PREFIX_BYTES + length > file_bytes:
        raise _damaged(f"its header claims {length} bytes")
    return int(length)


def decode_header(text: bytes, *, data_bytes: int) -> TensorHeader:
    """Where each tensor lies among the `data_bytes` behind the header.

    Raises:
        CheckpointError: not JSON, or places that do not cover the data without gap or overlap.
    """
    try:
        header = json.loads(text, object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as error:
        raise _damaged(f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _damaged("its header is not a map")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged("its metadata is not text")
    places: dict[str, TensorPlace] = {}
    covered = 0
    for name, entry in header.items():
        places[name] = _place(name, entry, covered, data_bytes)
        covered = places[name].stop
    if covered != data_bytes:
        raise _damaged(f"its tensors cover {covered} of {data_bytes} bytes")
    return TensorHeader(places=places, metadata=metadata)


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:  # Any: JSON values
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a name appears twice")
    return dict(pairs)


def _place(name: str, entry: object, start: int, data_bytes: int) -> TensorPlace:
    if not isinstance(entry, dict):
        raise _damaged(f"{name!r:.80} is not described by a map")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _damaged(f"{name!r:.80} has unknown dtype {dtype!r:.20}")
    if not _whole_numbers(shape) or len(shape) > RANK_MAX:
        raise _damaged(f"{name!r:.80} has no valid shape")
    element = np.dtype(_DTYPES[dtype])
    end = start + math.prod(shape) * element.itemsize
    if not _whole_numbers(offsets) or offsets != [start, end] or end > data_bytes:
        raise _damaged(f"{name!r:.80} does not lie where its shape puts it")
    return TensorPlace(dtype=element, shape=tuple(shape), start=start, stop=end)


def _whole_numbers(value: Any) -> TypeGuard[list[int]]:  # Any: a JSON value
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _little_endian(tensor: Array) -> Array:
    raw = np.ascontiguousarray(tensor, dtype=tensor.dtype.newbyteorder("<")).reshape(tensor.shape)
    if raw.dtype not in _NAMES:
        raise InvariantBroken(f"dtype {tensor.dtype} is not stored")
    return raw


def _damaged(why: str) -> CheckpointError:
    return CheckpointError(f"not a whole safetensors file: {why}")
