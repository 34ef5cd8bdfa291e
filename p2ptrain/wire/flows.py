"""What a link's bytes are for: counted by run and kind, at the socket, where they are sent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from p2ptrain.ids import DeviceId

NO_RUN: Final = ""
RUNS_COUNTED_MAX: Final = 64
"""Of one link; what is older is added up as of no run."""
FLOW_KINDS: Final = (
    "activation",
    "cotangent",
    "input",
    "labels",
    "release",
    "tied",
    "reduce",
    "gather",
    "evaluation",
    "state",
    "log",
    "data",
    "weights",
    "bundle",
    "control",
)
"""Tensors of training by their kind, those of evaluation together; then what goes in chunks:
states of segments, senders' logs, training data, parameters, models; then messages."""
_COLLECTIVES: Final = {"part": "reduce", "total": "reduce", "slice": "gather"}


class Flow(NamedTuple):
    """What some of a link's bytes are for."""

    run: str
    """NO_RUN: the group's own."""
    kind: str
    """One of FLOW_KINDS."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """Encrypted bytes that one device sent to another for one kind of a run's traffic."""

    to: DeviceId
    kind: str
    bytes: int

    def __post_init__(self) -> None:
        if self.kind not in FLOW_KINDS or self.bytes < 0:
            raise ValueError("unknown kind of traffic, or a negative number of bytes")


def tensor_flow_kind(kind: str, phase: str) -> str:
    """Under which kind a tensor frame's bytes are counted."""
    return _COLLECTIVES.get(kind, kind) if phase == "train" else "evaluation"


class FlowCounter:
    """Bytes by flow of one link, or of all links that one peer had."""

    def __init__(self) -> None:
        self._bytes: Counter[Flow] = Counter()

    def add(self, flow: Flow, count: int) -> None:
        """Count bytes; the oldest run is forgotten as a run when there are too many."""
        is_new = flow not in self._bytes
        self._bytes[flow] += count
        if is_new:
            runs = dict.fromkeys(each.run for each in self._bytes if each.run != NO_RUN)
            if len(runs) > RUNS_COUNTED_MAX:
                self._forget(next(iter(runs)))

    def merge(self, other: FlowCounter) -> None:
        """Count what another one has counted."""
        for flow, count in other._bytes.items():
            self.add(flow, count)

    def of(self, run: str) -> dict[str, int]:
        """Bytes by kind of one run."""
        return {flow.kind: count for flow, count in self._bytes.items() if flow.run == run}

    def _forget(self, run: str) -> None:
        for kind, count in self.of(run).items():
            del self._bytes[Flow(run, kind)]
            self._bytes[Flow(NO_RUN, kind)] += count


def carried(
    now: Mapping[DeviceId, dict[str, int]], before: tuple[Carried, ...]
) -> tuple[Carried, ...]:
    """What was sent to each device since `before`, sorted by device and kind.

    Args:
        now: Bytes by device and kind.
        before: What this function gave for an earlier `now` and nothing before.
    """
    begun = {(each.to, each.kind): each.bytes for each in before}
    counts = {(to, kind): count for to, kinds in now.items() for kind, count in kinds.items()}
    return tuple(
        Carried(to=to, kind=kind, bytes=count - begun.get((to, kind), 0))
        for (to, kind), count in sorted(counts.items())
        if count > begun.get((to, kind), 0)
    )
