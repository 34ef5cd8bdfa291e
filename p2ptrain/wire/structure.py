"""The shape of a msgpack value, checked before anything is built from it.

A header of five bytes can claim 65,536 items, and msgpack makes room for all of them at once, at
every level: 4 KiB of nested claims took 400 MB of address space. Here every claim must be covered
by bytes that are there, so what the unpacker allocates is bounded by the length of the body.
"""

from __future__ import annotations

from typing import Final

from p2ptrain.errors import RemoteProtocolError

LEVELS_MAX: Final = 16
_FIXED: Final = {
    0xC0: 0, 0xC2: 0, 0xC3: 0,
    0xCA: 4, 0xCB: 8,
    0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8,
    0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8,
}  # fmt: skip
"""Type byte -> bytes that follow it: nil, booleans, floats, integers."""
_COUNTED: Final = {
    0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4,
}  # fmt: skip
"""Type byte of bytes and strings -> width of the length that follows it."""
_HOLDING: Final = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}
"""Type byte of arrays and maps -> width of the count, values for each of it."""


def check_structure(body: bytes | memoryview) -> None:
    """Check that `body` is exactly one msgpack value that its bytes can hold.

    Raises:
        RemoteProtocolError: nested over LEVELS_MAX levels, claims more than there is, ends early,
            goes on after the value, or has an extension type; drop the channel.

    Source: the msgpack specification, https://github.com/msgpack/msgpack/blob/master/spec.md
    """
    size = len(body)
    waiting = [1]  # values still to come, level by level
    claimed = 1  # their sum: each takes a byte at least
    position = 0
    while waiting:
        if waiting[-1] == 0:
            waiting.pop()
            continue
        if position + claimed > size:
            raise RemoteProtocolError("a msgpack value claims more than there is")
        waiting[-1] -= 1
        claimed -= 1
        position, held = _step(body, position)
        if held:
            waiting.append(held)
            claimed += held
            if len(waiting) > LEVELS_MAX + 1:
                raise RemoteProtocolError("a msgpack value is nested too deeply")
    if position != size:
        raise RemoteProtocolError("something follows a msgpack value, or it ends early")


def _step(body: bytes | memoryview, position: int) -> tuple[int, int]:
    """Where the next value begins, and how many values this one holds."""
    kind = body[position]
    position += 1
    if kind < 0x80 or kind >= 0xE0:
        return position, 0
    if kind < 0x90:
        return position, 2 * (kind & 0x0F)
    if kind < 0xA0:
        return position, kind & 0x0F
    if kind < 0xC0:
        return position + (kind & 0x1F), 0
    if (follows := _FIXED.get(kind)) is not None:
        return position + follows, 0
    if (width := _COUNTED.get(kind)) is not None:
        return position + width + _number(body, position, width), 0
    if (holding := _HOLDING.get(kind)) is not None:
        width, each = holding
        return position + width, each * _number(body, position, width)
    raise RemoteProtocolError(f"msgpack type {kind:#x} is not used here")


def _number(body: bytes | memoryview, position: int, width: int) -> int:
    return int.from_bytes(body[position : position + width], "big")
