"""Whole states of segments out of what each shard of a model saves."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import trio

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.bundle.sharding import Mode
from p2ptrain.ids import DeviceId
from p2ptrain.planner.plan import Plan, StagePlan
from p2ptrain.runtime.exchange.blobs import BlobExchange
from p2ptrain.training.contract import Contract
from p2ptrain.training.messages import SegmentSaved
from p2ptrain.training.segment_state import SegmentState
from p2ptrain.training.shard_cuts import Share, has_slices, share_of
from p2ptrain.training.shard_states import joined_values, no_residuals, slices_bytes


def savers(manifest: Manifest, stage: StagePlan) -> tuple[DeviceId, ...]:
    """Whose snapshots make up the states of a stage: all that have slices, else the first."""
    if not stage.is_sharded:
        return (stage.device,)
    mode: Mode = "tensor" if stage.split == "tensor" else "sequence"
    return stage.devices if has_slices(manifest, mode) else stage.devices[:1]


@dataclass(slots=True)
class Announced:
    """What the shards have announced of one segment and step."""

    step: int
    by_rank: dict[int, tuple[DeviceId, SegmentSaved]] = field(default_factory=dict)

    @property
    def devices(self) -> set[DeviceId]:
        """Whose announcements these are."""
        return {device for device, _ in self.by_rank.values()}


class SliceJoiner:
    """Fetches the slices of all that save, and joins them."""

    def __init__(
        self, *, plan: Plan, manifest: Manifest, contract: Contract, blobs: BlobExchange
    ) -> None:
        """Of a plan whose model is sharded."""
        self._plan, self._manifest, self._contract = plan, manifest, contract
        self._blobs = blobs
        self._names = manifest.updates[contract.optimizer.name].state
        self._savers = savers(manifest, plan.stages[0])

    def note(self, announced: Announced, device: DeviceId, saved: SegmentSaved) -> bool:
        """Add what one device has announced; whether everybody that saves has."""
        share = self._share(device)
        if share is not None:
            announced.by_rank[share.rank] = (device, saved)
        return len(announced.by_rank) == len(self._savers)

    def _share(self, device: DeviceId) -> Share | None:
        """Whose part a device saves; None: it saves nothing."""
        return share_of(self._plan, device) if device in self._savers else None

    async def joined(self, announced: Announced) -> tuple[SegmentSaved, SegmentState]:
        """The whole state of a segment, and what its announcement would be.

        Raises:
            PeerLost: a device is gone; nothing is kept.
            RemoteProtocolError: what came is not what was announced.
        """
        values = []
        for rank in range(len(self._savers)):
            device, saved = announced.by_rank[rank]
            share = share_of(self._plan, device)
            if share is not None:
                size = slices_bytes(self._manifest, share, saved.segment, self._names)
                values.append(await self._blobs.fetch(device, saved.state, size=size))
        _, first = announced.by_rank[0]
        state = await trio.to_thread.run_sync(self._join, first, values)
        return dataclasses.replace(first, state=state.digest()), state

    def _join(self, saved: SegmentSaved, values: list[bytes]) -> SegmentState:
        share = share_of(self._plan, self._savers[0])
        if share is None:
            raise ValueError("a model that is not sharded has no slices")
        header = saved.header(self._manifest.digest)
        state = joined_values(self._manifest, share, header, self._names, values)
        residuals = no_residuals(self._manifest, self._contract, saved.segment)
        return dataclasses.replace(state, residuals=residuals)
