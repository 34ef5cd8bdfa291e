"""Turn a power sensor into an energy counter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from p2ptrain.units import UJ_PER_J

GAP_MAX_S: Final = 30.0
"""Two samples further apart say nothing about the time between them."""


class PowerIntegrator:
    """Adds watts up over time, a trapezium between two samples."""

    def __init__(self, watts: Callable[[], float | None]) -> None:
        self._watts = watts
        self._last: tuple[float, float] | None = None
        """Time and watts of the last good sample."""
        self._total_uj = 0

    def read_uj(self, now: float) -> int | None:
        """Take a sample; None when the sensor gives none or the last one is too long ago.

        After a None the sum goes on from the next good sample, as a counter with a hole would.
        """
        watts, last = self._watts(), self._last
        if watts is None:
            self._last = None
            return None
        self._last = (now, watts)
        if last is None:
            return self._total_uj
        elapsed_s = now - last[0]
        if not 0 <= elapsed_s <= GAP_MAX_S:
            return None
        self._total_uj += round((watts + last[1]) / 2 * elapsed_s * UJ_PER_J)
        return self._total_uj
