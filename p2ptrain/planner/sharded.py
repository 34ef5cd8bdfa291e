"""Tensor and sequence parallelism as pure degrees: all devices work on every microbatch together.

Segments that are not divided are computed whole by everybody. Collectives wait for everybody and do
not overlap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from p2ptrain.bundle.shard_traffic import CollectiveCost, SegmentTraffic
from p2ptrain.bundle.sharding import Mode
from p2ptrain.planner.kinds import Kind
from p2ptrain.planner.pricing import Price, Pricing, Share
from p2ptrain.planner.segment_costs import SegmentCosts
from p2ptrain.planner.shard_costs import shard_costs
from p2ptrain.schedule.actions import ONE, Held
from p2ptrain.schedule.step_end import PeerEnd
from p2ptrain.training.shard_cuts import unit_counts
from p2ptrain.training.shard_memory import ShardMemoryModel

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
    manifest, contract = pricing.question.manifest, pricing.question.contract
    if contract.form != "portable" or contract.rematerialise:
        return "shards run the portable graphs and keep their stash: no --form, no --rematerialise"
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
        self._costs: dict[Kind, tuple[SegmentTraffic, ...]] = {}
        self._models: dict[Mode, ShardMemoryModel] = {}

    def memory_bytes(self, sharded: Sharded) -> tuple[int, ...]:
        """Predicted peak by device.

        Where the bundle says how it is divided it is counted value by value; else, which is enough
        for what-if questions, it is the whole model with one microbatch less what is divided:
        state alone under tensor parallelism, activations alone under sequence parallelism.
        """
        pricing, weights = self._pricing, self.weights(sharded)
        question = pricing.question
        mode: Mode = "tensor" if sharded.kind == "tensor" else "sequence"
        if mode in question.manifest.sharding:
            if mode not in self._models:
                self._models[mode] = ShardMemoryModel(question.manifest, question.contract, mode)
            return tuple(each.total for each in self._models[mode].shards(weights))
        count = pricing.segment_count
        whole = pricing.memory_bytes(0, count, ONE)
        if sharded.kind == "sequence":
            units = max(segment.units for segment in self.costs(sharded.kind))
            divisible = pricing.memory_bytes(0, count, TWO) - whole
            parts = unit_counts(units, weights)
            return tuple(whole - divisible * (units - part) // units for part in parts)
        found = [whole] * len(weights)
        for own, segment in zip(self.costs(sharded.kind), pricing.costs.segments, strict=True):
            if own.units:
                state = _state_bytes(segment, own)
                for i, part in enumerate(unit_counts(own.units, weights)):
                    found[i] -= state * (own.units - part) // own.units
        return tuple(found)

    def price(self, sharded: Sharded) -> Price:
        """Time, joules and bytes of a step."""
        pricing, devices = self._pricing, sharded.devices
        step = _Step(pricing, devices)
        for index, (own, segment) in enumerate(
            zip(self.costs(sharded.kind), pricing.costs.segments, strict=True)
        ):
            parts = unit_counts(own.units, self.weights(sharded)) if own.units else None
            step.compute(index, parts)
            for collective in (*own.forward, *own.backward):
                step.exchange(collective, parts)
            step.end(index, segment, own, parts)
        return step.price(sum(own.step_bytes for own in self.costs(sharded.kind)))

    def costs(self, kind: Kind) -> tuple[SegmentTraffic, ...]:
        """By segment."""
        if kind not in self._costs:
            question = self._pricing.question
            self._costs[kind] = shard_costs(
                question.manifest, self._pricing.costs, kind,
                batch=question.contract.microbatch_size,
            )  # fmt: skip
        return self._costs[kind]

    def weights(self, sharded: Sharded) -> tuple[int, ...]:
        """Parts of every axis, by rank."""
        if sharded.weights is not None:
            return sharded.weights
        return weights_by_speed([max(1, self._pricing.pass_ns(d)) for d in sharded.devices])


class _Step:
    """Adds up one microbatch, then a step of them."""

    def __init__(self, pricing: Pricing, devices: tuple[int, ...]) -> None:
        self._pricing, self._devices = pricing, devices
        self._sharing = pricing.sharing(devices)
        self._time_ns = 0
        self._own_ns = [0] * len(devices)
        self._sent = [0] * len(devices)
        self._norm_ns = [0] * len(devices)
        self._update_ns = [0] * len(devices)

    def compute(self, index: int, parts: tuple[int, ...] | None) -> None:
        """One segment forward and backward; everybody waits for the slowest. None: all of it."""
        slowest = 0
        for i, device in enumerate(self._devices):
            time = 0
            for sums in self._pricing.times(device, self._sharing[device])[:2]:
                whole = sums[index + 1] - sums[index]
                time += whole if parts is None else -(-whole * parts[i] // sum(parts))
            self._own_ns[i] += time
            slowest = max(slowest, time)
        self._time_ns += slowest

    def exchange(self, collective: CollectiveCost, parts: tuple[int, ...] | None) -> None:
        """One collective: sums are shared evenly, slices are as large as their owners' parts."""
        count, whole = len(self._devices), collective.whole_bytes
        self._time_ns += self._pricing.collective_ns(self._devices, collective)
        for i in range(count):
            if collective.kind == "reduce" or parts is None:
                self._sent[i] += collective.ring_bytes(count)
            elif collective.kind == "gather":
                self._sent[i] += (count - 1) * whole * parts[i] // sum(parts)
            else:
                self._sent[i] += whole * (sum(parts) - parts[i]) // sum(parts)

    def end(
        self,
        index: int,
        segment: SegmentCosts,
        own: SegmentTraffic,
        parts: tuple[int, ...] | None,
    ) -> None:
        """What each takes for its parameters of one segment at the end of a step."""
        count = max(1, segment.parameter_count)
        rest = segment.parameter_count - own.sharded_parameters
        for i, device in enumerate(self._devices):
            has = rest
            if parts is not None:
                has += own.sharded_parameters * parts[i] // sum(parts)
            times = self._pricing.times(device, self._sharing[device])
            for sums, found in (
                (times.norm_ns, self._norm_ns),
                (times.update_ns, self._update_ns),
            ):
                found[i] += -(-(sums[index + 1] - sums[index]) * has // count)

    def price(self, step_bytes: int) -> Price:
        """A whole step; `step_bytes` of gradients are added up at its end."""
        pricing, devices, count = self._pricing, self._devices, self._pricing.microbatches
        reduce = CollectiveCost(kind="reduce", whole_bytes=step_bytes)
        shares = []
        for i, device in enumerate(devices):
            sent = self._sent[i] * count + reduce.ring_bytes(len(devices))
            passes = count * self._own_ns[i]
            shares.append(
                Share(
                    device=device,
                    stage=0,
                    microbatches=count,
                    passes_ns=passes,
                    compute_ns=passes + self._norm_ns[i] + self._update_ns[i],
                    sent_bytes=sent,
                    moved_bytes=2 * sent,
                )
            )
        whole_ns = self._time_ns * count + pricing.collective_ns(devices, reduce)
        step_ns = pricing.ended_ns(
            PeerEnd(
                device=device, begins_ns=0, whole_ns=whole_ns,
                norm_ns=self._norm_ns[i], update_ns=self._update_ns[i],
            )
            for i, device in enumerate(devices)
        )  # fmt: skip
        return pricing.total(step_ns, tuple(shares))


def _state_bytes(segment: SegmentCosts, own: SegmentTraffic) -> int:
    """Parameters, gradients and optimizer state that are divided."""
    whole = segment.gradient_bytes + segment.state_bytes
    return whole * own.sharded_parameters // max(segment.parameter_count, 1)
