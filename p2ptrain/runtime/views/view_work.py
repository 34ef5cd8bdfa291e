"""One view of a run on one member: get ready, work, until it is finished or superseded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import trio

from p2ptrain import limits
from p2ptrain.agreement.view import View
from p2ptrain.engine.contract import Array
from p2ptrain.errors import NumericsError, P2PTrainError, PeerLost, RemoteProtocolError
from p2ptrain.ids import DeviceId
from p2ptrain.planner.keepers import keepers_of
from p2ptrain.planner.plan import StagePlan, is_sharded
from p2ptrain.runtime.compute.ends_worker import EndsWorker
from p2ptrain.runtime.compute.shard_worker import ShardWorker
from p2ptrain.runtime.exchange.bodies import BodyReader, discard
from p2ptrain.runtime.exchange.giving import Giver
from p2ptrain.runtime.exchange.inbox import FED_KINDS
from p2ptrain.runtime.exchange.slice_joining import savers
from p2ptrain.runtime.home.home_duty import HomeDuty, HomeSession
from p2ptrain.runtime.home.own_feeder import FeedPlace, OwnFeeder
from p2ptrain.runtime.keeping.replication import SnapshotOwner
from p2ptrain.runtime.keeping.run_state import RunState, Worker
from p2ptrain.runtime.keeping.stage_weights import prepare_timeout_s
from p2ptrain.runtime.reporting.recovery_clock import RecoveryClock
from p2ptrain.runtime.reporting.usage import RunMeter
from p2ptrain.runtime.services import Services
from p2ptrain.runtime.views.advancing import Advance
from p2ptrain.runtime.views.ends_run import EndsRun
from p2ptrain.runtime.views.item_run import RunPlace, StageHooks
from p2ptrain.runtime.views.restoring import Restorer, replay_limit_s
from p2ptrain.runtime.views.shard_run import ShardRun
from p2ptrain.runtime.views.stage_run import StageRun
from p2ptrain.training.barrier import StepBarrier
from p2ptrain.training.messages import (
    CheckpointStored,
    Done,
    Evaluated,
    Finish,
    Given,
    LabelsCounted,
    Ready,
    ReplicaStored,
    SegmentSaved,
    StopAfter,
    Usage,
    Wanted,
    stamp_of,
)
from p2ptrain.training.program import Intervals, Item, Program
from p2ptrain.training.step_record import StepRecord
from p2ptrain.wire.frames import TensorHeader


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkHooks:
    """What the work of a view tells the run."""

    complete: Callable[[View, StepRecord], None]
    """Every stage has its gradients of a step: it can be recorded, while that view counts."""
    told: Callable[[int], None]
    """Our stage gives its result of a step, or has given all up to it."""
    fail: Callable[[P2PTrainError], None]
    """The run cannot go on anywhere."""
    begun: Callable[[View], None]
    """Every member is ready."""
    want: Callable[[str], None]
    """The next view can be decided, and why."""
    promised: Callable[[], bool]
    """Whether this device has promised the next view, and with it told what it holds."""


class ViewWork:
    """From a decided view to its end, or, for who leaves, until the others do without it.

    `run` owns all of its tasks.

    What outlives the view (the stage's worker, logs, replicas) is the `RunState`'s.
    """

    def __init__(
        self,
        *,
        view: View,
        state: RunState,
        hooks: WorkHooks,
        home: HomeSession | None,
        meter: RunMeter,
        clock: RecoveryClock,
    ) -> None:
        self.view, self.plan, self.stamp = view, view.plan, stamp_of(view.plan)
        self._state, self._services, self._signal = state, state.services, state.signal
        self._hooks, self._meter = hooks, meter
        self._program = self._make_program()
        self._barrier = StepBarrier(
            plan=view.plan,
            manifest=state.manifest,
            clip_norm=view.contract.optimizer.clip_norm,
            first_step=view.resume_step,
            last_step=view.contract.steps,
        )
        self._next_step = view.resume_step + 1
        self._commits: dict[int, StepRecord] = {}
        self._numerics: NumericsError | None = None
        self._ready: set[DeviceId] = set()
        self._said_ready = False
        self._finished = False
        self.started = False
        """Whether every member got ready and the work began."""
        self._stage_run: StageRun | EndsRun | ShardRun | None = None
        self._snapshots: SnapshotOwner | None = None
        self._giver = Giver(
            outlet=self._services.outlet, blobs=self._services.blobs, read=self._read_wanted
        )
        self._restorer = Restorer(
            view=view, state=state, changed=self._giver.look_again, clock=clock
        )
        self._advance = Advance(view, state, hooks.want)
        self._duty: HomeDuty | None = None
        program = self._make_program()
        self._own_feeder = self._make_own_feeder(program, home)
        if home is not None and self.plan.home == self._services.device:
            self._duty = HomeDuty(
                session=home,
                view=view,
                program=program,
                services=self._services,
                signal=self._signal,
                feeder=self._own_feeder,
            )

    @property
    def is_finished(self) -> bool:
        """Whether the home peer has said that everything is stored."""
        return self._finished

    @property
    def stopped(self) -> bool:
        """Whether the session ends, or has ended, before the contract's last step."""
        return self._program.stopped

    @property
    def others(self) -> tuple[DeviceId, ...]:
        """Devices that are not members, but give what the members need to begin."""
        return givers(self.view)

    @property
    def helpers(self) -> tuple[DeviceId, ...]:
        """The others while they are needed: until the work has begun."""
        return () if self.started else self.others

    @property
    def waits_for(self) -> tuple[DeviceId, ...]:
        """Members that are not ready yet; empty once the work has begun."""
        return () if self.started else tuple(d for d in self.plan.members if d not in self._ready)

    async def run(self) -> None:
        """Work until the run is finished. Cancelled: the stage is between two actions.

        Raises:
            PeerLost: somebody is gone or did not get ready; the view must change.
            NumericsError, EngineError, DataError, CheckpointError: the run ends.
        """
        try:
            self._state.check_own_data()
            await self._prepare_together()
            if self._services.device in self.plan.members:
                await self._work()
        finally:
            if self._stage_run is not None:
                self._stage_run.inbox.close()

    def replica_stored(self, device: DeviceId, stored: ReplicaStored) -> None:
        """A keeper has made a segment of our stage, or of another's, durable."""
        if self._snapshots is not None:
            digest = stored.state
            if is_sharded(self.plan):  # the keeper tells that of the whole, which has our slices
                digest = self._snapshots.state(stored.step, stored.segment) or digest
            self._snapshots.stored(device, stored.step, stored.segment, digest)
        self._advance.look()

    def tell_replica(self, saved: SegmentSaved) -> None:
        """We have made a replica durable: tell all."""
        told = ReplicaStored(
            stamp=self.stamp, step=saved.step, segment=saved.segment, state=saved.state
        )
        self._tell_all(told, *self.others)  # who leaves waits for the set

    def stop(self) -> None:
        """End the session after the step that has begun, where this is its home peer."""
        if self._duty is not None:
            self._duty.stop()

    def committed(self, record: StepRecord) -> None:
        """A step of this view can no longer be lost: it may be applied."""
        self._commits[record.step] = record
        self._state.sets.committed(record.step)
        self._barrier.skip_to(record.step)
        self._next_step = max(self._next_step, record.step + 1)
        self._record_complete()
        self._signal.notify()

    def receive(self, device: DeviceId, message: object) -> None:
        """Take a control message of this view, already checked to come from a member.

        Raises:
            RemoteProtocolError: one that the view does not allow; its sender's link is dropped.
        """
        from_home = device == self.plan.home
        match message:
            case Ready(asks=asks):
                self._ready.add(device)
                if asks and self._said_ready:
                    self._tell(device, Ready(stamp=self.stamp))
            case Done():
                self._take_done(device, message)
            case Wanted() if self._stays(device, message):
                error = RemoteProtocolError(f"{device[:8]} asks for data that stays where it is")
                self._services.drop_link(device, error)
            case Wanted():
                self._giver.ask(device, message)
            case Given():
                self._restorer.asker.receive(device, message)
            case SegmentSaved():
                self._saved(device, message)
            case Evaluated() | Usage() if self._duty is not None:
                self._duty.receive(device, message)
            case LabelsCounted() if self._own_feeder is not None:
                self._own_feeder.receive(device, message)
            case StopAfter(step=step) if from_home:
                self._program.stop_after(step)
                if self._own_feeder is not None:
                    self._own_feeder.stop_after(step)
            case Finish() if from_home:
                self._finished = True
            case CheckpointStored(step=step) if from_home:
                if self._snapshots is not None:
                    self._snapshots.collected(step)
        self._signal.notify()

    async def receive_tensor(
        self, device: DeviceId, header: TensorHeader, length: int, reader: BodyReader
    ) -> None:
        """Take a tensor frame of this view."""
        if self._stage_run is None:
            await discard(reader, length)
            return
        await self._stage_run.inbox.receive(device, header, length, reader)

    def deliver(self, header: TensorHeader, array: Array) -> None:
        """Take inputs or labels that this very peer feeds."""
        if self._stage_run is not None:
            self._stage_run.inbox.deliver(header, array)

    # Getting ready.

    async def _prepare_together(self) -> None:
        """Restore our part and help the others, until everybody is ready."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._giver.run)
            await self._restorer.settle()
            self._giver.look_again()
            worker = await self._restorer.restore()
            self._make_stage_run(worker)
            self._tell_all(Ready(stamp=self.stamp), *self.others)
            self._said_ready = True
            nursery.start_soon(self._ask_ready)
            await self._wait_ready()
            nursery.cancel_scope.cancel()
        self._restorer.adopt(worker)
        self.started = True
        self._hooks.begun(self.view)
        for replica in self._state.kept():
            self._tell_all(
                ReplicaStored(
                    stamp=self.stamp,
                    step=replica.place.step,
                    segment=replica.place.segment,
                    state=replica.state,
                )
            )
        self._signal.notify()

    async def _wait_ready(self) -> None:
        limit_s = prepare_timeout_s(self._state.manifest, resumed=not self._restorer.draws)
        limit_s += replay_limit_s(self.view)
        with trio.move_on_after(limit_s) as scope:
            await self._signal.wait_until(lambda: self._ready >= set(self.plan.members))
        if scope.cancelled_caught:
            late = ", ".join(map(self._services.directory.name_of, self.waits_for))
            raise PeerLost(f"{late} did not get ready within {limit_s:.0f} s")

    async def _ask_ready(self) -> None:
        """Ask again whoever has not said that it is ready.

        It may have said so before this device knew of the run, or over a link that was ending.
        """
        while True:
            await trio.sleep(limits.READY_REPEAT_S)
            for device in self.waits_for:
                self._tell(device, Ready(stamp=self.stamp, asks=True))

    async def _read_wanted(self, wanted: Wanted) -> bytes | None:
        return await self._restorer.read(wanted)

    # Working.

    async def _work(self) -> None:
        async with trio.open_nursery() as nursery:
            if self._duty is not None:
                nursery.start_soon(self._duty.run)
            elif self._own_feeder is not None:
                nursery.start_soon(self._own_feeder.run)
            if self._stage_run is not None and self._snapshots is not None:
                nursery.start_soon(self._snapshots.run)
                nursery.start_soon(self._stage_run.run)
                if may_change_parts(self.view):
                    nursery.start_soon(self._state.pacing.run, self.view)
            nursery.start_soon(self._advance.run)
            await self._signal.wait_until(lambda: self._finished)
            nursery.cancel_scope.cancel()

    def _make_stage_run(self, worker: Worker | None) -> None:
        if worker is None:
            return
        self._hooks.told(self.view.resume_step)
        self._snapshots = SnapshotOwner(
            worker=worker,
            bundle=self._state.bundle.digest,
            keepers=self._own_keepers(),
            receivers=self._advance.sends(worker.segments),
            blobs=self._services.blobs,
            announce=self._services.outlet.send,
        )
        place = RunPlace(
            plan=self.plan,
            contract=self.view.contract,
            manifest=self._state.manifest,
            program=self._program,
            outlet=self._services.outlet,
            meter=self._meter,
            device=self._services.device,
            signal=self._signal,
            hooks=StageHooks(
                save=self._save,
                done=self._tell_done,
                committed=self._wait_committed,
                log=self._state.log_sent,
                clock_ns=self._services.clock_ns,
            ),
        )
        if isinstance(worker, ShardWorker):
            self._stage_run = ShardRun(place, worker)
        elif isinstance(worker, EndsWorker):
            self._stage_run = EndsRun(place, worker, self._advance.marks)
        else:
            self._stage_run = StageRun(place, worker, self._advance.marks(worker.segments))

    def _make_own_feeder(self, program: Program, home: HomeSession | None) -> OwnFeeder | None:
        """Where peers feed their own data, for each of them and for the home peer."""
        contract, device = self.view.contract, self._services.device
        if not contract.owners or device not in self.plan.members:
            return None
        computes = bool(self.plan.stages_of(device))
        own = self._program

        def completed() -> int:
            return own.fed_count if computes or home is None else home.progress.completed_items

        place = FeedPlace(
            device=device,
            plan=self.plan,
            contract=contract,
            loss=self._state.manifest.loss,
            program=program,
            outlet=self._services.outlet,
            signal=self._signal,
        )
        return OwnFeeder(place, self._state.own_samples, completed)

    def _make_program(self) -> Program:
        view = self.view
        return Program(
            view.contract,
            intervals=Intervals(
                checkpoint_every=view.checkpoint_every, replica_every=view.plan.replica_every
            ),
            first_step=view.first_step,
            resume_step=None if view.restoration is None else view.resume_step,
        )

    def _tell_done(self, done: Done) -> None:
        """Our gradients of a step are complete, and so is what we logged of it.

        Not after a promise: it has told that they are not, so a step that others could still record
        would find our stage's state lost. The next view makes it again.
        """
        if self._hooks.promised():
            return
        self._state.log.finish(done.step)
        self._hooks.told(done.step)
        self._tell_all(done)

    def _take_done(self, device: DeviceId, done: Done) -> None:
        """Note one stage's result; with the last one the step can be recorded."""
        self._barrier.add(device, done)
        self._state.pacing.note(device, done.step, done.compute_ns)
        self._record_complete()

    def _record_complete(self) -> None:
        while self._numerics is None and not self._barrier.missing(self._next_step):
            try:
                totals = self._barrier.take(self._next_step)
            except NumericsError as error:
                self._numerics = error
                self._hooks.fail(error)
                return
            self._next_step += 1
            self._hooks.complete(
                self.view,
                StepRecord(
                    step=totals.step,
                    loss=totals.loss,
                    gradient_norm=totals.gradient_norm,
                    clip_scale=totals.clip_scale,
                ),
            )

    async def _wait_committed(self, step: int) -> StepRecord:
        await self._signal.wait_until(lambda: step in self._commits)
        record = self._commits.pop(step)
        self._state.released_step = step
        return record

    async def _save(self, item: Item) -> None:
        """Snapshot our stage for its keepers, and for home where it is a checkpoint."""
        keepers, checkpoint = self._own_keepers(), item.kind == "checkpoint" and self._is_first()
        if not checkpoint and self._receivers_first():
            return
        if self._snapshots is not None and (keepers or checkpoint):
            home = self.plan.home if checkpoint else None
            await self._snapshots.snapshot(self.stamp, item.step, collector=home)

    def _receivers_first(self) -> bool:
        """Whether this set is left out, so that who joins gets the whole of the one before."""
        receiving = self._snapshots is not None and self._snapshots.is_receiving
        return receiving and not self._state.log.full

    def _own_keepers(self) -> tuple[DeviceId, ...]:
        """Who keeps replicas of what we save."""
        if not self._is_first():
            return ()
        own = self.plan.stages_of(self._services.device)
        return tuple(sorted({keeper for index in own for keeper in keepers_of(self.plan, index)}))

    def _is_first(self) -> bool:
        """Whether we save our stage: of replicas the first, of shards each its slices."""
        return any(self._saves(stage, self._services.device) for stage in self.plan.stages)

    def _saves(self, stage: StagePlan, device: DeviceId) -> bool:
        """Whether a device saves a stage, or its slices of it."""
        return device in savers(self._state.manifest, stage)

    def _stays(self, device: DeviceId, wanted: Wanted) -> bool:
        """Whether somebody else asks for data that stays: no replay needs it there."""
        stays = self.plan.private or bool(self.view.contract.owners)
        return stays and device != self._services.device and wanted.what in FED_KINDS

    def _saved(self, device: DeviceId, saved: SegmentSaved) -> None:
        """A stage has a snapshot for us: as its replica's keeper, as the home peer, or both."""
        stages, own = self.plan.stages, self.plan.stages_of(device)
        if not any(self._saves(stages[index], device) for index in own):
            raise RemoteProtocolError(f"{device[:8]} saved a stage that is not its own to save")
        stage = next((index for index in own if saved.segment in stages[index].segments), None)
        if stage is None:
            raise RemoteProtocolError(f"segment {saved.segment} was saved against the plan")
        if saved.checkpoint and self._duty is not None:
            self._duty.receive(device, saved)
        keeps = self._services.device in keepers_of(self.plan, stage)
        if keeps or self._advance.gets(saved.segment):
            self._state.keeper.announce(device, saved)

    def _tell_all(self, message: object, *others: DeviceId) -> None:
        """To every member, ourselves included; one that is gone is noticed elsewhere."""
        for device in (*self.plan.members, *others):
            self._tell(device, message)

    def _tell(self, device: DeviceId, message: object) -> None:
        with contextlib.suppress(PeerLost):
            self._services.outlet.send(device, message)


def may_change_parts(view: View) -> bool:
    """Whether members may get other parts, or newcomers one: not of shards, which keep theirs, nor
    where each feeds its own data."""
    return not is_sharded(view.plan) and not view.contract.owners


def givers(view: View) -> tuple[DeviceId, ...]:
    """Who is not in the view, but has what its members need to begin: those that leave."""
    if view.restoration is None:
        return ()
    named = {at.device for at in view.restoration.sources}
    for replay in view.restoration.replays:
        named |= {at.device for at in replay.replicas}
        named |= {at.device for at in replay.tied_from}
        named |= {part.device for part in replay.parts}
        optional = (replay.activations_from, replay.cotangents_from, replay.data_from)
        named |= {device for device in optional if device is not None}
    return tuple(sorted(named - set(view.members)))


def unreachable(view: View, services: Services) -> str | None:
    """Why another view is wanted as soon as this one is entered: somebody it needs went away while
    it was being decided, and what was said of that then ended with the decision; None: nobody did.
    """
    needed = {*view.members, *givers(view)} - {services.device}
    missing = sorted(needed - set(services.directory.linked()))
    if view.restoration is None or not missing:
        return None
    return f"no link with {', '.join(map(services.directory.name_of, missing))}"
