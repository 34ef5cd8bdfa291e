"""What shards of a model send each other, read off the manifest: no formula per model.

Collectives are told with the bytes of the whole value; what each peer of a ring sends of it
depends on the degree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from p2ptrain.bundle.manifest import DTYPES, Manifest
from p2ptrain.bundle.sharding import Collective, Sharding


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveCost:
    """One collective of a microbatch."""

    kind: str
    """reduce, gather or scatter."""
    whole_bytes: int

    def ring_bytes(self, peers: int) -> int:
        """What each of `peers` sends, rounded up: a reduce goes round twice."""
        rounds = 2 if self.kind == "reduce" else 1
        return -(-rounds * (peers - 1) * self.whole_bytes // peers)


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentTraffic:
    """What one segment makes its shards send."""

    forward: tuple[CollectiveCost, ...]
    """Per microbatch."""
    backward: tuple[CollectiveCost, ...]
    step_bytes: int
    """Of gradients that are reduced once per step."""
    units: int
    """The fewest units among its sliced axes: more shards than these cannot be; 0: it is computed
    whole by all."""
    sharded_parameters: int
    """Elements of parameters that are sliced."""


def shard_traffic(manifest: Manifest, mode: str, *, batch: int) -> tuple[SegmentTraffic, ...]:
    """Every segment's traffic in a mode, for microbatches of `batch` samples.

    Raises:
        KeyError: the bundle does not have the mode; `manifest.sharding` says so.
    """
    sharding = manifest.sharding[mode]
    return tuple(
        _segment(manifest, sharding, index, batch) for index in range(len(manifest.segments))
    )


def _segment(manifest: Manifest, sharding: Sharding, index: int, batch: int) -> SegmentTraffic:
    segment = manifest.segments[index]
    sharded = sharding.kinds.get(segment.kind)
    if sharded is None:
        return SegmentTraffic(forward=(), backward=(), step_bytes=0, units=0, sharded_parameters=0)
    tensors = {name: manifest.tensor(tensor) for name, tensor in segment.parameters.items()}
    trained = [tensors[name] for name in sharded.summed]
    sliced = [tensors[name] for name in sharded.slices if name in tensors]
    return SegmentTraffic(
        forward=tuple(
            _cost(manifest, each, batch) for part in sharded.forward for each in part.collectives
        ),
        backward=tuple(
            _cost(manifest, each, batch) for part in sharded.backward for each in part.collectives
        ),
        step_bytes=sum(tensor.elements * DTYPES[tensor.dtype] for tensor in trained),
        units=min(manifest.units(sharded).values()),
        sharded_parameters=sum(tensor.elements for tensor in sliced),
    )


def _cost(manifest: Manifest, collective: Collective, batch: int) -> CollectiveCost:
    elements = math.prod(manifest.axis_size(axis, batch=batch) for axis in collective.shape)
    return CollectiveCost(kind=collective.kind, whole_bytes=elements * DTYPES[collective.dtype])
