"""Frames: what we write is read back equal; whatever else comes is refused and nothing more."""

from __future__ import annotations

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2ptrain import limits
from p2ptrain.errors import LocalProtocolError, RemoteProtocolError
from p2ptrain.ids import Digest, Lineage, RunId, ViewNumber
from p2ptrain.wire import frames
from p2ptrain.wire.frames import (
    PREFIX,
    PREFIX_BYTES,
    TENSOR_KINDS,
    TENSOR_PHASES,
    BulkHeader,
    FrameType,
    TensorHeader,
    check_chunk,
    encode_frame_head,
    encode_header,
    parse_bulk_header,
    parse_prefix,
    parse_tensor_header,
)

digests = st.binary(max_size=8).map(lambda data: Digest(hashlib.sha256(data).hexdigest()))
counts = st.integers(min_value=0, max_value=(1 << 40))
runs = st.text(alphabet="abcdefghijklmnopqrstuvwxyz234567", min_size=26, max_size=26).map(RunId)
tensor_headers = st.builds(
    TensorHeader,
    run=runs,
    lineage=counts.map(Lineage),
    view=counts.map(ViewNumber),
    plan=digests,
    kind=st.sampled_from(TENSOR_KINDS),
    phase=st.sampled_from(TENSOR_PHASES),
    step=counts,
    microbatch=st.integers(0, limits.MICROBATCHES_MAX - 1),
    segment=st.integers(0, limits.SEGMENTS_MAX - 1),
    index=counts,
)


@st.composite
def bulk_headers(draw: st.DrawFn) -> BulkHeader:
    total = draw(counts)
    return BulkHeader(
        request=draw(counts),
        kind="blob",
        digest=draw(digests),
        offset=draw(st.integers(0, total)),
        total=total,
        chunk=draw(digests),
    )


@given(header=tensor_headers)
def test_tensor_header_round_trips_within_its_limit(header: TensorHeader) -> None:
    encoded = encode_header(header)
    assert len(encoded) <= limits.FRAME_HEADER_BYTES_MAX
    assert parse_tensor_header(encoded, body_length=0) == header


@given(header=bulk_headers())
def test_bulk_header_round_trips(header: BulkHeader) -> None:
    length = header.total - header.offset
    assert parse_bulk_header(encode_header(header), body_length=length) == header
    with pytest.raises(RemoteProtocolError, match="beyond"):
        parse_bulk_header(encode_header(header), body_length=length + 1)


@given(
    kind=st.sampled_from([kind for kind in FrameType if kind is not FrameType.MOVED]),
    header=st.integers(1, limits.FRAME_HEADER_BYTES_MAX),
    body=st.integers(0, limits.HELLO_BODY_BYTES_MAX),
)
def test_prefix_round_trips(kind: FrameType, header: int, body: int) -> None:
    length = header if kind in (FrameType.TENSOR, FrameType.BULK) else 0
    head = encode_frame_head(kind, bytes(length), body)
    prefix = parse_prefix(head[:PREFIX_BYTES])
    assert (prefix.type, prefix.header_length, prefix.body_length) == (kind, length, body)
    assert len(head) == PREFIX_BYTES + length


@given(prefix=st.binary(min_size=16, max_size=16) | st.binary(max_size=40))
def test_any_prefix_is_read_or_refused(prefix: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_prefix(prefix)


@given(
    kind=st.integers(0, 255),
    flags=st.integers(0, 255),
    header=st.integers(0, 65_535),
    body=st.integers(0, (1 << 64) - 1),
)
def test_accepted_prefix_is_within_every_limit(
    kind: int, flags: int, header: int, body: int
) -> None:
    raw = struct.pack("<4sBBHQ", b"P2T1", kind, flags, header, body)
    try:
        prefix = parse_prefix(raw)
    except RemoteProtocolError:
        return
    assert flags == 0
    assert prefix.header_length <= limits.FRAME_HEADER_BYTES_MAX
    assert prefix.body_length <= limits.TENSOR_BODY_BYTES_MAX


@pytest.mark.parametrize(
    ("kind", "header", "body"),
    [
        (0, 0, 0),
        (5, 1, 1),
        (FrameType.HELLO, 1, 10),
        (FrameType.CONTROL, 1, 10),
        (FrameType.TENSOR, 0, 10),
        (FrameType.BULK, 0, 10),
        (FrameType.TENSOR, limits.FRAME_HEADER_BYTES_MAX + 1, 1),
        (FrameType.MOVED, 1, 0),
        (FrameType.MOVED, 0, 1),
        (6, 0, 0),
        (FrameType.HELLO, 0, limits.HELLO_BODY_BYTES_MAX + 1),
        (FrameType.CONTROL, 0, limits.CONTROL_BODY_BYTES_MAX + 1),
        (FrameType.TENSOR, 1, limits.TENSOR_BODY_BYTES_MAX + 1),
        (FrameType.BULK, 1, limits.BULK_CHUNK_BYTES_MAX + 1),
    ],
)
def test_prefix_over_a_limit_is_refused(kind: int, header: int, body: int) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_prefix(PREFIX.pack(frames.MAGIC, kind, 0, header, body))


@pytest.mark.parametrize(
    ("kind", "header", "body"),
    [
        (FrameType.TENSOR, limits.FRAME_HEADER_BYTES_MAX + 1, 1),
        (FrameType.BULK, 1, limits.BULK_CHUNK_BYTES_MAX + 1),
    ],
)
def test_we_never_write_a_frame_over_a_limit(kind: FrameType, header: int, body: int) -> None:
    with pytest.raises(LocalProtocolError):
        encode_frame_head(kind, bytes(header), body)


@given(header=st.binary(max_size=200))
def test_any_header_is_read_or_refused(header: bytes) -> None:
    for parse in (parse_tensor_header, parse_bulk_header):
        with pytest.raises(RemoteProtocolError):
            parse(header, body_length=0)


@given(header=tensor_headers, data=st.data())
def test_header_with_a_field_missing_or_of_another_type_is_refused(
    header: TensorHeader, data: st.DataObject
) -> None:
    fields = dict(frames.to_plain(header))
    name = data.draw(st.sampled_from(sorted(fields)))
    if data.draw(st.booleans()):
        del fields[name]
    else:
        fields[name] = data.draw(st.sampled_from([None, -1, [], {}, b"", 1 << 63, 1.5]))
    packed = frames.msgpack.packb(fields)
    with pytest.raises(RemoteProtocolError):
        parse_tensor_header(packed, body_length=0)


def test_release_with_a_body_is_refused() -> None:
    header = TensorHeader(
        run=RunId("a" * 26),
        lineage=Lineage(0),
        view=ViewNumber(1),
        plan=Digest("0" * 64),
        kind="release",
        phase="train",
        step=0,
        microbatch=0,
        segment=0,
        index=0,
    )
    with pytest.raises(RemoteProtocolError, match="no body"):
        parse_tensor_header(encode_header(header), body_length=1)


def test_chunk_is_compared_with_its_digest() -> None:
    chunk = b"some bytes"
    digest = Digest(hashlib.sha256(chunk).hexdigest())
    header = BulkHeader(
        request=1, kind="blob", digest=digest, offset=0, total=len(chunk), chunk=digest
    )
    check_chunk(header, chunk)
    with pytest.raises(RemoteProtocolError, match="digest"):
        check_chunk(header, chunk[:-1])
