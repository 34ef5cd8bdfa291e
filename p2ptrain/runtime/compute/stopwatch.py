"""Time what will run again and again, as it will take in the long run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

LOOP_CORES: Final = 0.02
"""What a peer that trains takes of its quota beside computing: links, messages, feeding. Measured
while gpt-nano trained at 0.3 cores: 0.03 to 0.04 in the middle of a pipeline, 0.01 alone."""


class Taken(NamedTuple):
    """What one call took."""

    wall_ns: int
    cpu_ns: int
    """Of all threads of this process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopwatch:
    """A clock, and what is known of the processor time that we may use.

    Under a CPU quota a short call runs at full speed until the quota of its period is used up, so
    the shortest of a few says nothing of many in a row: those take their processor time divided
    by the quota.
    """

    clock_ns: Callable[[], int] = time.perf_counter_ns
    cpu_ns: Callable[[], int] = time.process_time_ns
    cores: float | None = None
    """Processor seconds per second that we may use; None: no quota."""

    def time(self, run: Callable[[], object]) -> Taken:
        """Call once."""
        clock, cpu = self.clock_ns(), self.cpu_ns()
        run()
        return Taken(self.clock_ns() - clock, self.cpu_ns() - cpu)

    def lasting_ns(self, taken: Sequence[Taken]) -> int:
        """The shortest of several equal calls, but no less than a quota lets many of them take.

        Other programs make no call shorter, so the shortest wall time is the one that says most;
        of processor time, of which they take none, the median.
        """
        shortest = min(each.wall_ns for each in taken)
        if self.cores is None:
            return shortest
        used_ns = statistics.median_low(each.cpu_ns for each in taken)
        left = max(self.cores - LOOP_CORES, self.cores / 2)
        return max(shortest, round(used_ns / left))


NO_QUOTA: Final = Stopwatch()
