"""What is read off the kernel's struct tcp_info."""

from __future__ import annotations

import struct

import pytest

from p2ptrain.net.delivery_rate import Delivery, parse_tcp_info


def info(*, acked: int, rate: int, limited: bool = False, size: int = 232) -> bytes:
    made = bytearray(232)
    made[7] = 0b110 | limited  # other bits of that byte mean something else
    struct.pack_into("=Q", made, 120, acked)
    struct.pack_into("=Q", made, 160, rate)
    return bytes(made[:size])


def test_rate_and_acknowledged_bytes_are_read() -> None:
    assert parse_tcp_info(info(acked=1_000_000, rate=3_000_000)) == Delivery(1_000_000, 3_000_000)
    assert parse_tcp_info(info(acked=1, rate=2, size=168)) == Delivery(1, 2)


@pytest.mark.parametrize(
    "told",
    [
        info(acked=1, rate=2, limited=True),
        info(acked=1, rate=0),
        info(acked=1, rate=2, size=160),
        b"",
    ],
    ids=["held up by the sender", "no rate yet", "an old kernel", "nothing"],
)
def test_what_says_nothing_of_the_link_is_left_out(told: bytes) -> None:
    assert parse_tcp_info(told) is None
