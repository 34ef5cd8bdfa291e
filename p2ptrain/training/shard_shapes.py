"""What one shard has of the values of a segment that is divided: their shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from p2ptrain.bundle.manifest import Manifest, Value
from p2ptrain.bundle.sharding import ShardedKind
from p2ptrain.bundle.sharding_checks import local_values
from p2ptrain.training.shard_cuts import KindCuts


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlace:
    """Which shard of which segment."""

    sharded: ShardedKind
    cuts: KindCuts
    rank: int
    segment_index: int


class LocalShapes:
    """Shapes of one kind's values at one shard."""

    def __init__(self, manifest: Manifest, place: ShardPlace, *, batch: int) -> None:
        kind = manifest.kinds[manifest.segments[place.segment_index].kind]
        self._manifest, self._batch = manifest, batch
        self._counts = {axis: counts[place.rank] for axis, counts in place.cuts.counts.items()}
        self._cuts, self._rank = place.cuts.cuts, place.rank
        self.values = local_values(kind, place.sharded)
        """By name, in symbols and sliced axes."""

    def of(self, value: Value) -> tuple[int, ...]:
        """What a shard has of a value that the manifest names whole."""
        whole = self._manifest.shape(value, batch=self._batch)
        cut = self._cuts.get(value.name)
        return whole if cut is None else cut.shape(whole, self._rank)

    def part(self, name: str) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
        """Shape and type of a value between parts."""
        value = self.values[name]
        return tuple(map(self._size, value.shape)), np.dtype(value.dtype)

    def _size(self, axis: str) -> int:
        factors = axis.split("*")
        own = math.prod(self._counts[f] for f in factors if f in self._counts)
        rest = (f for f in factors if f not in self._counts)
        return own * math.prod(self._manifest.axis_size(f, batch=self._batch) for f in rest)
