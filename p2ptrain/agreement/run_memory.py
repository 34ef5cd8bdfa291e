"""Which durable memory a device speaks from, and how an older image of it is found out.

A disk may come back as it was some time ago: a restored backup, a copy of an SD card, a virtual
machine's snapshot. Its journal is then whole and says nothing of what was promised since. But
others heard those promises. So whatever hangs on a journal tells how far that journal was, and
everybody tells a device what they have heard from it: a device that does not remember it all
begins another journal, which has no vote until a view names it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from p2ptrain import limits
from p2ptrain.ids import DeviceId

NAME_BITS: Final = 61


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """How far a journal was when its device said something."""

    journal: int
    """Names it; a device that lost its disk begins another."""
    start: int
    """Names the start of the process that spoke."""
    count: int
    """Records that were durable in the journal by then."""

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError("a journal has no records or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class PastStart:
    """A process start that has ended, and how many records the journal had then."""

    start: int
    count: int


class OwnMemory:
    """This device's journal: its name, how long it is, and what earlier starts had added to it."""

    def __init__(self, rng: random.Random) -> None:
        self.journal = 1 + rng.getrandbits(NAME_BITS)
        self.start = 1 + rng.getrandbits(NAME_BITS)
        self.count = 0
        """Records since the journal was named, but for those that name it."""
        self._past: dict[int, int] = {}
        self._read_start = 0

    @property
    def past(self) -> tuple[PastStart, ...]:
        """Earlier starts, the newest last."""
        kept = list(self._past.items())[-limits.JOURNAL_STARTS_MAX :]
        return tuple(PastStart(start=start, count=count) for start, count in kept)

    def read_name(self, journal: int, start: int, count: int, past: Iterable[PastStart]) -> None:
        """The journal on disk has this name, and says this of itself."""
        if journal == self.journal and count < self.count:
            return  # told twice
        self.journal, self._read_start, self.count = journal, start, count
        self._past = {each.start: each.count for each in past}

    def read_start(self, start: int) -> None:
        """What was read up to here was written before this start."""
        self._past[self._read_start] = self.count
        self._read_start = start

    def renew(self, rng: random.Random) -> None:
        """Begin another journal, in which nothing was ever promised."""
        self.journal = 1 + rng.getrandbits(NAME_BITS)
        self._past.clear()

    def at(self, pending: int) -> Memory:
        """How far it is once so many records that wait have been written."""
        return Memory(journal=self.journal, start=self.start, count=self.count + pending)

    def remembers(self, said: Memory) -> bool:
        """Whether what another heard follows from this journal, or from one that has no vote."""
        if said.journal != self.journal or said.start == self.start:
            return True
        return said.count <= self._past.get(said.start, -1)


class Heard:
    """From which memories every device has spoken, as far as this process has heard it."""

    def __init__(self) -> None:
        self._counts: dict[DeviceId, dict[tuple[int, int], int]] = {}
        self._journals: dict[DeviceId, int] = {}

    def note(self, device: DeviceId, memory: Memory) -> bool:
        """A device spoke from this memory; bounded, the oldest start goes.

        Returns:
            Whether it has started anew since it last spoke.
        """
        self._journals[device] = memory.journal
        counts = self._counts.setdefault(device, {})
        key = (memory.journal, memory.start)
        restarted = bool(counts) and key not in counts
        counts[key] = max(memory.count, counts.get(key, 0))
        while len(counts) > limits.HEARD_STARTS_MAX:
            del counts[next(iter(counts))]
        return restarted

    def from_device(self, device: DeviceId) -> tuple[Memory, ...]:
        """What to remind a device of."""
        counts = self._counts.get(device, {})
        return tuple(
            Memory(journal=journal, start=start, count=count)
            for (journal, start), count in counts.items()
        )

    def journal_of(self, device: DeviceId) -> int:
        """The journal that a device named last; 0: not known."""
        return self._journals.get(device, 0)
