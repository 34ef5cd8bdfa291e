"""Wait for a condition that other tasks bring about."""

from __future__ import annotations

from collections.abc import Callable

import trio


class Signal:
    """Wakes every waiter to look at its condition again; conditions are plain predicates."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def notify(self) -> None:
        """Something changed: every waiter evaluates its predicate again."""
        self._event.set()
        self._event = trio.Event()

    async def wait_until(self, predicate: Callable[[], bool]) -> None:
        """Return when the predicate holds; always a checkpoint; cancellation changes nothing."""
        await trio.lowlevel.checkpoint()
        while not predicate():
            await self._event.wait()
