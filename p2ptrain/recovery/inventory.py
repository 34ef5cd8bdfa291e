"""What one member holds of a run that others could need when somebody is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from p2ptrain import limits
from p2ptrain.ids import DeviceId
from p2ptrain.planner.links import LinkFigure
from p2ptrain.planner.profile import Battery

LogKind = Literal["activation", "cotangent", "tied"]
"""Tensors that senders log: boundary values forward, backward, and gradients of tied copies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentSpan:
    """Consecutive segments: `first` and the `count - 1` after it."""

    first: int
    count: int

    def __post_init__(self) -> None:
        if self.first < 0 or not 1 <= self.count <= limits.SEGMENTS_MAX:
            raise ValueError("a span has at least one segment")

    @property
    def segments(self) -> range:
        """The segments' indices."""
        return range(self.first, self.first + self.count)


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveStage:
    """A stage whose parameters, optimizer state and perhaps gradients are in a peer's memory."""

    span: SegmentSpan
    step: int
    """Updates applied."""
    gradients_complete: bool
    """Every backward of step `step + 1` is done, so that its update can still be applied."""
    further: SegmentSpan | None = None
    """The last stage of a private run's home peer, beside its first."""

    @property
    def segments(self) -> tuple[int, ...]:
        """Of the stage, or of both."""
        further = () if self.further is None else tuple(self.further.segments)
        return (*self.span.segments, *further)


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveShard:
    """A tensor shard in a peer's memory: its slices of every segment, and perhaps gradients."""

    weights: tuple[int, ...]
    """Of all shards, by rank."""
    rank: int
    step: int
    """Updates applied."""
    gradients_complete: bool
    """As of a `LiveStage`."""

    def __post_init__(self) -> None:
        if (
            len(self.weights) < 2
            or min(self.weights) < 1
            or self.rank not in range(len(self.weights))
        ):
            raise ValueError("a shard is one of two or more, each with a part")


def live_stage(stages: Sequence[range], step: int, *, gradients_complete: bool) -> LiveStage:
    """What a device with one stage, or a private run's two, has in memory."""
    spans = [SegmentSpan(first=own.start, count=len(own)) for own in stages]
    further = spans[1] if len(spans) > 1 else None
    return LiveStage(
        span=spans[0], step=step, gradients_complete=gradients_complete, further=further
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldState:
    """Replicas of these segments' states after `step` updates, fsynced here."""

    span: SegmentSpan
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldLog:
    """Tensors this peer sent (or made again in a replay) and still has, whole steps only.

    `segment` names the boundary: an activation of `segment` goes to `segment + 1`, a cotangent of
    `segment` (the value's maker) comes back from `segment + 1`; a tied gradient is named by the
    segment that made it.
    """

    kind: LogKind
    segment: int
    first_step: int
    last_step: int
    microbatches: tuple[int, ...] = ()
    """Those that are held, ascending; empty: all, as of a peer that runs its stage alone."""

    def __post_init__(self) -> None:
        if not 1 <= self.first_step <= self.last_step:
            raise ValueError("a log covers at least one step")
        check_microbatches(self.microbatches)


def check_microbatches(microbatches: tuple[int, ...]) -> None:
    """ValueError for what cannot be some of a step's microbatches."""
    known = all(0 <= each < limits.MICROBATCHES_MAX for each in microbatches)
    if not known or tuple(sorted(set(microbatches))) != microbatches:
        raise ValueError("microbatches are named once, in order")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """Everything a promise tells about its maker's holdings, at the moment of the promise."""

    live: LiveStage | None
    """None: no stage, or it was lost with a crash of this peer's process."""
    states: tuple[HeldState, ...]
    logs: tuple[HeldLog, ...]
    has_data: bool
    """Whether this peer can feed the run's inputs and labels."""
    linked: tuple[DeviceId, ...]
    """Devices with which it can exchange tensors now, sorted."""
    links: tuple[LinkFigure, ...] = ()
    """What it has measured of its links."""
    battery: Battery | None = None
    """That it runs on now; as in `PeerProfile`."""
    shard: LiveShard | None = None
    """None: no tensor shard, or it was lost with a crash. Of no segment is enough here, so it
    counts only beside all the others."""

    def __post_init__(self) -> None:
        if len(self.links) > limits.LINK_PEERS_MAX:
            raise ValueError("figures of more links than there can be")
