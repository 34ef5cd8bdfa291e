"""The memory a shard of a model is predicted to need at its peak.

What `runtime.compute.shard_worker` allocates is counted exactly, and what may wait at meetings as
the links allow it; what the runtime needs beside that is estimated as for stages
(`training.memory`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np

from p2ptrain.bundle.manifest import Manifest, SegmentKind, Value
from p2ptrain.bundle.sharding import Mode, ShardedKind
from p2ptrain.training.boundaries import cotangent_positions
from p2ptrain.training.contract import Contract
from p2ptrain.training.layout import flat_layout
from p2ptrain.training.memory import (
    ELEMENT_BYTES,
    PROCESS_BYTES,
    SESSION_BYTES,
    WORKSPACE_HALVES,
    StageMemory,
    fed_bytes,
    frozen_bytes,
    graph_count,
    is_drawn,
    kept_bytes,
    vector_count,
)
from p2ptrain.training.shard_cuts import KindCuts, Share, sharding_of
from p2ptrain.training.shard_meetings import ShardMeetings
from p2ptrain.training.shard_shapes import LocalShapes, ShardPlace
from p2ptrain.training.shard_states import slice_shapes

SIZE_BYTES: Final = 3 * 8
"""What a shard is told of each sliced axis: its first unit, how many it has, how many there are."""
COPIES: Final = 2
"""Of what a meeting is about: this rank's own, in one piece, and what comes of everybody's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Segment:
    """What one segment adds at one shard, in bytes, or elements of its flat vectors."""

    kind: str
    length: int
    running_length: int
    slot_running: int
    """Elements that its forward copies."""
    frozen: int
    stash: int
    """What was fed, what the backward needs, and what goes to the segment before and nobody
    wants."""
    kept: int
    """Of that, what stands for the intermediates of its graphs."""
    between: int
    """Values between parts that all segments of the kind share."""
    graphs: int


