"""The access point as a pure machine: frames in, frames out at their time, counts per pair."""

from __future__ import annotations

import dataclasses
import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass

from tools.wifi_emulator.commands import Change, Command, Cut, Heal, Partition
from tools.wifi_emulator.cuts import Cuts
from tools.wifi_emulator.medium import Air, Medium, Sent

_HEADER_BYTES = 14
_BROADCAST = b"\xff" * 6


@dataclass(slots=True)
class PairCounts:
    """What one station sent towards another, by what became of it."""

    delivered_frames: int = 0
    delivered_bytes: int = 0
    lost_frames: int = 0
    cut_frames: int = 0
    filtered_frames: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HubCounts:
    """Frames and bytes since the start."""

    pairs: dict[str, PairCounts]
    """By `A>B`."""
    queue_drops: dict[str, int]
    """Frames dropped before they were sent, by station."""


class Hub:
    """Learns who is where, puts frames on the air and hands them out when they arrive."""

    def __init__(self, stations: Sequence[str], air: Air, *, seed: int) -> None:
        self.stations = tuple(stations)
        self.cuts = Cuts()
        self.medium = Medium(stations, air, random.Random(seed))
        self._station_of: dict[bytes, str] = {}
        self._arriving: list[tuple[float, int, str, str, bytes]] = []
        self._sequence = 0
        self._pairs = {
            (one, other): PairCounts() for one in stations for other in stations if one != other
        }
        self._drops = dict.fromkeys(stations, 0)

    def receive(self, source: str, frame: bytes, now: float) -> None:
        """A station hands over one Ethernet frame; a runt is ignored."""
        if len(frame) < _HEADER_BYTES:
            return
        self._station_of[frame[6:12]] = source
        if not self.medium.offer(source, frame, now):
            self._drops[source] += 1

    def deadline(self) -> float | None:
        """When `advance` has something to do next."""
        begins = self.medium.deadline()
        arrives = self._arriving[0][0] if self._arriving else None
        due = [at for at in (begins, arrives) if at is not None]
        return min(due, default=None)

    def advance(self, now: float) -> list[tuple[str, bytes]]:
        """Frames that have arrived by now, each with its receiver, in order of arrival."""
        for sent in self.medium.advance(now):
            self._spread(sent)
        due = []
        while self._arriving and self._arriving[0][0] <= now:
            _, _, source, receiver, frame = heapq.heappop(self._arriving)
            counts = self._pairs[source, receiver]
            counts.delivered_frames += 1
            counts.delivered_bytes += len(frame)
            due.append((receiver, frame))
        return due

    def apply(self, command: Command) -> None:
        """Obey one command; CommandError when a value is out of range."""
        match command:
            case Change():
                self.medium.change(command.applied(self.medium.air))
            case Partition(groups=groups):
                self.cuts.partition(groups)
            case Cut(pairs=pairs):
                self.cuts.cut(pairs)
            case Heal(pairs=healed):
                self.cuts.heal(healed)

    def counts(self) -> HubCounts:
        """A copy of the counts."""
        pairs = {
            f"{one}>{other}": dataclasses.replace(counts)
            for (one, other), counts in self._pairs.items()
        }
        return HubCounts(pairs=pairs, queue_drops=dict(self._drops))

    def _spread(self, sent: Sent) -> None:
        for receiver in self._receivers(sent):
            counts = self._pairs[sent.source, receiver]
            if not self.cuts.passes(sent.source, receiver):
                counts.cut_frames += 1
            elif _is_multicast(sent.frame) and not self.medium.air.multicast:
                counts.filtered_frames += 1
            elif (at_s := self.medium.arrival_s(sent, receiver)) is None:
                counts.lost_frames += 1
            else:
                self._sequence += 1
                entry = (at_s, self._sequence, sent.source, receiver, sent.frame)
                heapq.heappush(self._arriving, entry)

    def _receivers(self, sent: Sent) -> list[str]:
        destination = sent.frame[:6]
        known = self._station_of.get(destination)
        if known is not None and not destination[0] & 1:
            return [known] if known != sent.source else []
        return [station for station in self.stations if station != sent.source]


def _is_multicast(frame: bytes) -> bool:
    return bool(frame[0] & 1) and frame[:6] != _BROADCAST
