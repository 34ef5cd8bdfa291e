"""How fast a link carries, from what the kernel takes of what is sent: pure, given each moment.

While more is sent than the link carries, the kernel's buffer fills up. From one moment at which it
is full to the next, as much has left it as was handed to it in between, so these bytes over that
time are what the link carried. Where it never fills up, what the kernel itself has timed counts, if
it tells; else nothing is known but that the link sufficed.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass
from typing import Final

SAMPLE_BYTES_MIN: Final = 512 * 1024
"""Of one sample: less would measure how the kernel rounds."""
SAMPLE_S_MIN: Final = 0.02
SAMPLES_MIN: Final = 3
"""Before there is a figure."""
SAMPLES_MAX: Final = 15
"""The newest ones; their median does not follow a stall or a burst."""
KEPT_S: Final = 900.0
"""An older sample tells nothing about a link that may have moved to another room since."""
DELIVERED_BYTES_MIN: Final = 64 * 1024
"""Between two looks at what the kernel has timed: less says little."""
GAP_S: Final = 0.005
"""A longer pause between two sends may have emptied the buffer: it is not counted over."""


@dataclass(frozen=True, slots=True)
class _Sample:
    at_s: float
    bytes_per_s: float


class Throughput:
    """What one direction of a link carries while more waits than it can."""

    def __init__(self) -> None:
        self._full_at_s: float | None = None
        self._since_full = 0
        self._ended_at_s = 0.0
        self._bytes, self._seconds = 0, 0.0
        self._samples: deque[_Sample] = deque(maxlen=SAMPLES_MAX)
        self._told: deque[_Sample] = deque(maxlen=SAMPLES_MAX)
        self._acked_bytes = 0

    def handed(self, taken: int, offered: int, *, began_s: float, ended_s: float) -> None:
        """A send of `offered` bytes took from `began_s` to `ended_s`; the kernel took `taken`."""
        if self._full_at_s is not None and began_s - self._ended_at_s > GAP_S:
            self._full_at_s = None
        self._ended_at_s = ended_s
        if self._full_at_s is not None:
            self._since_full += taken
        if taken < offered:
            self._full(ended_s)

    def delivered(self, acked_bytes: int, bytes_per_s: float, *, now: float) -> None:
        """The kernel says what it has delivered in all, and how fast lately."""
        if acked_bytes - self._acked_bytes >= DELIVERED_BYTES_MIN:
            self._acked_bytes = acked_bytes
            self._told.append(_Sample(now, bytes_per_s))

    def bytes_per_s(self, now: float) -> int | None:
        """The median of recent samples, at least 1; None: not measured, or too long ago."""
        for samples in (self._samples, self._told):
            recent = [each.bytes_per_s for each in samples if now - each.at_s <= KEPT_S]
            if len(recent) >= SAMPLES_MIN:
                return max(1, round(statistics.median(recent)))
        return None

    def _full(self, now: float) -> None:
        if self._full_at_s is not None:
            self._bytes += self._since_full
            self._seconds += now - self._full_at_s
        self._full_at_s, self._since_full = now, 0
        if self._bytes >= SAMPLE_BYTES_MIN and self._seconds >= SAMPLE_S_MIN:
            self._samples.append(_Sample(now, self._bytes / self._seconds))
            self._bytes, self._seconds = 0, 0.0
