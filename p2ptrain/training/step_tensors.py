"""The tensors of one step at one place, packed: what a log entry or a fed step is on the wire.

    offset  bytes  field
    0       4      magic `P2TS`
    4       2      version, 1
    6       2      reserved, 0
    8       4      tensor count
    12      16 n   per tensor: microbatch (4), index (4), bytes of its body (8)
                   bodies, in the same order

Tensors come in the order of microbatch, then index. Which ones, and how long each is, follows from
the manifest and the contract, so a receiver knows the size of the whole before it asks
(`packed_bytes`) and takes nothing else. PROTOCOL.md section 6.6.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from p2ptrain.bundle.manifest import Manifest, Value
from p2ptrain.errors import InvariantBroken, RemoteProtocolError
from p2ptrain.training.arrivals import LOSS_WEIGHT_DTYPE
from p2ptrain.training.boundaries import cotangent_values
from p2ptrain.training.contract import Contract
from p2ptrain.training.tensor_codec import decode, encoded_bytes
from p2ptrain.training.ties import tie_groups

Array = NDArray[Any]  # Any: float32, int64 and bool, as the manifest says
StepKind = Literal["activation", "cotangent", "tied", "input", "labels"]

MAGIC: Final = b"P2TS"
VERSION: Final = 1
_HEAD: Final = struct.Struct("<4sHHI")
_ENTRY: Final = struct.Struct("<IIQ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """One tensor that a packed step holds."""

    microbatch: int
    index: int
    """As in the tensor header on a data link (PROTOCOL.md section 2.1)."""
    shape: tuple[int, ...]
    dtype: str
    codec: str = "fp32"

    @property
    def nbytes(self) -> int:
        """Of its encoded body."""
        return encoded_bytes(self.codec, dtype=self.dtype, elements=math.prod(self.shape))


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTensor:
    """One tensor as it was sent: its encoded bytes."""

    microbatch: int
    index: int
    body: bytes | memoryview


def expected_tensors(
    manifest: Manifest, contract: Contract, kind: StepKind, segment: int
) -> tuple[Expected, ...]:
    """The tensors of one training step, in their order.

    Args:
        manifest: Of the model.
        contract: Of the run.
        kind: What they are.
        segment: The one before the boundary of an activation or cotangent, the one that holds a
            tied copy; 0 for input and labels.

    Raises:
        RemoteProtocolError: no such boundary or segment.
    """
    if not 0 <= segment < len(manifest.segments):
        raise RemoteProtocolError(f"the model has no segment {segment}")
    if kind == "tied":
        return _tied(manifest, segment)
    values = _values(manifest, kind, segment)
    batch = contract.microbatch_size
    one = [(manifest.shape(value, batch=batch), value.dtype) for value in values]
    if kind == "labels":
        one.append(((1,), LOSS_WEIGHT_DTYPE))
    codec = contract.codec if kind in ("activation", "cotangent") else "fp32"
    return tuple(
        Expected(microbatch=microbatch, index=index, shape=shape, dtype=dtype, codec=codec)
        for microbatch in range(contract.microbatches)
        for index, (shape, dtype) in enumerate(one)
    )


def expected_of(
    expected: Sequence[Expected], microbatches: Collection[int]
) -> tuple[Expected, ...]:
    """Those of some microbatches; of none: all of them."""
    return tuple(each for each in expected if not microbatches or each.microbatch in microbatches)


def joined(expected: Sequence[Expected], parts: Sequence[tuple[Collection[int], bytes]]) -> bytes:
    """The packed form of a whole step of which several peers had some microbatches each.

    Raises:
        RemoteProtocolError: a part holds something else, or all of them are not the whole.
    """
    tensors = [
        tensor
        for microbatches, content in parts
        for tensor in unpack(content, expected_of(expected, microbatches))
    ]
    tensors.sort(key=lambda each: (each.microbatch, each.index))
    places = [(each.microbatch, each.index) for each in tensors]
    if places != [(each.microbatch, each.index) for each in expected]:
        raise RemoteProtocolError("the parts of a step are not the whole of it")
    return pack(tensors)


def packed_bytes(expected: Sequence[Expected]) -> int:
    """The size of the packed step that holds exactly these tensors."""
    return _HEAD.size + sum(_ENTRY.size + each.nbytes for each in expected)


def pack(tensors: Sequence[PackedTensor]) -> bytes:
    """The packed form of one step's tensors, which come in the order of microbatch and index."""
    places = [(each.microbatch, each.index) for each in tensors]
    if places != sorted(set(places)):
        raise InvariantBroken("packed tensors are in order, each once")
    chunks: list[bytes | memoryview] = [_HEAD.pack(MAGIC, VERSION, 0, len(tensors))]
    chunks += [
        _ENTRY.pack(each.microbatch, each.index, memoryview(each.body).nbytes) for each in tensors
    ]
    return b"".join([*chunks, *(each.body for each in tensors)])


