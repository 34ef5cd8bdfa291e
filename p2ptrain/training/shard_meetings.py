"""Every meeting of the shards of a model in an item: what comes, how large, and how much at once.

Meetings of a segment are numbered as `training.exchanges` has them: those of its forward parts,
its backward parts, then those at a step's end, whose microbatch is 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.bundle.sharding import Collective, ShardedKind
from p2ptrain.errors import PlanInfeasible
from p2ptrain.training.collectives import (
    ELEMENT_BYTES,
    Meeting,
    MeetingKey,
    Operation,
    even_lengths,
    held_bytes,
)
from p2ptrain.training.contract import Contract
from p2ptrain.training.shard_cuts import KindCuts, Share, sharding_of, tensor_cuts
from p2ptrain.training.ties import tie_groups

_OPERATIONS: dict[str, Operation] = {"reduce": "reduce", "gather": "gather", "scatter": "scatter"}


class ShardMeetings:
    """Of one plan: the same at every rank."""

    def __init__(self, manifest: Manifest, contract: Contract, share: Share) -> None:
        """PlanInfeasible: the bundle cannot be sharded so."""
        self._manifest, self._contract, self._share = manifest, contract, share
        self._sharding = sharding_of(manifest, share.mode)
        self._cuts = {
            name: KindCuts(manifest, sharded, share.weights)
            for name, sharded in self._sharding.kinds.items()
        }
        kinds = [segment.kind for segment in manifest.segments]
        self._forward = [self._side(kind, backward=False) for kind in kinds]
        self._backward = [self._side(kind, backward=True) for kind in kinds]
        self._last = [list(self._end_of(index)) for index in range(len(kinds))]

    def expected(self, phase: str, key: MeetingKey) -> Meeting | None:
        """The meeting of an item that is so named; None: there is none."""
        if not 0 <= key.segment < len(self._forward):
            return None
        known = list(self._forward[key.segment])
        count = self._contract.heldout_microbatches
        if phase == "train":
            known += self._backward[key.segment]
            count = self._contract.microbatches
        index = key.index - len(known)
        if index >= 0 and phase == "train" and key.microbatch == 0:
            known += self._last[key.segment]
        inside = 0 <= key.index < len(known) and 0 <= key.microbatch < count
        return known[key.index] if inside else None

    @property
    def held_bytes_max(self) -> int:
        """What may wait at any rank at once.

        Nobody ends a meeting before this rank has brought its own to it, so the others are one
        ahead at most: what they send are frames of two meetings.
        """
        ranks = range(self._share.ranks)
        single = [held_bytes((meeting,), rank) for meeting in self._all() for rank in ranks]
        return 2 * max(single, default=0)

    @property
    def longest_bytes(self) -> int:
        """The largest whole value that ranks meet about."""
        return ELEMENT_BYTES * max((sum(meeting.lengths) for meeting in self._all()), default=0)

    def sent_bytes(self, rank: int, phase: str) -> int:
        """Bodies of all frames that a rank sends in an item."""
        train = phase == "train"
        count = self._contract.microbatches if train else self._contract.heldout_microbatches
        each = [meeting for own in self._forward for meeting in own]
        if train:
            each += [meeting for own in self._backward for meeting in own]
        total = count * sum(_sent(meeting, rank) for meeting in each)
        if train:
            total += sum(_sent(meeting, rank) for own in self._last for meeting in own)
        return total

    def _all(self) -> Iterator[Meeting]:
        for sides in (self._forward, self._backward, self._last):
            for own in sides:
                yield from own

    def _side(self, kind: str, *, backward: bool) -> list[Meeting]:
        sharded = self._sharding.kinds.get(kind)
        if sharded is None:
            return []
        parts = sharded.backward if backward else sharded.forward
        return [self._collective(kind, each) for part in parts for each in part.collectives]

    def _collective(self, kind: str, collective: Collective) -> Meeting:
        if collective.dtype != "float32":
            raise PlanInfeasible(f"kind {kind!r} exchanges {collective.dtype} among shards")
        batch = self._contract.microbatch_size
        shape = [self._manifest.axis_size(axis, batch=batch) for axis in collective.shape]
        if collective.kind == "reduce":
            lengths = even_lengths(math.prod(shape), self._share.ranks)
        else:
            (counts,) = self._cuts[kind].counts.values()
            others = math.prod(shape) // shape[collective.axis]
            lengths = tuple(others * count for count in counts)
        return Meeting(operation=_OPERATIONS[collective.kind], lengths=lengths)

    def _end_of(self, index: int) -> Iterator[Meeting]:
        """The sum of gradients, then the slices of tied ones, in the order of `ShardSums`."""
        segment = self._manifest.segments[index]
        sharded = self._sharding.kinds.get(segment.kind)
        elements = 0 if sharded is None else self._summed_elements(sharded, index)
        if elements:
            lengths = even_lengths(elements, self._share.ranks)
            yield Meeting(operation="reduce", lengths=lengths)
        cuts = tensor_cuts(self._manifest, self._share, index)
        for group in tie_groups(self._manifest):
            for holder in group.holders:
                if holder.segment == index and holder.tensor in cuts:
                    cut = cuts[holder.tensor]
                    whole = self._manifest.tensor(holder.tensor).shape
                    sizes = (math.prod(cut.shape(whole, r)) for r in range(self._share.ranks))
                    yield Meeting(operation="gather", lengths=tuple(sizes))

    def _summed_elements(self, sharded: ShardedKind, index: int) -> int:
        segment = self._manifest.segments[index]
        tensors = (self._manifest.tensor(segment.parameters[name]) for name in sharded.summed)
        return sum(tensor.elements for tensor in tensors if tensor.binding == "trainable")


def _sent(meeting: Meeting, rank: int) -> int:
    """Bodies that a rank sends in a meeting: what the others hold of it."""
    others = [other for other in range(len(meeting.lengths)) if other != rank]
    kinds = {"reduce": ("part", "total"), "scatter": ("part",), "gather": ("slice",)}
    return sum(
        meeting.body_bytes(kind, sender=rank, receiver=other)
        for kind in kinds[meeting.operation]
        for other in others
        if rank in meeting.senders(kind, other)
    )
