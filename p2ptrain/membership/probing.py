"""Whom to ask next, through whom, and which answers are still waited for."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from p2ptrain import limits
from p2ptrain.ids import DeviceId


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One ping, or one request to ask for us, that has not been answered."""

    to: DeviceId
    """Who must answer."""
    target: DeviceId
    """Whose life is asked about; `to` itself for a ping."""
    sent_at_s: float
    asker: DeviceId | None = None
    """For whom we ask; None: for ourselves."""
    asker_sequence: int = 0
    """What the asker called the question."""


class Questions:
    """Questions by sequence number; old ones are forgotten, and their number is bounded."""

    def __init__(self) -> None:
        self.count = 0
        """Asked since the start."""
        self._open: dict[int, Question] = {}

    def add(self, question: Question) -> int:
        """Note a question that is sent now; gives its sequence number."""
        self.count += 1
        if len(self._open) >= limits.QUESTIONS_OPEN_MAX:
            del self._open[next(iter(self._open))]
        self._open[self.count] = question
        return self.count

    def answered(self, sequence: int, *, by: DeviceId, target: DeviceId) -> Question | None:
        """Close a question; None for an answer that nobody waits for, or from somebody else."""
        question = self._open.get(sequence)
        if question is None or (question.to, question.target) != (by, target):
            return None
        del self._open[sequence]
        return question

    def forget(self, before_s: float) -> None:
        """Drop what was asked before a time: it will not be answered any more."""
        while self._open:
            first = next(iter(self._open))
            if self._open[first].sent_at_s >= before_s:
                return
            del self._open[first]


class ProbeOrder:
    """SWIM's order: everybody once per round, each round shuffled anew."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._waiting: list[DeviceId] = []

    def add(self, device: DeviceId) -> None:
        """A newcomer takes a random place in the present round."""
        self._waiting.insert(self._rng.randrange(len(self._waiting) + 1), device)

    def next(self, wanted: Collection[DeviceId]) -> DeviceId:
        """The next one to probe; whoever is not wanted now is passed over.

        Args:
            wanted: All that could be probed, at least one; shuffled when a round is over.
        """
        while self._waiting:
            device = self._waiting.pop()
            if device in wanted:
                return device
        self._waiting = sorted(wanted)
        self._rng.shuffle(self._waiting)
        return self._waiting.pop()


def choose_relays(
    target: DeviceId,
    linked: Mapping[DeviceId, frozenset[DeviceId]],
    *,
    count: int,
    rng: random.Random,
) -> tuple[DeviceId, ...]:
    """Whom to ask to ask `target`: those that say they have a link with it, then anybody.

    Args:
        linked: Live peers that we have links with -> whom they say they have links with.
    """
    near = [device for device, theirs in linked.items() if target in theirs]
    far = [device for device, theirs in linked.items() if target not in theirs]
    chosen = rng.sample(near, min(count, len(near)))
    return (*chosen, *rng.sample(far, min(count - len(chosen), len(far))))
