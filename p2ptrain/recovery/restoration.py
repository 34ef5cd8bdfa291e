"""How a new view gets every segment's state at the step where it goes on."""

from __future__ import annotations

from dataclasses import dataclass

from p2ptrain.ids import DeviceId
from p2ptrain.recovery.inventory import SegmentSpan


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
    """Who logged what crossed into the span; None: it begins the model, a data holder feeds it."""
    cotangents_from: DeviceId | None
    """Who logged what came back into the span; None: it ends the model."""
    tied_from: tuple[TiedAt, ...]
    data_from: DeviceId | None
    """A data holder, where the span begins or ends the model and steps are replayed."""
    cuts: tuple[int, ...] = ()
    """Segments inside the span after which a link was: a lossy codec rounds there again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restoration:
    """Replays to make first, then who has each segment's state at the view's step."""

    replays: tuple[Replay, ...]
    sources: tuple[SpanAt, ...]
    """Covers every segment once, in order; a replayer is the source of its span."""
