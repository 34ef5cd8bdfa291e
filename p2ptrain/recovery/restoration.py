"""How a new view gets every segment's state at the step where it goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from p2ptrain.ids import DeviceId
from p2ptrain.recovery.inventory import SegmentSpan, check_microbatches

BoundaryKind = Literal["activation", "cotangent"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanAt:
    """Segments, and the device that has them."""

    span: SegmentSpan
    device: DeviceId


@dataclass(frozen=True, slots=True, kw_only=True)
class TiedAt:
    """The device whose log has the gradients of the tied copies that `segment` made."""

    segment: int
    device: DeviceId


@dataclass(frozen=True, slots=True, kw_only=True)
class LogPart:
    """Some microbatches of a boundary's log in some steps, and the device that has them: what
    replicas beside a span have logged each of its own."""

    kind: BoundaryKind
    device: DeviceId
    first_step: int
    last_step: int
    microbatches: tuple[int, ...]

    def __post_init__(self) -> None:
        check_microbatches(self.microbatches)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A lost range of segments: loaded as it was after `step` and run again up to the view's step.

    Step 0 is drawn from the seed (or read from the bundle's weights) instead of loaded.
    """

    span: SegmentSpan
    step: int
    replayer: DeviceId
    replicas: tuple[SpanAt, ...]
    """Covers the span; empty at step 0."""
    activations_from: DeviceId | None
    """Who logged what crossed into the span; None: it begins the model, a data holder feeds it, or
    several did."""
    cotangents_from: DeviceId | None
    """Who logged what came back into the span; None: it ends the model, or several did."""
    tied_from: tuple[TiedAt, ...]
    data_from: DeviceId | None
    """A data holder, where the span begins or ends the model and steps are replayed."""
    cuts: tuple[int, ...] = ()
    """Segments inside the span after which a link was: a lossy codec rounds there again."""
    parts: tuple[LogPart, ...] = ()
    """Where several peers logged a boundary: together every microbatch of every step."""
    shares: tuple[int, ...] = ()
    """Weights by rank of the tensor shards that had made the steps, whose order of additions the
    replayer follows; empty: one peer had."""

    def __post_init__(self) -> None:
        if self.shares and (len(self.shares) < 2 or min(self.shares) < 1):
            raise ValueError("shards are two or more, each with a part")

    def givers(self, kind: BoundaryKind, step: int) -> tuple[tuple[DeviceId, tuple[int, ...]], ...]:
        """Who gives which microbatches of a boundary's log of one step; no microbatches: all."""
        whole = self.activations_from if kind == "activation" else self.cotangents_from
        if whole is not None:
            return ((whole, ()),)
        return tuple(
            (part.device, part.microbatches)
            for part in self.parts
            if part.kind == kind and part.first_step <= step <= part.last_step
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Restoration:
    """Replays to make first, then who has each segment's state at the view's step."""

    replays: tuple[Replay, ...]
    sources: tuple[SpanAt, ...]
    """Covers every segment once, in order; a replayer is the source of its span. Where tensor
    shards stay as they are it is the first of them, and nobody asks it."""

    def replayed_steps(self, resume_step: int) -> int:
        """Of the longest replay, each shard's part of a step counted as one."""
        return max(
            ((resume_step - each.step) * max(1, len(each.shares)) for each in self.replays),
            default=0,
        )
