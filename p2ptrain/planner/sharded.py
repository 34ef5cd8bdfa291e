"""Tensor and sequence parallelism as pure degrees: all devices work on every microbatch together.

Tensor: heads and MLP columns are divided; each sharded segment ends in an all-reduce, forward and
backward; the rest is computed whole by everybody. Sequence: positions are divided; attention
gathers keys and values, scatters their gradients, and the parameters' gradients are added up once
per step. Collectives wait for everybody and do not overlap here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from p2ptrain.planner.kinds import Kind
from p2ptrain.planner.pricing import Price, Pricing, Share
from p2ptrain.planner.segment_costs import FLOAT32_BYTES, SegmentCosts
from p2ptrain.planner.traffic import all_reduce_bytes, gather_bytes
from p2ptrain.schedule.actions import Held
from p2ptrain.training.shard_cuts import unit_counts

ONE: Final = Held(in_flight=1, delayed=0)
TWO: Final = Held(in_flight=2, delayed=0)
FINENESS: Final = 1000
"""The fastest device's weight, before common factors are taken out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharded:
    """Devices that share every segment; with two or more of them."""

    kind: Kind
    """tensor or sequence."""
    devices: tuple[int, ...]
    """By rank."""
    weights: tuple[int, ...] | None = None
    """Parts of the units of every axis; None: after the devices' speeds."""


