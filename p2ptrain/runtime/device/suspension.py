"""Notice that this machine was suspended: its owner closed the lid, and opened it again."""

from __future__ import annotations

import time
from collections.abc import Callable

from p2ptrain import limits


def boot_clock_s() -> float:
    """Seconds since boot, also those in which the machine was suspended (Linux).

    Elsewhere the same as `awake_clock_s`: a suspension is not noticed, and looks like silence.
    """
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return awake_clock_s() if clock is None else time.clock_gettime(clock)


def awake_clock_s() -> float:
    """Seconds since boot without those in which the machine was suspended."""
    return time.monotonic()


class SuspensionWatch:
    """Compares a clock that runs on while the machine is suspended with one that stands still.

    A stopped process (SIGSTOP) is no suspension: both clocks go on.
    """

    def __init__(
        self,
        *,
        boot_s: Callable[[], float] = boot_clock_s,
        awake_s: Callable[[], float] = awake_clock_s,
    ) -> None:
        self._boot_s, self._awake_s = boot_s, awake_s
        self._ahead_s = boot_s() - awake_s()

    def suspended_s(self) -> float:
        """How long the machine was suspended since the last call; 0.0 when it was not."""
        ahead_s = self._boot_s() - self._awake_s()
        suspended_s = ahead_s - self._ahead_s
        self._ahead_s = ahead_s
        return suspended_s if suspended_s >= limits.SUSPENSION_NOTICED_S else 0.0
