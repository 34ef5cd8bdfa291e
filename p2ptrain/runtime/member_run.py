"""This device's stage in a run: prepare it, run it, hold its checkpoint until that is stored."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import trio

from p2ptrain import limits
from p2ptrain.engine.contract import Array, Engine
from p2ptrain.errors import CheckpointError, InvariantBroken, PeerLost, RemoteProtocolError
from p2ptrain.ids import DeviceId, Digest
from p2ptrain.planner.plan import Plan
from p2ptrain.runtime.blobs import BlobExchange
from p2ptrain.runtime.inbox import BodyReader, discard
from p2ptrain.runtime.services import Services
from p2ptrain.runtime.signal import Signal
from p2ptrain.runtime.stage import StageWorker
from p2ptrain.runtime.stage_run import StageRun
from p2ptrain.runtime.stage_weights import StageWeights, prepare_timeout_s
from p2ptrain.store.bundles import Bundle
from p2ptrain.store.runs import SavedSegment
from p2ptrain.training.contract import Contract
from p2ptrain.training.messages import (
    Begin,
    CheckpointStored,
    Done,
    Finish,
    Go,
    Ready,
    SegmentSaved,
    StopAfter,
    stamp_of,
)
from p2ptrain.training.program import Program
from p2ptrain.training.segment_state import StateHeader, read_segment_state
from p2ptrain.wire.codec import from_plain, to_plain
from p2ptrain.wire.frames import TensorHeader


def checkpoint_listing(segments: tuple[SavedSegment, ...]) -> bytes:
    """The blob that tells members where each segment's state is."""
    return json.dumps([to_plain(saved) for saved in segments]).encode()


