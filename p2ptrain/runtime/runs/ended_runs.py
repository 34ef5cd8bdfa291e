"""Runs that are over, so that a peer which missed the end is told when it asks about one.

Who conducted a run keeps its end on the disk; every other member remembers it as long as it runs.
"""

from __future__ import annotations

from pathlib import Path

from p2ptrain import limits
from p2ptrain.agreement.run_messages import DecidedView, RunMessage
from p2ptrain.ids import RunId
from p2ptrain.store.runs import RunDirectory, run_paths
from p2ptrain.training.messages import Ended


class EndedRuns:
    """The newest ended lineage of each run, the oldest forgotten first."""

    def __init__(self) -> None:
        self._ended: dict[RunId, Ended] = {}

    def load(self, runs_path: Path) -> None:
        """Take in what is on the disk; blocking."""
        for path in reversed(run_paths(runs_path)[: limits.ENDED_RUNS_MAX]):
            ended = RunDirectory(path).read_ended()
            if ended is not None:
                self.note(ended)

    def note(self, ended: Ended) -> None:
        """A lineage is over."""
        known = self._ended.pop(ended.run, ended)
        self._ended[ended.run] = max(known, ended, key=lambda each: each.lineage)
        while len(self._ended) > limits.ENDED_RUNS_MAX:
            del self._ended[next(iter(self._ended))]

    def goes_on(self, run: RunId) -> None:
        """Somebody offers the run: whatever ended, it is begun again."""
        self._ended.pop(run, None)

    def answer_to(self, message: RunMessage) -> Ended | None:
        """What its sender has missed; None where its lineage is not known to have ended."""
        about = message.value if isinstance(message, DecidedView) else message
        ended = self._ended.get(about.run)
        return ended if ended is not None and about.lineage <= ended.lineage else None