def weights_by_speed(times_ns: Sequence[int]) -> tuple[int, ...]:
    """Parts of every axis so that all devices take about as long; by rank, at least 1 each.

    Args:
        times_ns: What the whole model would take on each device; at least 1 each.
    """
    fastest = min(times_ns)
    weights = [max(1, FINENESS * fastest // time) for time in times_ns]
    common = math.gcd(*weights)
    return tuple(weight // common for weight in weights)


def objection(pricing: Pricing, kind: Kind, degree: int) -> str | None:
    """Why the model cannot be divided among so many devices; None: it can.

    Where the bundle says how, its own word counts; else what its parameters look like, which is
    enough for what-if questions only.
    """
    manifest = pricing.question.manifest
    told = manifest.sharding.get(kind)
    if told is None:
        if pricing.question.for_run:
            return (
                "the bundle does not say how its segments are divided; "
                "export the model again with tools/export_model.py"
            )
        return _unlikely(pricing, kind, degree)
    axes = [units for each in told.kinds.values() for units in manifest.units(each).values()]
    if not axes:
        first = min(told.whole)
        return f"no segment can be divided ({first}: {told.whole[first]})"
    if min(axes) < degree:
        return f"an axis has {min(axes)} units for {degree} devices"
    return None


def _unlikely(pricing: Pricing, kind: Kind, degree: int) -> str | None:
    costs = pricing.costs
    if kind == "tensor":
        if costs.heads_min == 0:
            return "no segment has heads or columns that could be divided"
        if costs.heads_min < degree:
            return f"a segment has {costs.heads_min} heads or columns for {degree} devices"
        return None
    if costs.sequence == 0:
        return "the model has no sequence axis"
    if not any(segment.gathered_bytes for segment in costs.segments):
        return "no segment shows which of its values are keys and values"
    if costs.sequence < degree:
        return f"the sequence has {costs.sequence} positions for {degree} devices"
    return None


class ShardedPricing:
    """Prices and memory of sharded candidates."""

    def __init__(self, pricing: Pricing) -> None:
        self._pricing = pricing

    def memory_bytes(self, sharded: Sharded) -> tuple[int, ...]:
        """Predicted peak by device: the whole model with one microbatch, less what is divided.

        Under tensor parallelism that is state alone (activations count whole), under sequence
        parallelism activations alone.
        """
        pricing = self._pricing
        count = pricing.segment_count
        whole = pricing.memory_bytes(0, count, ONE)
        weights = self.weights(sharded)
        if sharded.kind == "sequence":
            units = pricing.costs.sequence
            parts = unit_counts(units, weights)
            divisible = pricing.memory_bytes(0, count, TWO) - whole
            return tuple(whole - divisible * (units - part) // units for part in parts)
        found = [whole] * len(weights)
        for segment in pricing.costs.segments:
            if segment.shard_units:
                state = self._state_bytes(segment)
                for i, part in enumerate(unit_counts(segment.shard_units, weights)):
                    found[i] -= state * (segment.shard_units - part) // segment.shard_units
        return tuple(found)

    def price(self, sharded: Sharded) -> Price:
        """Time, joules and bytes of a step."""
        if sharded.kind == "tensor":
            return self._tensor(sharded)
        return self._sequence(sharded)

    def _tensor(self, sharded: Sharded) -> Price:
        pricing, devices = self._pricing, sharded.devices
        weights = self.weights(sharded)
        step_ns, sent = 0, 0
        own_ns, gradients = [0] * len(devices), [0] * len(devices)
        for index, segment in enumerate(pricing.costs.segments):
            units = segment.shard_units
            parts = unit_counts(units, weights) if units else (1,) * len(devices)
            step_ns += self._slowest(devices, index, parts, max(units, 1), own_ns)
            for size in (segment.reduced_forward_bytes, segment.reduced_backward_bytes):
                step_ns += pricing.reduce_ns(devices, size)
                sent += all_reduce_bytes(size, len(devices))
            rest = segment.parameter_count - segment.sharded_parameters
            for i, part in enumerate(parts):
                shared = segment.sharded_parameters * part // units if units else 0
                gradients[i] += FLOAT32_BYTES * (rest + shared)
        count = pricing.microbatches
        return self._price(devices, step_ns * count, sent * count, own_ns, tuple(gradients))

    def _sequence(self, sharded: Sharded) -> Price:
        pricing, devices = self._pricing, sharded.devices
        units = pricing.costs.sequence
        parts = unit_counts(units, self.weights(sharded))
        step_ns, sent, gradients = 0, 0, 0
        own_ns = [0] * len(devices)
        for index, segment in enumerate(pricing.costs.segments):
            step_ns += self._slowest(devices, index, parts, units, own_ns)
            part = -(-segment.gathered_bytes // len(devices))
            step_ns += 2 * pricing.ring_ns(devices, part, len(devices) - 1)
            sent += 2 * gather_bytes(segment.gathered_bytes, len(devices))
            gradients += segment.gradient_bytes
        step_ns = step_ns * pricing.microbatches + pricing.reduce_ns(devices, gradients)
        sent = sent * pricing.microbatches + all_reduce_bytes(gradients, len(devices))
        return self._price(devices, step_ns, sent, own_ns, (gradients,) * len(devices))

    def _slowest(
        self, devices: tuple[int, ...], index: int, parts: tuple[int, ...], units: int,
        own_ns: list[int],
    ) -> int:  # fmt: skip
        """Time of one microbatch through a segment, forward and backward; adds each one's own."""
        slowest = 0
        for i, (device, part) in enumerate(zip(devices, parts, strict=True)):
            time = 0
            for sums in self._pricing.times(device, 1)[:2]:
                time -= -(sums[index + 1] - sums[index]) * part // units
            own_ns[i] += time
            slowest = max(slowest, time)
        return slowest

    def _price(
        self, devices: tuple[int, ...], step_ns: int, sent: int, own_ns: list[int],
        gradients: tuple[int, ...],
    ) -> Price:  # fmt: skip
        pricing = self._pricing
        updates = [pricing.update_ns(d, g) for d, g in zip(devices, gradients, strict=True)]
        shares = tuple(
            Share(
                device=device,
                stage=0,
                microbatches=pricing.microbatches,
                compute_ns=pricing.microbatches * own + update,
                sent_bytes=sent,
                moved_bytes=2 * sent,
            )
            for device, own, update in zip(devices, own_ns, updates, strict=True)
        )
        return pricing.total(step_ns + max(updates), shares)

    def weights(self, sharded: Sharded) -> tuple[int, ...]:
        """Parts of every axis, by rank."""
        if sharded.weights is not None:
            return sharded.weights
        return weights_by_speed([max(1, self._pricing.pass_ns(d)) for d in sharded.devices])

    def _state_bytes(self, segment: SegmentCosts) -> int:
        """Parameters, gradients and optimizer state that are divided."""
        whole = segment.gradient_bytes + segment.state_bytes
        return whole * segment.sharded_parameters // max(segment.parameter_count, 1)
