"""Bodies of frames as they come off a link."""

from __future__ import annotations

from typing import Final, Protocol

DISCARD_BYTES: Final = 64 * 1024


class BodyReader(Protocol):
    """Reads exactly the announced body of one frame."""

    async def read_into(self, view: memoryview) -> None:
        """Fill the view from the link."""


async def discard(reader: BodyReader, length: int) -> None:
    """Read and forget a body that nobody waits for."""
    scratch = memoryview(bytearray(min(length, DISCARD_BYTES)))
    while length > 0:
        part = scratch[: min(length, DISCARD_BYTES)]
        await reader.read_into(part)
        length -= len(part)
