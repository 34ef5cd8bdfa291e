"""The home peer's collector of checkpoints: fetch every segment, then commit the step."""

from __future__ import annotations

import trio

from p2ptrain import limits
from p2ptrain.errors import RemoteProtocolError
from p2ptrain.ids import DeviceId
from p2ptrain.planner.plan import Plan
from p2ptrain.runtime.exchange.blobs import blob_digest
from p2ptrain.runtime.exchange.slice_joining import Announced, SliceJoiner
from p2ptrain.runtime.planning.job import Job
from p2ptrain.runtime.services import Services
from p2ptrain.runtime.signal import Signal
from p2ptrain.store.runs import CheckpointRecord, SavedSegment
from p2ptrain.training.contract import Contract
from p2ptrain.training.messages import CheckpointStored, SegmentSaved, stamp_of
from p2ptrain.training.segment_state import segment_head, values_bytes


class CheckpointCollector:
    """Stores segments as they are announced; a step is committed when all are there."""

    def __init__(
        self, *, job: Job, plan: Plan, contract: Contract, services: Services, signal: Signal
    ) -> None:
        self._job, self._plan, self._contract = job, plan, contract
        self._services, self._signal = services, signal
        self._manifest = job.bundle.manifest
        self._state_names = self._manifest.updates[contract.optimizer.name].state
        self._segment_count = len(self._manifest.segments)
        self._stored: dict[int, dict[int, SavedSegment]] = {}
        self._slices: dict[tuple[int, int], Announced] = {}
        """By step and segment, of a sharded model."""
        self._joiner = None
        if plan.stages[0].is_sharded:
            self._joiner = SliceJoiner(
                plan=plan, manifest=self._manifest, contract=contract, blobs=services.blobs
            )
        self._send, self._announced = trio.open_memory_channel[tuple[DeviceId, SegmentSaved]](
            limits.SEGMENTS_MAX
        )
        self.latest: CheckpointRecord | None = job.checkpoint

    def announce(self, device: DeviceId, saved: SegmentSaved) -> None:
        """A stage peer has a segment ready to fetch.

        Raises:
            RemoteProtocolError: not a segment of its stage, not a step of the run, or more than
                can be waiting.
        """
        if not self._fits(device, saved):
            raise RemoteProtocolError(f"segment {saved.segment} was saved against the plan")
        try:
            self._send.send_nowait((device, saved))
        except trio.WouldBlock as error:
            raise RemoteProtocolError("more segments were saved than the model has") from error

    def _fits(self, device: DeviceId, saved: SegmentSaved) -> bool:
        if saved.segment not in self._plan.segments_of(device):
            return False
        return saved.step in range(self._job.first_step, self._contract.steps + 1)

    async def run(self) -> None:
        """Fetch and store until cancelled; a half stored step is no checkpoint."""
        async for device, saved in self._announced:
            if self._joiner is not None:
                await self._take_slices(self._joiner, device, saved)
                continue
            size = values_bytes(self._manifest, saved.segment, self._state_names, self._contract)
            values = await self._services.blobs.fetch(device, saved.state, size=size)
            header = saved.header(self._contract.bundle)
            head = segment_head(self._manifest, header, self._state_names, self._contract)
            await self._keep(saved, head + values)

    async def _take_slices(
        self, joiner: SliceJoiner, device: DeviceId, saved: SegmentSaved
    ) -> None:
        """Note one shard's part of a segment, and keep the whole once all are there."""
        place = (saved.step, saved.segment)
        announced = self._slices.setdefault(place, Announced(saved.step))
        if joiner.note(announced, device, saved):
            del self._slices[place]
            whole, state = await joiner.joined(announced)
            await self._keep(whole, state.to_bytes(whole.header(self._contract.bundle)))

    async def _keep(self, saved: SegmentSaved, content: bytes) -> None:
        """Store a segment's file; with the last one the checkpoint is complete."""
        segments = self._stored.setdefault(saved.step, {})
        segments[saved.segment] = await trio.to_thread.run_sync(self._store, saved, content)
        if len(segments) == self._segment_count:
            await self._commit(saved.step)

    def _store(self, saved: SegmentSaved, content: bytes) -> SavedSegment:
        self._job.directory.write_segment(saved.step, saved.segment, content)
        return SavedSegment(
            segment=saved.segment,
            blob=blob_digest(content),
            blob_bytes=len(content),
            state=saved.state,
        )

    async def _commit(self, step: int) -> None:
        segments = self._stored.pop(step)
        record = CheckpointRecord(
            run=self._plan.run,
            lineage=self._plan.lineage,
            view=self._plan.view,
            plan=self._plan.digest,
            step=step,
            bundle=self._contract.bundle,
            contract=self._contract.digest,
            segments=tuple(segments[index] for index in sorted(segments)),
        )
        await trio.to_thread.run_sync(self._job.directory.commit_checkpoint, record)
        self.latest = record
        stored = CheckpointStored(stamp=stamp_of(self._plan), step=step)
        for device in self._plan.devices:
            self._services.outlet.send(device, stored)
        self._signal.notify()