class ShardMemoryModel:
    """The memory of any shard of a model under one contract and mode; each segment is read once
    for each number of units."""

    def __init__(self, manifest: Manifest, contract: Contract, mode: Mode) -> None:
        """PlanInfeasible: the bundle cannot be sharded so, or has no such optimizer."""
        self._manifest, self._contract, self._mode = manifest, contract, mode
        self._sharding = sharding_of(manifest, mode)
        self._vectors = vector_count(manifest, contract)
        self._known: dict[tuple[int, tuple[int, ...]], tuple[_Segment, int]] = {}

    def shards(
        self, weights: tuple[int, ...], process_bytes: int = PROCESS_BYTES
    ) -> tuple[StageMemory, ...]:
        """Predicted peak memory of every rank.

        Args:
            weights: By rank: parts of the units of every axis.
            process_bytes: A peer before it loads the model.

        Raises:
            PlanInfeasible: an axis has fewer units than there are ranks.
        """
        first = Share(mode=self._mode, weights=weights, rank=0)
        meetings = ShardMeetings(self._manifest, self._contract, first)
        waiting = meetings.held_bytes_max + COPIES * meetings.longest_bytes
        cuts = {
            name: KindCuts(self._manifest, self._sharding.kinds.get(name), weights)
            for name in self._manifest.kinds
        }
        return tuple(
            self._shard(first.of_rank(rank), cuts, process_bytes, waiting)
            for rank in range(len(weights))
        )

    def _shard(
        self, share: Share, cuts: dict[str, KindCuts], process_bytes: int, waiting: int
    ) -> StageMemory:
        every = range(len(self._manifest.segments))
        pairs = [self._part(share, cuts, index) for index in every]
        own = [segment for segment, _ in pairs]
        kinds = {each.kind: each for each in own}
        longest = max(each.length for each in own)
        running = sum(2 * each.running_length + each.slot_running for each in own)
        running += max(each.running_length for each in own)
        lengths = sum(each.length for each in own)
        return StageMemory(
            process=process_bytes,
            sessions=SESSION_BYTES * (1 + sum(each.graphs for each in kinds.values())),
            parameters=ELEMENT_BYTES * (lengths * self._vectors + longest + running),
            frozen=sum(each.frozen for each in own),
            stash=sum(each.stash for each in own) + sum(k.between for k in kinds.values()),
            boundaries=sum(edge for _, edge in pairs),
            workspace=WORKSPACE_HALVES * sum(k.kept for k in kinds.values()) // 2
            + 2 * longest * ELEMENT_BYTES,
            meetings=waiting,
        )

    def _part(self, share: Share, cuts: dict[str, KindCuts], index: int) -> tuple[_Segment, int]:
        """A segment, and the edge after it: they depend on nothing but the rank's units."""
        counts = cuts[self._manifest.segments[index].kind].counts.values()
        key = (index, tuple(own[share.rank] for own in counts))
        if key not in self._known:
            last = index == len(self._manifest.segments) - 1
            edge = 0 if last else self._edge_bytes(share, cuts, index)
            self._known[key] = (self._segment(share, cuts, index), edge)
        return self._known[key]

    def _segment(self, share: Share, cuts: dict[str, KindCuts], index: int) -> _Segment:
        name = self._manifest.segments[index].kind
        slices = slice_shapes(self._manifest, share, index)
        layout = flat_layout(self._manifest, index, slices)
        sharded = self._sharding.kinds.get(name)
        if sharded is None:
            whole = self._manifest.kinds[name]
            kept = kept_bytes(self._manifest, whole, self._contract)
            stash, between = kept + fed_bytes(self._manifest, whole, self._contract), 0
            stash += sum(_size((), p.value.dtype) for p in whole.outputs if p.role == "loss")
            graphs = graph_count(whole, self._contract, 0)
        else:
            place = ShardPlace(
                sharded=sharded, cuts=cuts[name], rank=share.rank, segment_index=index
            )
            stash, kept, between = self._divided(place)
            graphs = len(sharded.parts)
        return _Segment(
            kind=name,
            length=layout.length,
            running_length=layout.running_length,
            slot_running=layout.running_length if sharded is None else 0,
            frozen=frozen_bytes(self._manifest, index, slices),
            stash=stash,
            kept=kept,
            between=between,
            graphs=graphs,
        )

    def _divided(self, place: ShardPlace) -> tuple[int, int, int]:
        """Of a segment that is divided: all that lies with it, of that its stash, and what lies
        with its kind."""
        batch, kind = self._contract.microbatch_size, self._kind(place.segment_index)
        shapes = LocalShapes(self._manifest, place, batch=batch)
        ports = (*kind.inputs, *kind.outputs)
        own = [port.value for port in ports if port.role != "boundary"]
        drawn = [s.value for s in kind.masks if is_drawn(self._contract, s.probability)]
        unwanted = self._unwanted(place.segment_index)
        with_it = sum(_size(shapes.of(v), v.dtype) for v in (*own, *drawn, *unwanted))
        with_it += SIZE_BYTES * len(place.cuts.counts)
        stash = _part_bytes(shapes, place.sharded, kept=True)
        masks = sum(_size(shapes.of(value), value.dtype) for value in drawn)
        return with_it + stash, stash + masks, _part_bytes(shapes, place.sharded, kept=False)

    def _unwanted(self, index: int) -> list[Value]:
        """Inputs whose cotangents the graphs make, and nobody upstream reads."""
        kind = self._kind(index)
        entering = [port for port in kind.inputs if port.role == "boundary"]
        wanted = [False] * len(entering)
        if index > 0:
            wanted = list(cotangent_positions(self._kind(index - 1), kind))
        read = {p.value.name for p, has in zip(entering, wanted, strict=True) if has}
        return [p.value for p in kind.inputs if p.differentiable and p.value.name not in read]

    def _edge_bytes(self, share: Share, cuts: dict[str, KindCuts], index: int) -> int:
        """Activations after a segment, and the cotangents that come back."""
        before, after = self._kind(index), self._kind(index + 1)
        positions = cotangent_positions(before, after)
        total = 0
        for value, has in zip(self._manifest.boundary(index), positions, strict=True):
            shape = self._manifest.shape(value, batch=self._contract.microbatch_size)
            if (cut := cuts[before.name].cuts.get(value.name)) is not None:
                shape = cut.shape(shape, share.rank)
            total += _size(shape, value.dtype) * (2 if has else 1)
        return total

    def _kind(self, index: int) -> SegmentKind:
        return self._manifest.kinds[self._manifest.segments[index].kind]


def _part_bytes(shapes: LocalShapes, sharded: ShardedKind, *, kept: bool) -> int:
    """Of values between parts: those that the backward needs, or the others."""
    names = (v.name for v in sharded.values if (v.name in sharded.stash) == kept)
    return sum(_array_bytes(*shapes.part(name)) for name in names)


def _array_bytes(shape: Iterable[int], dtype: np.dtype[np.generic]) -> int:
    return math.prod(shape) * dtype.itemsize


def _size(shape: Iterable[int], dtype: str) -> int:
    return _array_bytes(shape, np.dtype(dtype))
