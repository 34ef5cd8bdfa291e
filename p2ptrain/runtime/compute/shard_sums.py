"""What shards do with their gradients at a step's end: one sum per segment, then ties."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.bundle.sharding import Sharding
from p2ptrain.errors import InvariantBroken
from p2ptrain.runtime.compute.segment_memory import FloatArray, SegmentMemory
from p2ptrain.training.exchanges import Exchange, Exchanges
from p2ptrain.training.shard_cuts import Cut, Share
from p2ptrain.training.ties import TieGroup, TieHolder, tie_groups, tied_gradient


class ShardSums:
    """The meetings after the last backward of a step, over one shard's gradients."""

    def __init__(
        self,
        manifest: Manifest,
        sharding: Sharding,
        cuts: Mapping[str, Cut],
        share: Share,
        *,
        memories: Mapping[int, SegmentMemory],
        sites: Sequence[int],
    ) -> None:
        """Args: cuts: By tensor name. sites: By segment: how many meetings its microbatches have,
        after which those here are numbered."""
        self._cuts, self._share, self._memories = cuts, share, memories
        self._summed = {
            index: self._summed_tensors(manifest, sharding, index) for index in memories
        }
        self._ties = tie_groups(manifest)
        self._sites = list(sites)

    def run(self) -> Exchanges[None]:
        """Every shard does it, in the same order."""
        sites = list(self._sites)
        for index, names in self._summed.items():
            if names:
                yield from self._sum_segment(index, names, sites)
        for group in self._ties:
            yield from self._sum_ties(group, sites)

    def _summed_tensors(
        self, manifest: Manifest, sharding: Sharding, index: int
    ) -> tuple[str, ...]:
        segment = manifest.segments[index]
        sharded = sharding.kinds.get(segment.kind)
        summed = () if sharded is None else sharded.summed
        here = {place.local for place in self._memories[index].layout.places}
        return tuple(segment.parameters[local] for local in summed if local in here)

    def _sum_segment(self, index: int, names: tuple[str, ...], sites: list[int]) -> Exchanges[None]:
        """One vector of all terms: fewer, longer meetings than one per tensor."""
        gradients = [self._gradient(index, name) for name in names]
        vector = np.concatenate([gradient.reshape(-1) for gradient in gradients])
        total = yield Exchange(kind="reduce", segment=index, site=_next(sites, index), array=vector)
        start = 0
        for gradient in gradients:
            part = total[start : start + gradient.size]
            np.copyto(gradient, part.reshape(gradient.shape))
            start += gradient.size

    def _sum_ties(self, group: TieGroup, sites: list[int]) -> Exchanges[None]:
        """Give every copy the sum of all copies' gradients, whole or in slices."""
        whole: dict[str, FloatArray] = {}
        for holder in group.holders:
            whole[holder.tensor] = yield from self._whole_gradient(holder, sites)
        total = tied_gradient(group, whole)
        for holder in group.holders:
            cut, own = self._cuts.get(holder.tensor), self._gradient(holder.segment, holder.tensor)
            np.copyto(own, total if cut is None else cut.slice(total, self._share.rank))

    def _whole_gradient(self, holder: TieHolder, sites: list[int]) -> Exchanges[FloatArray]:
        cut, own = self._cuts.get(holder.tensor), self._gradient(holder.segment, holder.tensor)
        if cut is None:
            return own
        unit = sum(cut.blocks)
        joined = yield Exchange(
            kind="gather",
            segment=holder.segment,
            site=_next(sites, holder.segment),
            array=own,
            axis=cut.axis,
            counts=tuple(unit * count for count in cut.counts),
        )
        return _untangled(joined, cut)

    def _gradient(self, segment: int, name: str) -> FloatArray:
        gradient = self._memories[segment].gradient(name)
        if gradient is None:
            raise InvariantBroken(f"segment {segment} has no gradient of {name!r}")
        return gradient


def _untangled(joined: FloatArray, cut: Cut) -> FloatArray:
    """Slices side by side, as the whole has them: they differ where there are several blocks."""
    unit = sum(cut.blocks)
    edges = np.cumsum([unit * count for count in cut.counts])[:-1]
    return np.ascontiguousarray(cut.join(np.split(joined, edges, cut.axis)))


def _next(sites: list[int], segment: int) -> int:
    """The number of a segment's next meeting."""
    site = sites[segment]
    sites[segment] += 1
    return site