def pack_bodies(expected: Sequence[Expected], bodies: Sequence[bytes | memoryview]) -> bytes | None:
    """The packed form of a whole step's encoded tensors, as a log gives them, in their order; None
    when they are not the expected ones: the log is of no use."""
    if [memoryview(body).nbytes for body in bodies] != [each.nbytes for each in expected]:
        return None
    return pack([
        PackedTensor(microbatch=each.microbatch, index=each.index, body=body)
        for each, body in zip(expected, bodies, strict=True)
    ])  # fmt: skip


def unpack(content: bytes | memoryview, expected: Sequence[Expected]) -> tuple[PackedTensor, ...]:
    """The tensors of a packed step, as read-only views into `content`; nothing is copied.

    Raises:
        RemoteProtocolError: another version, or not exactly the expected tensors; nothing of it
            was used.
    """
    view = memoryview(content).toreadonly().cast("B")
    _check_head(view, expected)
    found, entry = [], _HEAD.size
    start = entry + _ENTRY.size * len(expected)
    for each in expected:
        place = (each.microbatch, each.index, each.nbytes)
        if _ENTRY.unpack_from(view, entry) != place:
            raise RemoteProtocolError(f"a packed step holds another tensor than {place}")
        body = view[start : start + each.nbytes]
        found.append(PackedTensor(microbatch=each.microbatch, index=each.index, body=body))
        entry, start = entry + _ENTRY.size, start + each.nbytes
    return tuple(found)


def unpack_arrays(
    content: bytes | memoryview, expected: Sequence[Expected]
) -> tuple[tuple[Array, ...], ...]:
    """The values of a packed step by microbatch, in index order, read only; errors as `unpack`.

    Uncompressed values are views into `content`.
    """
    values: dict[int, list[Array]] = {}
    for tensor, each in zip(unpack(content, expected), expected, strict=True):
        array = _decoded(tensor.body, each)
        values.setdefault(each.microbatch, []).append(array)
    return tuple(tuple(values[microbatch]) for microbatch in sorted(values))


def encoded(array: Array) -> bytes:
    """A copy of an array's bytes as they go over a link."""
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()


def _decoded(body: bytes | memoryview, each: Expected) -> Array:
    raw = np.frombuffer(body, np.uint8)
    if each.codec == "fp32":
        return raw.view(np.dtype(each.dtype).newbyteorder("<")).reshape(each.shape)
    array = np.empty(each.shape, each.dtype)
    decode(each.codec, raw, array)
    array.flags.writeable = False
    return array


def _check_head(view: memoryview, expected: Sequence[Expected]) -> None:
    if len(view) != packed_bytes(expected):
        raise RemoteProtocolError(
            f"a packed step of {len(view)} bytes, not {packed_bytes(expected)}"
        )
    magic, version, reserved, count = _HEAD.unpack_from(view)
    if (magic, version, reserved) != (MAGIC, VERSION, 0):
        raise RemoteProtocolError(
            f"a packed step of unknown format, not version {VERSION}", hint="update p2ptrain"
        )
    if count != len(expected):
        raise RemoteProtocolError(f"a packed step of {count} tensors, not {len(expected)}")


def _values(manifest: Manifest, kind: StepKind, segment: int) -> tuple[Value, ...]:
    match kind:
        case "input" if segment == 0:
            return tuple(port.value for port in manifest.data_ports)
        case "labels" if segment == 0:
            return (manifest.labels_port.value,)
        case "activation" if segment < len(manifest.segments) - 1:
            return manifest.boundary(segment)
        case "cotangent" if segment < len(manifest.segments) - 1:
            return cotangent_values(manifest, segment)
        case _:
            raise RemoteProtocolError(f"there is no {kind} of segment {segment}")


def _tied(manifest: Manifest, segment: int) -> tuple[Expected, ...]:
    held = {
        holder.tensor
        for group in tie_groups(manifest)
        for holder in group.holders
        if holder.segment == segment
    }
    return tuple(
        Expected(microbatch=0, index=index, shape=tensor.shape, dtype="float32")
        for index, tensor in enumerate(manifest.tensors)
        if tensor.name in held
    )
