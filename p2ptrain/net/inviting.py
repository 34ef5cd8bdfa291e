"""Whether this device shows a code now, as its announcement on the network says (`inv=1`)."""

from __future__ import annotations

import time
from collections.abc import Callable

import trio


class Inviting:
    """Follows one device's open code; call `look` whenever it may have changed.

    Args:
        until: When the open code ends, seconds since 1970; None while none is open.
    """

    def __init__(self, until: Callable[[], float | None]) -> None:
        self._until = until
        self._until_s: float | None = None
        self._changed = trio.Event()

    @property
    def is_open(self) -> bool:
        """Whether a code can be used here now."""
        return self._until_s is not None and time.time() < self._until_s

    def look(self) -> None:
        """Find out whether a code is open."""
        found = self._until()
        if found != self._until_s:
            self._until_s = found
            self._changed.set()
            self._changed = trio.Event()

    async def wait_changed(self) -> None:
        """Wait until a code is opened, used up, void or too old."""
        left_s = float("inf") if self._until_s is None else max(0.0, self._until_s - time.time())
        with trio.move_on_after(left_s):
            await self._changed.wait()
        self.look()


def nobody_invited() -> Inviting:
    """For a peer that never shows a code."""
    return Inviting(lambda: None)
