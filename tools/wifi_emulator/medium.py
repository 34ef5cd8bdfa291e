"""When frames are on the air, and when they arrive: airtime, queues, delay, jitter and loss.

Pure: the time is handed in. A channel carries one frame at a time; stations that wait for the same
channel take turns, frame by frame, as carrier sensing makes them do on average.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

FRAME_OVERHEAD_BYTES: Final = 24
"""Preamble, check sequence and gap of each frame, in bytes of airtime."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Air:
    """How good the network is; any of it may change while it runs."""

    rate_mbit: float = 100.0
    """Megabit per second of the whole medium, or of each station when not shared."""
    delay_ms: float = 5.0
    """One way, from the end of the transmission to the arrival."""
    jitter_ms: float = 0.0
    """Up to so much more delay, drawn per frame and receiver; frames of a pair keep their order."""
    loss_percent: float = 0.0
    """Drawn per frame and receiver."""
    queue_ms: float = 100.0
    """Airtime that one station may have waiting; what comes beyond is dropped."""
    shared: bool = True
    """One medium for all stations; else each sends without minding the others."""
    multicast: bool = True
    """False: multicast is not passed on, as many guest networks do; broadcast is (ARP)."""

    def __post_init__(self) -> None:
        if not self.rate_mbit > 0 or not self.queue_ms > 0:
            raise ValueError("rate and queue must be above 0")
        if not self.delay_ms >= 0 or not self.jitter_ms >= 0:
            raise ValueError("delay and jitter must not be negative")
        if not 0 <= self.loss_percent <= 100:
            raise ValueError("loss is 0 to 100 per cent")

    def airtime_s(self, frame_bytes: int) -> float:
        """Seconds that one frame occupies its channel."""
        return (frame_bytes + FRAME_OVERHEAD_BYTES) * 8 / (self.rate_mbit * 1e6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """One frame that has begun to be on the air, and when the last bit of it has been sent."""

    source: str
    frame: bytes
    ends_at_s: float


@dataclass(slots=True)
class _Queue:
    frames: deque[tuple[float, bytes]] = field(default_factory=deque)
    """When it was offered, and the frame."""
    frame_bytes: int = 0
    """With overheads."""


class Channel:
    """What carries one frame at a time for a set of stations, which take turns."""

    def __init__(self, stations: Sequence[str], air: Air) -> None:
        self.air = air
        self._order = list(stations)
        self._queues = {station: _Queue() for station in stations}
        self._free_at_s = 0.0

    def offer(self, source: str, frame: bytes, now: float) -> bool:
        """Queue a frame; False when the station's queue is full and it is dropped."""
        queue = self._queues[source]
        cost = len(frame) + FRAME_OVERHEAD_BYTES
        waiting_s = (queue.frame_bytes + cost) * 8 / (self.air.rate_mbit * 1e6)
        if queue.frames and waiting_s > self.air.queue_ms / 1e3:
            return False
        queue.frames.append((now, frame))
        queue.frame_bytes += cost
        return True

    def deadline(self) -> float | None:
        """When the next transmission begins; None while nothing waits."""
        heads = [queue.frames[0][0] for queue in self._queues.values() if queue.frames]
        return max(self._free_at_s, min(heads)) if heads else None

    def advance(self, now: float) -> list[Sent]:
        """Every transmission that has begun by now, in order."""
        begun = []
        while (starts_at_s := self.deadline()) is not None and starts_at_s <= now:
            begun.append(self._transmit(starts_at_s))
        return begun

    def _transmit(self, starts_at_s: float) -> Sent:
        source = next(each for each in self._order if self._waits(each, starts_at_s))
        self._order.remove(source)
        self._order.append(source)  # who has just sent comes last
        queue = self._queues[source]
        _, frame = queue.frames.popleft()
        queue.frame_bytes -= len(frame) + FRAME_OVERHEAD_BYTES
        self._free_at_s = starts_at_s + self.air.airtime_s(len(frame))
        return Sent(source=source, frame=frame, ends_at_s=self._free_at_s)

    def _waits(self, station: str, now: float) -> bool:
        frames = self._queues[station].frames
        return bool(frames) and frames[0][0] <= now


class Medium:
    """The channels of all stations, and the fate of each frame at each receiver."""

    def __init__(self, stations: Sequence[str], air: Air, rng: random.Random) -> None:
        self._stations = tuple(stations)
        self._rng = rng
        self._air = air
        self._channels = self._tuned(air)
        self._last_arrival_s: dict[tuple[str, str], float] = {}

    @property
    def air(self) -> Air:
        """The parameters in force."""
        return self._air

    def change(self, air: Air) -> None:
        """Change parameters; what waits stays, except when sharing changes: then it is lost."""
        if air.shared != self._air.shared:
            self._channels = self._tuned(air)
        self._air = air
        for channel in self._channels.values():
            channel.air = air

    def offer(self, source: str, frame: bytes, now: float) -> bool:
        """A station wants to send; False when its queue is full."""
        return self._channels[source].offer(source, frame, now)

    def deadline(self) -> float | None:
        """When the next transmission begins; None while nothing waits."""
        due = [at for each in self._distinct() if (at := each.deadline()) is not None]
        return min(due, default=None)

    def advance(self, now: float) -> list[Sent]:
        """Every transmission that has begun by now."""
        return [sent for channel in self._distinct() for sent in channel.advance(now)]

    def arrival_s(self, sent: Sent, receiver: str) -> float | None:
        """When a frame arrives at one receiver; None when it is lost on the way."""
        if self._rng.random() * 100 < self._air.loss_percent:
            return None
        jitter_s = self._rng.random() * self._air.jitter_ms / 1e3
        at_s = sent.ends_at_s + self._air.delay_ms / 1e3 + jitter_s
        pair = (sent.source, receiver)
        at_s = max(at_s, self._last_arrival_s.get(pair, 0.0))
        self._last_arrival_s[pair] = at_s
        return at_s

    def _tuned(self, air: Air) -> dict[str, Channel]:
        if air.shared:
            return dict.fromkeys(self._stations, Channel(self._stations, air))
        return {station: Channel([station], air) for station in self._stations}

    def _distinct(self) -> list[Channel]:
        return list(dict.fromkeys(self._channels.values()))
