"""What came into a range of segments during a step, and what went out: the places of its logs.

A log is named by its kind and a segment (`recovery.inventory.HeldLog`). A packed step of tied
gradients holds those of every tied copy in its segment, also of copies that share a gradient
within their stage only, so that what it holds does not depend on the cuts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.errors import RemoteProtocolError
from p2ptrain.training.contract import Contract
from p2ptrain.training.step_tensors import (
    Array,
    StepKind,
    expected_tensors,
    packed_bytes,
    unpack_arrays,
)
from p2ptrain.training.ties import tie_groups


@dataclass(frozen=True, slots=True)
class StepPlace:
    """Where one step's tensors are from: a boundary, a segment's tied copies, or the data."""

    kind: StepKind
    segment: int
    """As `expected_tensors` takes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """Everything that a range of segments had received during one step, by microbatch."""

    inputs: tuple[tuple[Array, ...], ...] = ()
    """Per data port; where the range begins the model."""
    labels: tuple[Array, ...] = ()
    """Where the range ends the model."""
    loss_weight: float = 0.0
    activations: tuple[tuple[Array, ...], ...] = ()
    """Per boundary value; where the range begins later."""
    cotangents: tuple[tuple[Array, ...], ...] = ()
    """Per boundary value that has one; where the range ends earlier."""
    tied: Mapping[str, Array] = field(default_factory=dict)
    """By tensor name: gradients of tied copies outside the range."""


def needed_places(manifest: Manifest, segments: range) -> tuple[StepPlace, ...]:
    """What must be fetched for each step of a replay: at most two of the ends, then ties."""
    first, last = segments.start == 0, segments.stop == len(manifest.segments)
    places = [
        StepPlace("input", 0) if first else StepPlace("activation", segments.start - 1),
        StepPlace("labels", 0) if last else StepPlace("cotangent", segments.stop - 1),
    ]
    outside = {
        holder.segment
        for group in tie_groups(manifest)
        if any(holder.segment in segments for holder in group.holders)
        for holder in group.holders
        if holder.segment not in segments
    }
    return (*places, *(StepPlace("tied", segment) for segment in sorted(outside)))


def sent_places(
    manifest: Manifest, segments: range, cuts: Collection[int] = ()
) -> tuple[StepPlace, ...]:
    """What the stages of a range had sent, and so what a replay logs again.

    Args:
        manifest: Of the model.
        segments: The range.
        cuts: Segments of the range after which a stage ended, where it is more than one stage.
    """
    inner = [segment for segment in segments[:-1] if segment in cuts]
    ends = [segments.stop - 1] if segments.stop < len(manifest.segments) else []
    begins = [segments.start - 1] if segments.start > 0 else []
    tied = sorted({
        holder.segment
        for group in tie_groups(manifest)
        if len({_part(holder.segment, segments, inner) for holder in group.holders}) > 1
        for holder in group.holders
        if holder.segment in segments
    })  # fmt: skip
    return (
        *(StepPlace("activation", segment) for segment in (*inner, *ends)),
        *(StepPlace("cotangent", segment) for segment in (*begins, *inner)),
        *(StepPlace("tied", segment) for segment in tied),
    )


def place_bytes(manifest: Manifest, contract: Contract, place: StepPlace) -> int:
    """The packed size of one step at a place, exactly."""
    return packed_bytes(expected_tensors(manifest, contract, place.kind, place.segment))


def step_inputs(
    manifest: Manifest,
    contract: Contract,
    segments: range,
    packed: Mapping[StepPlace, bytes | memoryview],
) -> StepInputs:
    """Read one step's packed tensors; arrays are read-only views into them.

    Args:
        manifest: Of the model.
        contract: Of the run.
        segments: The range that is replayed.
        packed: For every one of its `needed_places`.

    Raises:
        RemoteProtocolError: one is missing or does not hold what it must; ask another holder.
    """
    missing = [place for place in needed_places(manifest, segments) if place not in packed]
    if missing:
        raise RemoteProtocolError(f"a replayed step lacks {missing[0]}")

    def values(kind: StepKind, segment: int) -> tuple[tuple[Array, ...], ...]:
        content = packed.get(StepPlace(kind, segment))
        if content is None:
            return ()
        expected = expected_tensors(manifest, contract, kind, segment)
        return unpack_arrays(content, expected) or ((),) * contract.microbatches

    labels = values("labels", 0) if segments.stop == len(manifest.segments) else ()
    return StepInputs(
        inputs=values("input", 0) if segments.start == 0 else (),
        labels=tuple(each[0] for each in labels),
        loss_weight=_loss_weight(labels),
        activations=values("activation", segments.start - 1),
        cotangents=values("cotangent", segments.stop - 1),
        tied=_tied(manifest, contract, segments, packed),
    )


def _tied(
    manifest: Manifest,
    contract: Contract,
    segments: range,
    packed: Mapping[StepPlace, bytes | memoryview],
) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for place in needed_places(manifest, segments):
        if place.kind == "tied":
            expected = expected_tensors(manifest, contract, "tied", place.segment)
            (arrays,) = unpack_arrays(packed[place], expected)
            names = (manifest.tensors[each.index].name for each in expected)
            found |= dict(zip(names, arrays, strict=True))
    return found


def _loss_weight(labels: tuple[tuple[Array, ...], ...]) -> float:
    weights = {float(weight[0]) for _, weight in labels}
    if not weights:
        return 0.0
    if len(weights) != 1 or not all(math.isfinite(w) and 0.0 < w <= 1.0 for w in weights):
        raise RemoteProtocolError("a replayed step has no single loss weight between 0 and 1")
    return weights.pop()


def _part(segment: int, segments: range, inner: list[int]) -> int:
    """Which stage of the range a segment is in; -1 for all that lies outside."""
    return sum(cut < segment for cut in inner) if segment in segments else -1
