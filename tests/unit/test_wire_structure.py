"""msgpack values are measured before they are built: what is claimed must be there."""

from __future__ import annotations

import struct
import tracemalloc

import msgpack
import pytest

from p2ptrain import limits
from p2ptrain.errors import RemoteProtocolError
from p2ptrain.wire.codec import unpack_map
from p2ptrain.wire.structure import LEVELS_MAX, check_structure


@pytest.mark.parametrize(
    "value",
    [
        None, True, 0, 127, 128, 1 << 16, 1 << 40, (1 << 64) - 1, -1, -33, -200, -40_000,
        -(1 << 40),
        1.5, "", "x" * 31, "x" * 200, "x" * 300, "x" * 70_000, b"", b"x" * 200, b"x" * 300,
        b"x" * 70_000, [], [1] * 15, [1] * 16, [1] * 70_000, {}, {"a": [{"b": None}], "c": b"d"},
        {str(i): i for i in range(20)}, {str(i): i for i in range(70_000)},
    ],
    ids=lambda value: repr(value)[:20],
)  # fmt: skip
def test_what_msgpack_writes_is_taken(value: object) -> None:
    check_structure(msgpack.packb(value))
    check_structure(msgpack.packb(value, use_single_float=True))
    check_structure(memoryview(msgpack.packb([value, value])))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x00\x00",
        b"\x91",
        b"\x82\x00\x00\x00",
        b"\xdd\x00\x01\x00\x00",
        b"\xdf\x80\x00\x00\x00" + bytes(100),
        b"\xda\xff\xff" + bytes(100),
        b"\xc6\x00\x00",
        b"\xcb" + bytes(7),
        b"\xc1",
        b"\xd4\x01\x00",
        b"\xc7\x01\x01\x00",
        b"\x91" * (LEVELS_MAX + 1) + b"\x00",
        b"\xdc\x00\x04\x00\x91\x00\x00",
    ],
)
def test_what_claims_more_than_there_is_or_is_too_deep_is_refused(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="msgpack"):
        check_structure(body)


def test_deepest_nesting_is_taken() -> None:
    check_structure(b"\x91" * LEVELS_MAX + b"\x00")


def allocated_bytes(body: bytes) -> int:
    tracemalloc.start()
    try:
        unpack_map(body, bytes_max=limits.CONTROL_BODY_BYTES_MAX)
    except RemoteProtocolError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


@pytest.mark.parametrize(
    "claim", [b"\xdd\x00\x01\x00\x00", b"\xdc\xff\xff", b"\xdf\x00\x00\xff\xff"]
)
def test_nested_claims_allocate_next_to_nothing(claim: bytes) -> None:
    assert allocated_bytes(claim * 800) < 50_000


@pytest.mark.parametrize(
    "filling", [b"\x80", b"\x90", b"\xca\x00\x00\x00\x00", b"\xa0", b"\xc4\x00"]
)
def test_any_body_allocates_a_bounded_multiple_of_its_length(filling: bytes) -> None:
    count = min(65_535, 200_000 // len(filling))
    body = b"\x81\xa1a\xdd" + struct.pack(">I", count) + filling * count
    assert allocated_bytes(body) < 80 * len(body) + 100_000
