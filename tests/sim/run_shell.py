"""What a simulated device does around the cores: data on its links, and flaws that tests put in."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from p2ptrain.ids import Digest
from p2ptrain.recovery.successor import Placement, Wish
from tests.sim.run_model import Value
from tests.sim.run_views import planned_stages

Position = tuple[int, int]
"""(lineage, view)"""


@dataclass(frozen=True, kw_only=True)
class Flaws:
    """Rules of the shell that a mutation breaks."""

    release_early: bool = False
    """The log is released when a snapshot is made, not when its set is whole."""
    trust_replicas: bool = False
    """A keeper does not check what it received."""
    guess_clip_scale: bool = False
    """A replay takes another clip scale than the record's."""
    count_memory: bool = False
    """Records that were only in memory count as if they were remembered."""
    assume_copies: bool = False
    """Second copies count as soon as they are planned."""


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """An activation, a cotangent or a tied gradient between stages."""

    position: Position
    kind: str
    step: int
    segment: int
    value: Value


@dataclass(frozen=True, kw_only=True)
class StageDone:
    """A stage's gradients of a step are complete."""

    position: Position
    step: int
    gradients: dict[int, Value]


@dataclass(frozen=True, kw_only=True)
class Replica:
    """A segment's state on its way to its keeper; links may damage it."""

    position: Position
    step: int
    segment: int
    state: Value
    digest: Digest


@dataclass(frozen=True, kw_only=True)
class Complaint:
    """A member cannot go on in this view: somebody should propose the next."""

    position: Position


@dataclass
class Disk:
    """What survives a crash."""

    journal: list[object] = field(default_factory=list)
    replicas: dict[tuple[int, int], Value] = field(default_factory=dict)
    """(segment, step) -> state"""
    has_data: bool = False

    def copy(self) -> Disk:
        """An image, as a backup or a snapshot of a machine takes it."""
        return Disk(list(self.journal), dict(self.replicas), self.has_data)


def digest(state: Value) -> Digest:
    return Digest(hashlib.sha256(state).hexdigest())


def place(wishes: Sequence[Wish]) -> Placement:
    """Every device can run everything; fewer and more even stages are faster."""
    stages = planned_stages(*((wish.devices[0], len(wish.segments)) for wish in wishes))
    return Placement(stages=stages, step_ns=max(stage.segment_count for stage in stages))