class MemberRun:
    """One decided plan on a device that has a stage in it."""

    def __init__(
        self,
        *,
        plan: Plan,
        contract: Contract,
        bundle: Bundle,
        engine: Engine,
        services: Services,
        own_weights: Mapping[str, Array] | None = None,
    ) -> None:
        """`own_weights` are the bundle's, where this device is the run's home peer."""
        self.plan, self.stamp = plan, stamp_of(plan)
        self._contract, self._bundle, self._engine = contract, bundle, engine
        self._services = services
        self._signal = Signal()
        self._begin: Begin | None = None
        self._go = self._finished = False
        self._stored_step = self._saved_step = -1
        self._saved_blobs: list[Digest] = []
        self._stage_run: StageRun | None = None
        self._program: Program | None = None
        index = plan.stage_of(services.device)
        if index is None:
            raise InvariantBroken("a member run on a device without a stage")
        self._stage = plan.stages[index]
        self._own_weights = own_weights
        self._stage_weights = StageWeights(
            services.runs_path / plan.run / "weights",
            manifest=bundle.manifest,
            segments=self._stage.segments,
        )
        self._worker: StageWorker | None = None
        self._meter = services.open_meter(plan, contract.minibatch_size)

    async def run(self) -> None:
        """From the decision to `finish`. Cancelling it abandons the run on this device.

        Raises:
            PeerLost: the home peer stays silent, or a neighbour's link broke.
            NumericsError, CheckpointError, EngineError: the session cannot go on.
        """
        try:
            limit_s = limits.PREPARE_TIMEOUT_S
            await self._hear_from_home(lambda: self._begin is not None, "begin the run", limit_s)
            begin = self._required_begin()
            stage_run = await self._prepare(begin)
            self._services.outlet.send(self.plan.home, Ready(stamp=self.stamp))
            resumed = begin.checkpoint is not None
            limit_s = prepare_timeout_s(self._bundle.manifest, resumed=resumed)
            await self._hear_from_home(lambda: self._go, "say go", limit_s)
            await stage_run.run()
            await self._signal.wait_until(lambda: self._finished)
            complete = self._program is not None and not self._program.stopped
            if complete and self._stage_weights.kept:
                await trio.to_thread.run_sync(self._stage_weights.forget)
        finally:
            self._forget_blobs()
            self._meter.close()
            if self._stage_run is not None:
                self._stage_run.inbox.close()

    def receive(self, device: DeviceId, message: object) -> None:
        """Take a control message of this run, already checked to carry our stamp."""
        from_home = device == self.plan.home
        match message:
            case Begin() if from_home:
                self._begin = message
            case Go() if from_home:
                self._go = True
            case Finish() if from_home:
                self._finished = True
            case CheckpointStored(step=step) if from_home:
                self._stored_step = max(self._stored_step, step)
            case StopAfter(step=step) if from_home and self._program is not None:
                self._program.stop_after(step)
            case Done() if self._stage_run is not None:
                self._stage_run.barrier.add(device, message)
        self._signal.notify()

    async def receive_tensor(self, header: TensorHeader, length: int, reader: BodyReader) -> None:
        """Take a tensor frame of this run."""
        if self._stage_run is None:
            await discard(reader, length)
            return
        await self._stage_run.inbox.receive(header, length, reader)

    def deliver(self, header: TensorHeader, array: Array) -> None:
        """Take inputs or labels that this very peer feeds."""
        if self._stage_run is not None:
            self._stage_run.inbox.deliver(header, array)

    async def _hear_from_home(self, heard: Callable[[], bool], what: str, waits_s: float) -> None:
        """Wait for the home peer, which itself waits `waits_s` at most for its slowest member."""
        limit_s = waits_s + limits.PROPOSAL_TIMEOUT_S
        with trio.move_on_after(limit_s):
            await self._signal.wait_until(heard)
        if not heard():
            name = self._services.directory.name_of(self.plan.home)
            raise PeerLost(f"the home peer {name} did not {what} within {limit_s:.0f} s")

    def _required_begin(self) -> Begin:
        if self._begin is None:
            raise InvariantBroken("a run was prepared before it began")
        return self._begin

    async def _prepare(self, begin: Begin) -> StageRun:
        weights = await self._weights(resumed=begin.checkpoint is not None)
        worker = await trio.to_thread.run_sync(self._build_worker, weights)
        if begin.checkpoint is None:
            await trio.to_thread.run_sync(worker.draw_parameters)
        else:
            await self._load_checkpoint(worker, begin.checkpoint, begin.checkpoint_bytes)
        program = Program(
            self._contract, first_step=begin.first_step, checkpoint_every=begin.checkpoint_every
        )
        self._worker, self._program = worker, program
        self._stage_run = StageRun(
            plan=self.plan,
            contract=self._contract,
            manifest=self._bundle.manifest,
            worker=worker,
            program=program,
            outlet=self._services.outlet,
            meter=self._meter,
            device=self._services.device,
            signal=self._signal,
            save=self._save,
        )
        return self._stage_run

    async def _weights(self, *, resumed: bool) -> Mapping[str, Array]:
        """The bundle's weights that this stage needs: our own bundle's, or the home peer's."""
        if self._own_weights is not None:
            return self._own_weights
        blobs, home = self._services.blobs, self.plan.home
        return await self._stage_weights.fetch(blobs, home, resumed=resumed)

    def _build_worker(self, weights: Mapping[str, Array]) -> StageWorker:
        return StageWorker(
            engine=self._engine,
            bundle=self._bundle,
            segments=self._stage.segments,
            contract=self._contract,
            in_flight=self._stage.in_flight_max,
            weights=weights,
        )

    async def _load_checkpoint(self, worker: StageWorker, digest: Digest, size: int) -> None:
        blobs, home = self._services.blobs, self.plan.home
        listing = _parse_listing(await blobs.fetch(home, digest, size=size))
        for segment in self._stage.segments:
            saved = listing.get(segment)
            if saved is None:
                raise CheckpointError(f"the checkpoint lacks segment {segment}")
            content = await blobs.fetch(home, saved.blob, size=saved.blob_bytes)
            await trio.to_thread.run_sync(self._load_segment, worker, segment, content)

    def _load_segment(self, worker: StageWorker, segment: int, content: bytes) -> None:
        manifest = self._bundle.manifest
        stored = read_segment_state(
            content,
            manifest,
            bundle=manifest.digest,
            state_names=manifest.updates[self._contract.optimizer.name].state,
        )
        begin, header = self._required_begin(), stored.header
        place = (header.run, header.segment, header.step)
        if place != (self.stamp.run, segment, begin.first_step):
            raise CheckpointError(f"what came as segment {segment} is something else")
        worker.load(segment, stored.state)

    async def _save(self, step: int) -> None:
        """Publish every segment's state at `step`; waits until the save before is durable."""
        await self._signal.wait_until(lambda: self._stored_step >= self._saved_step)
        self._forget_blobs()
        self._saved_step = step
        for segment in self._stage.segments:
            content, state = await trio.to_thread.run_sync(self._serialise, segment, step)
            blob = self._services.blobs.publish(content)
            self._saved_blobs.append(blob)
            saved = SegmentSaved(
                stamp=self.stamp,
                step=step,
                segment=segment,
                blob=blob,
                blob_bytes=len(content),
                state=state,
            )
            self._services.outlet.send(self.plan.home, saved)

    def _serialise(self, segment: int, step: int) -> tuple[bytes, Digest]:
        if self._worker is None:
            raise InvariantBroken("a checkpoint before the stage was built")
        state = self._worker.state(segment, step)
        header = StateHeader(
            run=self.stamp.run,
            lineage=self.stamp.lineage,
            view=self.stamp.view,
            plan=self.stamp.plan,
            step=step,
            segment=segment,
            bundle=self._bundle.digest,
        )
        return state.to_bytes(header), state.digest()

    def _forget_blobs(self) -> None:
        blobs: BlobExchange = self._services.blobs
        for digest in self._saved_blobs:
            blobs.withdraw(digest)
        self._saved_blobs.clear()


def _parse_listing(content: bytes) -> dict[int, SavedSegment]:
    try:
        document = json.loads(content)
        if not isinstance(document, list):
            raise CheckpointError("the checkpoint's listing is not a list")
        segments = [from_plain(SavedSegment, item) for item in document]
    except (ValueError, RemoteProtocolError) as error:
        raise CheckpointError(f"the checkpoint's listing is damaged: {error}") from error
    return {saved.segment: saved for saved in segments}
