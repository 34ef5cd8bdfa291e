"""The rings of buffers between a stage's segments, and at its edges.

How long a ring has to be follows from when a place is free again. A neighbour may send the
activations of a microbatch once it has our cotangents of `in_flight + early` microbatches before;
ours are read until gradients are computed, up to `delayed` microbatches after those cotangents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from p2ptrain.bundle.manifest import Manifest, Value
from p2ptrain.engine.contract import Array, Buffer, Engine
from p2ptrain.runtime.compute.segment_runner import Boundary
from p2ptrain.schedule.actions import Held
from p2ptrain.training.boundaries import cotangent_positions


@dataclass(frozen=True, slots=True, kw_only=True)
class RingMaker:
    """Allocates the boundaries of one stage."""

    engine: Engine
    manifest: Manifest
    segments: range
    batch: int
    holds: Held

    def boundary(self, index: int) -> Boundary:
        """The rings before segment `index`: none at the ends of the model."""
        if index == 0 or index == len(self.manifest.segments):
            return Boundary(activations=(), cotangents=())
        inner = self.segments.start < index < self.segments.stop
        values = self.manifest.boundary(index - 1)
        kinds = [self.manifest.kinds[self.manifest.segments[i].kind] for i in (index - 1, index)]
        holds = self.holds
        activations = holds.in_flight if inner else holds.at_edges
        cotangents = max(1, holds.delayed) if inner else holds.at_edges
        return Boundary(
            activations=tuple(self._ring(value, activations) for value in values),
            cotangents=tuple(
                self._ring(value, cotangents) if differentiable else None
                for value, differentiable in zip(values, cotangent_positions(*kinds), strict=True)
            ),
        )

    def _ring(self, value: Value, places: int) -> tuple[Buffer, ...]:
        shape = self.manifest.shape(value, batch=self.batch)
        return tuple(self.engine.allocate(shape, np.dtype(value.dtype)) for _ in range(places))


def places(rings: Sequence[tuple[Buffer, ...] | None], sequence: int) -> tuple[Array, ...]:
    """The arrays of one microbatch, where there are any."""
    return tuple(ring[sequence % len(ring)].host() for ring in rings if ring is not None)
