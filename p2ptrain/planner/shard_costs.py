"""What shards of each segment compute and send: as the bundle tells, else as it looks.

A bundle that says how it is divided is taken at its word. For others, which are what-if only, heads
and columns are divided and added up once forward and once backward, or positions are divided and
keys and values gathered, their gradients scattered, and all parameters' gradients added up.
"""

from __future__ import annotations

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.bundle.shard_traffic import CollectiveCost, SegmentTraffic, shard_traffic
from p2ptrain.planner.kinds import Kind
from p2ptrain.planner.segment_costs import ModelCosts, SegmentCosts


def shard_costs(
    manifest: Manifest, costs: ModelCosts, kind: Kind, *, batch: int
) -> tuple[SegmentTraffic, ...]:
    """By segment, for microbatches of `batch` samples; `kind` is tensor or sequence."""
    if kind in manifest.sharding:
        return shard_traffic(manifest, kind, batch=batch)
    if kind == "tensor":
        return tuple(_by_heads(segment) for segment in costs.segments)
    return tuple(_by_positions(segment, costs.sequence) for segment in costs.segments)


def _by_heads(segment: SegmentCosts) -> SegmentTraffic:
    return SegmentTraffic(
        forward=_one("reduce", segment.reduced_forward_bytes),
        backward=_one("reduce", segment.reduced_backward_bytes),
        step_bytes=0,
        units=segment.shard_units,
        sharded_parameters=segment.sharded_parameters,
    )


def _by_positions(segment: SegmentCosts, positions: int) -> SegmentTraffic:
    return SegmentTraffic(
        forward=_one("gather", segment.gathered_bytes),
        backward=_one("scatter", segment.gathered_bytes),
        step_bytes=segment.gradient_bytes,
        units=positions,
        sharded_parameters=0,
    )


def _one(kind: str, whole_bytes: int) -> tuple[CollectiveCost, ...]:
    return (CollectiveCost(kind=kind, whole_bytes=whole_bytes),) if whole_bytes else ()
