"""What each segment costs whatever device runs it: bytes that cross, gradients, shardable parts.

Read off the manifest alone, without names of models: a segment can be split by tensor where its
parameters have a shard group, and by sequence where the model has a sequence axis. Keys and values
are what attention's products put out beyond what its projection takes in again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from p2ptrain.bundle.manifest import Manifest, Value
from p2ptrain.training.boundaries import cotangent_values
from p2ptrain.training.contract import Contract
from p2ptrain.training.segment_state import residual_shapes
from p2ptrain.training.tensor_codec import encoded_bytes

FLOAT32_BYTES: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentCosts:
    """One segment, for one microbatch of the contract where a microbatch matters."""

    sent_bytes: int
    """Activations to the next segment, encoded."""
    returned_bytes: int
    """Cotangents that come back from there, encoded."""
    gradient_bytes: int
    state_bytes: int
    """Parameters and optimizer state, and what int8 lost: what a replica holds."""
    parameter_count: int
    shard_units: int
    """Heads or columns that it may be split into; 0: it is computed whole by every peer."""
    sharded_parameters: int
    reduced_forward_bytes: int
    """Added up over all peers under tensor parallelism, after the forward."""
    reduced_backward_bytes: int
    gathered_bytes: int
    """Keys and values of all positions under sequence parallelism."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCosts:
    """All segments, and which kinds of sharding the model allows."""

    segments: tuple[SegmentCosts, ...]
    sequence: int
    """Positions; 0: there is no sequence axis to split."""

    @property
    def heads_min(self) -> int:
        """The most peers that can share every sharded segment; 0: no segment can be sharded."""
        return min((s.shard_units for s in self.segments if s.shard_units), default=0)


def crossing_bytes(manifest: Manifest, contract: Contract, segment: int) -> tuple[int, int]:
    """Encoded bytes of one microbatch's activations after a segment, and of their cotangents."""
    forward = _encoded(manifest, manifest.boundary(segment), contract)
    return forward, _encoded(manifest, cotangent_values(manifest, segment), contract)


def model_costs(manifest: Manifest, contract: Contract) -> ModelCosts:
    """Costs of all segments under a contract's microbatch size, codec and optimizer."""
    lengths = [s.size or 0 for s in manifest.symbols.values() if s.kind == "sequence"]
    sequence = lengths[0] if len(lengths) == 1 else 0
    return ModelCosts(
        segments=tuple(
            _segment(manifest, contract, index, sequence) for index in range(len(manifest.segments))
        ),
        sequence=sequence,
    )


def _segment(manifest: Manifest, contract: Contract, index: int, sequence: int) -> SegmentCosts:
    batch = contract.microbatch_size
    last = index == len(manifest.segments) - 1
    sent_bytes, returned_bytes = (0, 0) if last else crossing_bytes(manifest, contract, index)
    tensors = manifest.segment_tensors(index)
    trained = [tensor for tensor in tensors if tensor.binding == "trainable"]
    gradient_bytes = FLOAT32_BYTES * sum(tensor.elements for tensor in trained)
    rule = manifest.updates.get(contract.optimizer.name)
    vectors = 1 + (0 if rule is None else len(rule.state))
    lost = sum(math.prod(shape) for shape in residual_shapes(manifest, contract, index).values())
    units, sharded = _shards(manifest, index)
    kind = manifest.kinds[manifest.segments[index].kind]
    outputs = [p.value for p in kind.outputs if p.role == "boundary" and p.differentiable]
    inputs = cotangent_values(manifest, index - 1) if index else ()
    return SegmentCosts(
        sent_bytes=sent_bytes,
        returned_bytes=returned_bytes,
        gradient_bytes=gradient_bytes,
        state_bytes=vectors * gradient_bytes + FLOAT32_BYTES * lost,
        parameter_count=sum(tensor.elements for tensor in tensors),
        shard_units=units,
        sharded_parameters=sharded,
        reduced_forward_bytes=_bytes(manifest, outputs, batch) if units else 0,
        reduced_backward_bytes=_bytes(manifest, inputs, batch) if units else 0,
        gathered_bytes=FLOAT32_BYTES * batch * sequence * _key_value_width(manifest, index),
    )


def _shards(manifest: Manifest, index: int) -> tuple[int, int]:
    """Units of the segment's sharded axis, and how many of its parameters lie along it."""
    units, elements = [], 0
    for tensor in manifest.segment_tensors(index):
        if tensor.shard is not None:
            units.append(manifest.symbols[tensor.shard.symbol].size or 0)
            elements += tensor.elements
    return min(units, default=0), elements


def _key_value_width(manifest: Manifest, index: int) -> int:
    """Values per position that queries of other positions need."""
    width = {0: 0, 1: 0}
    for tensor in manifest.segment_tensors(index):
        shard = tensor.shard
        if shard is not None and len(tensor.shape) == 2:
            symbol = manifest.symbols[shard.symbol]
            if symbol.kind == "heads":
                width[shard.axis] += shard.block * (symbol.size or 0)
    return abs(width[0] - width[1])


def _encoded(manifest: Manifest, values: Iterable[Value], contract: Contract) -> int:
    batch = contract.microbatch_size
    return sum(
        encoded_bytes(
            contract.codec, dtype=v.dtype, elements=math.prod(manifest.shape(v, batch=batch))
        )
        for v in values
    )


def _bytes(manifest: Manifest, values: Iterable[Value], batch: int) -> int:
    return sum(manifest.value_bytes(value, batch=batch) for value in values)
