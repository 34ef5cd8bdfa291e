"""Which elements of a whole value one shard has, and the whole of all shards' slices.

The shares of a plan are weights by rank; each sliced axis gives every rank whole units. One rule
for all peers: what a shard has follows from the manifest, the mode and the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.bundle.sharding import Mode, ShardedKind, Sharding, ShardSlice
from p2ptrain.errors import InvariantBroken, PlanInfeasible
from p2ptrain.ids import DeviceId
from p2ptrain.planner.plan import Plan
from p2ptrain.training.safetensors import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One peer's part of a model that several peers compute together."""

    mode: Mode
    weights: tuple[int, ...]
    """By rank: parts of the units of every sliced axis."""
    rank: int

    @property
    def ranks(self) -> int:
        """How many peers there are."""
        return len(self.weights)

    def of_rank(self, rank: int) -> Share:
        """Another peer's part of the same model."""
        return Share(mode=self.mode, weights=self.weights, rank=rank)


def share_of(plan: Plan, device: DeviceId) -> Share | None:
    """A device's part of a sharded model; None: the model is not sharded, or it has none."""
    index = plan.stage_of(device)
    stage = None if index is None else plan.stages[index]
    if stage is None or (stage.split != "tensor" and stage.split != "sequence"):
        return None
    return Share(mode=stage.split, weights=stage.weights, rank=stage.devices.index(device))


def unit_counts(units: int, weights: Sequence[int]) -> tuple[int, ...]:
    """How many units of an axis each rank has: in proportion, none without one.

    What proportion leaves over goes to the ranks that it cheats most, lower ranks first.

    Raises:
        PlanInfeasible: there are fewer units than ranks.
    """
    if units < len(weights):
        raise PlanInfeasible(f"a sliced axis has {units} units for {len(weights)} peers")
    total = sum(weights)
    counts = [units * weight // total for weight in weights]
    cheated = sorted(range(len(weights)), key=lambda i: (-(units * weights[i] % total), i))
    for rank in cheated[: units - sum(counts)]:
        counts[rank] += 1
    while 0 in counts:
        counts[counts.index(max(counts))] -= 1
        counts[counts.index(0)] += 1
    return tuple(counts)


def sharding_of(manifest: Manifest, mode: Mode) -> Sharding:
    """How a bundle is sharded in a mode.

    Raises:
        PlanInfeasible: it is not; the sentence says why.
    """
    sharding = manifest.sharding.get(mode)
    if sharding is None:
        raise PlanInfeasible(
            f"the bundle was exported without {mode} sharding",
            hint="export the model again with tools/export_model.py",
        )
    if not sharding.kinds:
        reason = next(iter(sharding.whole.values()), "it has no segments")
        raise PlanInfeasible(f"no segment allows {mode} sharding: {reason}")
    return sharding


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How one value lies at all shards: along `axis`, `counts[rank]` units of each block."""

    axis: int
    blocks: tuple[int, ...]
    counts: tuple[int, ...]

    def shape(self, whole: tuple[int, ...], rank: int) -> tuple[int, ...]:
        """Of a shard's slice."""
        size = sum(self.blocks) * self.counts[rank]
        return (*whole[: self.axis], size, *whole[self.axis + 1 :])

    def slice(self, whole: Array, rank: int) -> Array:
        """A contiguous copy of a shard's elements."""
        if whole.shape[self.axis] != sum(self.blocks) * sum(self.counts):
            raise InvariantBroken(f"a value of shape {whole.shape} that is cut otherwise")
        begin, start, pieces = 0, sum(self.counts[:rank]), []
        for block in self.blocks:
            first = begin + start * block
            pieces.append(_range(whole, self.axis, first, first + self.counts[rank] * block))
            begin += sum(self.counts) * block
        return np.concatenate(pieces, self.axis)

    def join(self, slices: Sequence[Array]) -> Array:
        """The whole of the slices of all ranks, in their order."""
        groups: list[list[Array]] = [[] for _ in self.blocks]
        for part, count in zip(slices, self.counts, strict=True):
            begin = 0
            for group, block in zip(groups, self.blocks, strict=True):
                group.append(_range(part, self.axis, begin, begin + count * block))
                begin += count * block
        return np.concatenate([part for group in groups for part in group], self.axis)


class KindCuts:
    """Every cut of one kind of segment at all shards; a kind that nobody divides has none."""

    def __init__(
        self, manifest: Manifest, sharded: ShardedKind | None, weights: tuple[int, ...]
    ) -> None:
        self.counts: dict[str, tuple[int, ...]] = {}
        """By sliced axis and rank."""
        self.cuts: dict[str, Cut] = {}
        """By name of a port, mask, parameter or cotangent."""
        if sharded is None:
            return
        units = manifest.units(sharded)
        self.counts = {axis: unit_counts(units[axis], weights) for axis in sharded.axes}
        self.cuts = {name: self._cut(slice_) for name, slice_ in sharded.slices.items()}

    def _cut(self, slice_: ShardSlice) -> Cut:
        return Cut(axis=slice_.axis, blocks=slice_.blocks, counts=self.counts[slice_.units_of])


def tensor_cuts(manifest: Manifest, share: Share, segment_index: int) -> dict[str, Cut]:
    """By tensor name: the parameters of a segment of which each shard has a slice."""
    segment = manifest.segments[segment_index]
    sharded = sharding_of(manifest, share.mode).kinds.get(segment.kind)
    cuts = KindCuts(manifest, sharded, share.weights).cuts
    return {tensor: cuts[local] for local, tensor in segment.parameters.items() if local in cuts}


def has_slices(manifest: Manifest, mode: Mode) -> bool:
    """Whether shards differ in their parameters: else each has the whole state."""
    return any(
        name in kind.slices
        for segment in manifest.segments
        if (kind := manifest.sharding[mode].kinds.get(segment.kind)) is not None
        for name in segment.parameters
    )


def _range(array: Array, axis: int, start: int, stop: int) -> Array:
    index = [slice(None)] * array.ndim
    index[axis] = slice(start, stop)
    return array[tuple(index)]
