"""Frames: a 16-byte prefix, a short msgpack header, a raw body. PROTOCOL.md section 2.

Everything here is hostile until it was checked: length first, then type, then range, then
digest. The prefix alone decides how much may be read; nothing is allocated before.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import msgpack

from p2ptrain import limits
from p2ptrain.errors import LocalProtocolError, RemoteProtocolError
from p2ptrain.ids import Digest, Lineage, RunId, ViewNumber, is_base32, is_digest
from p2ptrain.wire.codec import from_plain, to_plain, unpack_map

MAGIC: Final = b"P2T1"
PREFIX: Final = struct.Struct("<4sBBHQ")
PREFIX_BYTES: Final = PREFIX.size

TENSOR_KINDS: Final = (
    "activation",
    "cotangent",
    "input",
    "labels",
    "release",
    "tied",
    "part",
    "total",
    "slice",
)
TENSOR_PHASES: Final = ("train", "evaluate")
BULK_KINDS: Final = ("blob",)


class FrameType(IntEnum):
    """The second field of the prefix."""

    HELLO = 1
    CONTROL = 2
    TENSOR = 3
    BULK = 4
    MOVED = 5
    """Nothing more comes on this link: read on in the one that renews it."""


_BODY_MAX: Final = {
    FrameType.HELLO: limits.HELLO_BODY_BYTES_MAX,
    FrameType.CONTROL: limits.CONTROL_BODY_BYTES_MAX,
    FrameType.TENSOR: limits.TENSOR_BODY_BYTES_MAX,
    FrameType.BULK: limits.BULK_CHUNK_BYTES_MAX,
    FrameType.MOVED: 0,
}
_WITH_HEADER: Final = frozenset((FrameType.TENSOR, FrameType.BULK))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """The checked first 16 bytes of a frame."""

    type: FrameType
    header_length: int
    body_length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorHeader:
    """What one tensor on the data link is: the key under which its receiver waits for it."""

    run: RunId
    lineage: Lineage
    view: ViewNumber
    plan: Digest
    kind: str
    """One of TENSOR_KINDS; `release` has no body."""
    phase: str
    """One of TENSOR_PHASES."""
    step: int
    microbatch: int
    segment: int
    """Index of the segment before the cut, or of the segment that holds a tied tensor or a value
    that peers of a stage bring together; 0 for input and labels."""
    index: int
    """Which of the boundary's, input's or labels' values; of a tied tensor its manifest index; of
    parts, totals and slices which meeting of the segment."""

    def __post_init__(self) -> None:
        if self.kind not in TENSOR_KINDS or self.phase not in TENSOR_PHASES:
            raise ValueError("unknown tensor kind or phase")
        if not is_base32(self.run, 26) or not is_digest(self.plan):
            raise ValueError("the run or plan id is not one")
        numbers = (
            self.lineage, self.view, self.step, self.microbatch, self.segment, self.index
        )  # fmt: skip
        if min(numbers) < 0:
            raise ValueError("a number is negative")
        if self.microbatch >= limits.MICROBATCHES_MAX or self.segment >= limits.SEGMENTS_MAX:
            raise ValueError("microbatch or segment is out of range")


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkHeader:
    """One chunk of a larger thing that was asked for, named by its digest."""

    request: int
    kind: str
    """One of BULK_KINDS."""
    digest: Digest
    """Of the whole."""
    offset: int
    total: int
    """Bytes of the whole."""
    chunk: Digest
    """Of this chunk."""

    def __post_init__(self) -> None:
        if self.kind not in BULK_KINDS:
            raise ValueError("unknown bulk kind")
        if not is_digest(self.digest) or not is_digest(self.chunk):
            raise ValueError("a digest is not one")
        if self.request < 0 or not 0 <= self.offset <= self.total:
            raise ValueError("a number is out of range")


def encode_frame_head(kind: FrameType, header: bytes, body_length: int) -> bytes:
    """Prefix and header; the caller sends them and then `body_length` bytes.

    Raises:
        LocalProtocolError: over a limit of this type.
    """
    if len(header) > limits.FRAME_HEADER_BYTES_MAX or body_length > _BODY_MAX[kind]:
        raise LocalProtocolError(f"a {kind.name} frame is over its limits")
    return PREFIX.pack(MAGIC, kind, 0, len(header), body_length) + header


def parse_prefix(prefix: bytes | memoryview) -> Prefix:
    """Check a prefix.

    Raises:
        RemoteProtocolError: not a frame, unknown type or flags, or over a limit; close the link.
    """
    if len(prefix) != PREFIX_BYTES:
        raise RemoteProtocolError(f"a frame begins with {PREFIX_BYTES} bytes")
    magic, kind, flags, header_length, body_length = PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise RemoteProtocolError("not a frame")
    if header_length > limits.FRAME_HEADER_BYTES_MAX:
        raise RemoteProtocolError("a frame's header is too long")
    if kind not in _BODY_MAX or flags != 0:
        raise RemoteProtocolError(f"unknown frame type {kind} or flags {flags}")
    checked = FrameType(kind)
    if body_length > _BODY_MAX[checked]:
        raise RemoteProtocolError(f"a {checked.name} frame's body is too long")
    if (header_length > 0) != (checked in _WITH_HEADER):
        raise RemoteProtocolError(f"a {checked.name} frame's header is missing or out of place")
    return Prefix(type=checked, header_length=header_length, body_length=body_length)


def encode_header(header: TensorHeader | BulkHeader) -> bytes:
    """A header as msgpack."""
    packed: bytes = msgpack.packb(to_plain(header), use_bin_type=True)
    return packed


def parse_tensor_header(header: bytes | memoryview, *, body_length: int) -> TensorHeader:
    """Read a TENSOR frame's header; RemoteProtocolError when it does not fit."""
    fields = unpack_map(header, bytes_max=limits.FRAME_HEADER_BYTES_MAX)
    parsed = from_plain(TensorHeader, fields)
    if parsed.kind == "release" and body_length != 0:
        raise RemoteProtocolError("a release has no body")
    return parsed


def parse_bulk_header(header: bytes | memoryview, *, body_length: int) -> BulkHeader:
    """Read a BULK frame's header; RemoteProtocolError when it does not fit its body."""
    fields = unpack_map(header, bytes_max=limits.FRAME_HEADER_BYTES_MAX)
    parsed = from_plain(BulkHeader, fields)
    if parsed.offset + body_length > parsed.total:
        raise RemoteProtocolError("a chunk reaches beyond its whole")
    return parsed


def check_chunk(header: BulkHeader, chunk: bytes | memoryview) -> None:
    """Check a chunk against its digest; RemoteProtocolError when it differs."""
    if hashlib.sha256(chunk).hexdigest() != header.chunk:
        raise RemoteProtocolError("a chunk does not match its digest")
