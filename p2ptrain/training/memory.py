"""The memory a stage is predicted to need at its peak; the planner's feasibility test."""

from __future__ import annotations

from typing import Final

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.errors import PlanInfeasible
from p2ptrain.training.layout import flat_layout

ELEMENT_BYTES: Final = 4
PROCESS_BYTES: Final = 96 * 1024 * 1024
"""A joined peer before it trains: interpreter, libraries and the runtime, measured."""
SESSION_BYTES: Final = 1024 * 1024
"""One compiled graph with its bindings, measured."""


def memory_bytes(
    manifest: Manifest, segments: range, form: str, batch: int, in_flight: int, optimizer: str
) -> int:
    """Predicted peak bytes of a peer that runs these segments.

    Args:
        manifest: Of the model.
        segments: The stage's segments.
        form: Of the graphs: portable or training.
        batch: Samples of a microbatch.
        in_flight: Microbatches whose stash is held at once.
        optimizer: adamw or sgd.

    Raises:
        PlanInfeasible: the bundle has no such optimizer; choose another.
    """
    rule = manifest.updates.get(optimizer)
    if rule is None:
        raise PlanInfeasible(f"the bundle has no update rule {optimizer!r}")
    layouts = [flat_layout(manifest, index) for index in segments]
    trainable = [layout.length for layout in layouts]
    elements = sum(layout.length for layout in layouts)  # parameters
    elements += sum(trainable) * (1 + len(rule.state)) + max(trainable)  # gradients, state, scratch
    stash = [manifest.stash_bytes(index, form=form, batch=batch) for index in segments]
    kinds = {manifest.segments[index].kind: place for place, index in enumerate(segments)}
    # Intermediates and transposed weights. The arena keeps the blocks of each kind apart.
    lengths = [layouts[place].length * ELEMENT_BYTES for place in kinds.values()]
    workspace = 2 * (sum(stash[place] for place in kinds.values()) + sum(lengths))
    sessions = 2 * len(kinds) + 1
    return (
        elements * ELEMENT_BYTES
        + sum(stash) * in_flight
        + workspace
        + _boundary_bytes(manifest, segments, batch, in_flight)
        + sessions * SESSION_BYTES
        + PROCESS_BYTES
    )


def _boundary_bytes(manifest: Manifest, segments: range, batch: int, in_flight: int) -> int:
    """Rings of activations and cotangents at both ends, one cotangent at each inner boundary."""
    edges = [segments.start - 1] if segments.start > 0 else []
    edges += [segments.stop - 1] if segments.stop < len(manifest.segments) else []
    ring = sum(manifest.boundary_bytes(edge, batch=batch) for edge in edges)
    inner = sum(manifest.boundary_bytes(index, batch=batch) for index in segments[:-1])
    return 2 * ring * (in_flight + 1) + inner
