"""How the devices of a question end a step together: who records it, over which links."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from p2ptrain.planner.question import Question
from p2ptrain.schedule.step_end import Members, PeerEnd, period_ns


class StepEnds:
    """Prices the ends of steps; remembers what it has asked of links.

    In a run every member records a step; of devices that are only described, those that compute do.

    Args:
        question: Whose devices, sorted by id, are meant.
        latency_ns: Between two devices, one way.
    """

    def __init__(self, question: Question, latency_ns: Callable[[int, int], int]) -> None:
        devices = sorted(question.devices, key=lambda device: device.id)
        self._everybody = list(range(len(devices))) if question.for_run else None
        self._record_ns = [device.profile.record_ns for device in devices]
        homes = (i for i, device in enumerate(devices) if device.id == question.home)
        self._home = next(homes, None)
        self._latency_of = latency_ns
        self._latency_ns: list[list[int]] = []

    def period_ns(self, ends: Sequence[PeerEnd]) -> int:
        """Time of a step that ends so at each peer that computes."""
        taking_part = self._everybody
        if taking_part is None:
            taking_part = sorted({end.device for end in ends})
        if not self._latency_ns:
            self._latency_ns = self._ask()
        return period_ns(
            ends,
            Members(
                record_ns={i: self._record_ns[i] for i in taking_part},
                tie_breaker=self._home,
                latency_ns=self._latency_ns,
            ),
        )

    def _ask(self) -> list[list[int]]:
        every = range(len(self._record_ns))
        return [[0 if a == b else self._latency_of(a, b) for b in every] for a in every]
