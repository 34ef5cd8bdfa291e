"""What the kernel has seen a TCP connection deliver, on Linux.

The kernel times how fast data is acknowledged, and knows whether the sender kept it busy (Cheng,
Cardwell, Yeganeh, Jacobson: Delivery Rate Estimation, 2017). So a tensor that fits into the send
buffer as a whole, which a full buffer would never show, tells what the link carries.
"""

from __future__ import annotations

import socket
import struct
from typing import Final, NamedTuple

import trio

_TCP_INFO: Final = 11
"""The option's number in linux/tcp.h; `socket.TCP_INFO` is not there on every system."""
_BYTES: Final = 256
_LIMITED_AT, _ACKED_AT, _RATE_AT, _END = 7, 120, 160, 168
"""Offsets in `struct tcp_info`, which only grows at its end."""


class Delivery(NamedTuple):
    """What a connection has delivered."""

    acked_bytes: int
    """Since it began."""
    bytes_per_s: int
    """Lately, while more waited than could be sent."""


def delivery(sock: trio.socket.SocketType) -> Delivery | None:
    """What the kernel says now; None where it does not, or where the sender held it up."""
    try:
        return parse_tcp_info(sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _BYTES))
    except OSError:
        return None


def parse_tcp_info(info: bytes) -> Delivery | None:
    """Read `struct tcp_info`; None where it is too old, or the sender had too little to send."""
    if len(info) < _END or info[_LIMITED_AT] & 1:
        return None
    (acked,) = struct.unpack_from("=Q", info, _ACKED_AT)
    (rate,) = struct.unpack_from("=Q", info, _RATE_AT)
    return Delivery(acked, rate) if rate > 0 else None
