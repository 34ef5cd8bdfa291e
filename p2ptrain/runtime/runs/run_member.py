"""This device's part in a run, from its first view here to the end.

The machine decides (agreement.run_machine); here its events are acted on: a committed step is
released, a decided view is entered, a wanted view is planned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Final

import trio

from p2ptrain import limits
from p2ptrain.agreement.run_events import (
    Fenced,
    Paused,
    ProposalWanted,
    Stance,
    StepCommitted,
    Unpaused,
    ViewDecided,
)
from p2ptrain.agreement.run_machine import RunMachine
from p2ptrain.agreement.view import View
from p2ptrain.engine.contract import Array
from p2ptrain.errors import InvariantBroken, P2PTrainError, PeerLost
from p2ptrain.ids import DeviceId, RunId
from p2ptrain.planner.plan import Plan
from p2ptrain.planner.profile import PeerProfile
from p2ptrain.runtime.driver import Driver
from p2ptrain.runtime.exchange.bodies import BodyReader, discard
from p2ptrain.runtime.exchange.early import EarlyMessages
from p2ptrain.runtime.exchange.foreign import as_ours
from p2ptrain.runtime.home.home_duty import HomeSession
from p2ptrain.runtime.keeping.data_keeping import DataKeeping, later_session
from p2ptrain.runtime.keeping.run_state import RunState
from p2ptrain.runtime.keeping.stage_weights import OfferedWeights
from p2ptrain.runtime.planning.job import Job
from p2ptrain.runtime.reporting.recovery_clock import RecoveryClock
from p2ptrain.runtime.reporting.usage import RunMeter
from p2ptrain.runtime.runs.admission import Admission, admits
from p2ptrain.runtime.runs.first_view import activity, first_view
from p2ptrain.runtime.runs.leaving import goes_on_without, why_waited_for
from p2ptrain.runtime.runs.proposing import Proposing
from p2ptrain.runtime.views.view_work import ViewWork, WorkHooks, givers, unreachable
from p2ptrain.store.weights import Weights
from p2ptrain.training.messages import (
    Begin,
    DataHeld,
    DataOffered,
    Declined,
    Ended,
    HoldingsAsked,
    HoldingsTold,
    Outcome,
    Profiled,
    ReplicaStored,
    SegmentSaved,
    Stamp,
    stamp_of,
)
from p2ptrain.training.step_record import StepRecord
from p2ptrain.wire.frames import TensorHeader

BEGIN_WITHIN_S: Final = limits.PREPARE_TIMEOUT_S + limits.PROPOSAL_TIMEOUT_S
"""After the decision."""


class LeftOut(P2PTrainError):
    """The run goes on without this peer, which may join it again."""


class RunMember:
    """One run at one device; `run` owns every task of it.

    Args:
        state: What is held of the run.
        driver: Makes the driver of the run's machine; its events come to `follow`.
        home: Where this device has the run's data.
        founding: The plan whose first view is about to begin; None: a view was decided already.
    """

    def __init__(
        self,
        *,
        state: RunState,
        open_driver: Callable[[RunMember], Driver[RunMachine]],
        home: HomeSession | None,
        founding: Plan | None,
    ) -> None:
        self.state, self.home, self.founding = state, home, founding
        self._services, self._signal = state.services, state.signal
        self._meter: RunMeter | None = None
        self.driver = open_driver(self)
        self._proposing = Proposing(state, self.driver, self._newcomers)
        self.recovery = RecoveryClock()
        state.on_stored, state.pacing.want = self._replica_stored, self.want
        self.data = DataKeeping(
            state=state, job=None if home is None else home.job, on_copied=self._data_copied
        )
        self._weights = OfferedWeights(self._services.blobs, state.manifest, state.run)
        self._admission: Admission | None = None
        self.history: dict[int, StepRecord] = {}
        self._early = EarlyMessages()
        self._begin: Begin | None = None
        self._work: ViewWork | None = None
        self._view_scope: trio.CancelScope | None = None
        self._nursery: trio.Nursery | None = None
        self.failure: P2PTrainError | None = None
        self.paused: Paused | None = None
        self.is_restored = False
        """Whether a restart interrupted the view that is known: its stage is lost here."""
        self._counted = self._is_over = False  # who is there; what `run` does
        self._offered_by: DeviceId | None = None
        self._released = 0

    @property
    def machine(self) -> RunMachine:
        """What decides; read only."""
        return self.driver.machine

    @property
    def view(self) -> View | None:
        """The newest decided view."""
        return self.machine.view

    @property
    def plan(self) -> Plan | None:
        """Of the newest view, or the one that is about to begin."""
        view = self.machine.view
        return self.founding if view is None else view.plan

    @property
    def work(self) -> ViewWork | None:
        """What this device does in the view it is in."""
        return self._work

    @property
    def is_finishing(self) -> bool:
        """Whether the run is finished and only what was kept for it is put away."""
        return self._work is not None and self._work.is_finished

    @property
    def started(self) -> bool:
        """Whether a view's work has begun here: from then on a lost peer does not end the run."""
        view = self.machine.view
        work = self._work
        return view is not None and (
            view.restoration is not None or (work is not None and work.started)
        )

    def offer_weights(self) -> None:
        """Offer the bundle's weights where this device has them, until `run` ends.

        Before anybody can be told to begin: the others do not wait for this device's disk.
        """
        if self.home is not None:
            self._weights.open(self.home.weights)

    async def run(self) -> None:
        """Take part until the run is finished. Cancelling it abandons the run on this device.

        Raises:
            LeftOut: a view without this device was decided.
            P2PTrainError: the run cannot go on; the others must be told.
        """
        begin_by_s = trio.current_time() + BEGIN_WITHIN_S
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                try:
                    await self._run_in(nursery, begin_by_s)
                finally:
                    self._nursery = None  # it takes no new tasks from now on
        finally:
            self._is_over = True
            self._signal.notify()
            self.state.close()
            self.data.close()
            self._weights.close()
            if self._meter is not None:
                self._meter.close()

    async def _run_in(self, nursery: trio.Nursery, begin_by_s: float) -> None:
        await nursery.start(self.driver.run)
        await trio.to_thread.run_sync(self.state.open_disk)
        await trio.to_thread.run_sync(self.state.open_own_data)
        nursery.start_soon(self.state.keeper.run)
        if self.is_restored:
            await self._await_next_view()
        await self._await_begin(begin_by_s)
        while not await self._enter_newest():
            pass
        nursery.cancel_scope.cancel()

    def stop(self) -> None:
        """End the session after the step that has begun, where this device conducts it."""
        if self.home is not None:
            self.home.stopping = True
        if self._work is not None:
            self._work.stop()

    # What arrives.

    def receive(self, device: DeviceId, stamp: Stamp, message: object) -> None:
        """Take a stamped control message of this run from a device of the group.

        Raises:
            RemoteProtocolError: one that its view does not allow, or too many ahead of theirs.
        """
        if isinstance(message, Begin):
            self._take_begin(device, message)
            return
        if isinstance(message, HoldingsAsked | HoldingsTold):
            self._proposing.holdings.receive(device, message)
            return
        work = self._work
        if work is not None and work.stamp == stamp:
            if device not in (*work.plan.members, *work.others):
                return
            if isinstance(message, DataOffered):
                self._start(self.data.take, work.view, device, message)
            elif isinstance(message, DataHeld):
                self.state.data_copies.add(device)
            elif isinstance(message, ReplicaStored):
                self.state.sets.stored(message, device)
                self._signal.notify()
                work.replica_stored(device, message)
                self._release()
            else:
                work.receive(device, message)
        elif self._is_later(stamp):
            self._early.keep(device, stamp, message)

    async def receive_tensor(
        self, device: DeviceId, header: TensorHeader, length: int, reader: BodyReader
    ) -> None:
        """Take a tensor frame; one of another view is dropped."""
        work = self._work
        stamp = Stamp(run=header.run, lineage=header.lineage, view=header.view, plan=header.plan)
        if work is None or work.stamp != stamp or device not in work.plan.members:
            await discard(reader, length)
            return
        await work.receive_tensor(device, header, length, reader)

    def deliver(self, header: TensorHeader, array: Array) -> None:
        """Take inputs or labels that this very peer feeds."""
        if self._work is not None and self._work.stamp.view == header.view:
            self._work.deliver(header, array)

    def lost(self, device: DeviceId, reason: str, *, sure: bool) -> None:
        """A member of the group is gone or its link broke: what was under way to it is lost."""
        plan = self.plan
        if self._admission is not None:
            self._admission.gone(device)
        helpers = () if self._work is None else self._work.helpers
        if plan is None or device not in (*plan.members, *helpers):
            return
        if not self.started:
            name = self._services.directory.name_of(device)
            self.fail(PeerLost(f"peer {name} ({device[:8]}) is gone: {reason}"))
            return
        self.recovery.noticed(reason)
        wait_s = limits.VIEW_WAIT_SURE_S if sure else limits.VIEW_WAIT_SILENT_S
        self.want(reason, after_s=wait_s)

    def ended(self, outcome: Outcome | None = None, reason: str = "") -> Ended | None:
        """That this run is over here, for whoever missed it; None: it never came to a plan.

        `outcome`: None where the run was finished.
        """
        plan, work = self.plan, self._work
        if plan is None:
            return None
        if outcome is None:
            outcome = "stopped" if work is not None and work.stopped else "complete"
        reason = reason[: limits.REASON_CHARACTERS_MAX]
        return Ended(run=plan.run, lineage=plan.lineage, outcome=outcome, reason=reason)

    async def wait_counted(self) -> None:
        """Wait until what is on the disk of an interrupted run is known, or the part is over."""
        await self._signal.wait_until(lambda: self._counted or self._is_over)

    async def waits_in_vain(self) -> bool:
        """Whether nobody goes on with a run that a restart interrupted, for RESTORED_WAIT_S.

        Nothing of such a run is in memory: it can go, and be taken up again.
        """
        if not self.is_restored:
            await trio.lowlevel.checkpoint()
            return False

        def goes_on() -> bool:
            passive = self.machine.standing.stance in (Stance.PAUSED, Stance.OUTSIDER)
            here = self._counted and not passive
            return here or self._is_over or self._work is not None

        with trio.move_on_after(limits.RESTORED_WAIT_S):
            await self._signal.wait_until(goes_on)
            return False
        return True

    @property
    def works(self) -> bool:
        """Whether the work of a view has begun here and enough members are there."""
        started = self._work is not None and self._work.started
        return started and self.machine.standing.stance is not Stance.PAUSED

    def leave(self) -> str | None:
        """Ask for a view without this device; why there can be none, or None. A run whose data
        stays here then waits for it.
        """
        plan, own = self.plan, self._services.device
        if plan is None or not self.started:
            return "the run has not begun"
        if len(plan.members) == 1:
            return "nobody else could take this peer's part over"
        self.want(f"{self._services.directory.name_of(own)} leaves", after_s=0.0)
        return why_waited_for(own, plan, self.state.contract)

    async def force(self) -> None:
        """Go on with whoever can be reached, as a lineage of its own (`--force-view`).

        Raises:
            PlanInfeasible: not even that is possible; the sentence says what is lacking.
        """
        view = await self._proposing.forced()
        self.history = {s: r for s, r in self.history.items() if s <= view.resume_step}
        if self.home is not None:
            self.home.progress.fall_back(view.resume_step)
        self.driver.call(RunMachine.force, view, self.driver.now())

    def safety(self) -> str:
        """Whether any one device may vanish without costing a committed step; else why not."""
        machine = self.machine
        return self.state.safety(machine.statistics().committed_step, len(machine.records))

    def arrived(self, device: DeviceId) -> None:
        """A device can be talked to; where it has no part in the run yet, it may get one."""
        if self._admission is not None:
            self._admission.arrived(device)

    def answered(self, device: DeviceId, answer: Profiled | Declined) -> None:
        """Take a newcomer's answer to the offer."""
        if self._admission is not None:
            self._admission.answered(device, answer)

    def offered(self, device: DeviceId, run: RunId) -> None:
        """A run is offered to this device, perhaps this one, which goes on without it then."""
        self._offered_by = device if run == self.state.run else None
        self._signal.notify()

    def want(self, reason: str, *, after_s: float) -> None:
        """Ask for a new view."""
        self.driver.call(RunMachine.want, reason, self.driver.now(), after_s=after_s)

    def reachable(self) -> None:
        """Who can be talked to has changed."""
        here = (self._services.device, *self._services.directory.linked())
        self.driver.call(RunMachine.reachable, frozenset(here), self.driver.now())

    def fail(self, error: P2PTrainError) -> None:
        """End the run on this device; the first reason stays."""
        if self.failure is None:
            self.failure = error
            if self._nursery is not None:
                self._nursery.cancel_scope.cancel()

    # What the machine says.

    def follow(self, event: object) -> None:
        """Act on one event of the machine."""
        match event:
            case StepCommitted(record=record):
                self._step_committed(record)
            case ViewDecided(view=view):
                self._view_decided(view)
            case ProposalWanted():
                self._start(self._proposing.propose, event)
            case Paused():
                self.paused = event
            case Unpaused():
                self.paused = None
            case Fenced():
                pass
        self._signal.notify()

    def _data_copied(self, job: Job, weights: Weights) -> None:
        """This device has the data now: it can feed the run when the present home peer cannot."""
        plan, view = self.plan, self.machine.view
        if plan is None:
            raise InvariantBroken("data was copied before there was a plan")
        begun = 0 if view is None else view.resume_step  # the machine's events may be on their way
        since = min(self.history, default=begun + 1) - 1
        self.home = later_session(self.state, plan, job, weights, since)
        for step in sorted(self.history):
            self.home.progress.step_committed(self.history[step], live=False)
        self.state.take_session(self.home)
        self.offer_weights()

    def _step_committed(self, record: StepRecord) -> None:
        self._remember(record, live=True)
        view, work = self.machine.view, self._work
        if work is not None and view is not None and work.stamp == stamp_of(view.plan):
            work.committed(record)
            self.recovery.committed()
            self._release()

    def _remember(self, record: StepRecord, *, live: bool) -> None:
        if record.step in self.history:
            return
        self.history[record.step] = record
        if self.home is not None:
            self.home.progress.step_committed(record, live=live)

    def _view_decided(self, view: View) -> None:
        if view.restoration is not None:
            for record in view.records:
                self._remember(record, live=False)
        self.recovery.decided()
        # The machine may know a later view by now, and that one's work have begun.
        newest = self.machine.view or view
        superseded = self._work is not None and self._work.stamp != stamp_of(newest.plan)
        if self._view_scope is not None and superseded:
            self._view_scope.cancel()

    def _newcomers(self) -> tuple[PeerProfile, ...]:
        return () if self._admission is None else self._admission.profiles

    def _replica_stored(self, saved: SegmentSaved) -> None:
        if self._work is not None:
            self._work.tell_replica(saved)

    def _release(self) -> None:
        """Logs and records that a whole replica set has made needless may go.

        Not between a promise and the work of the view that follows from it: what the promise told
        may be what that view needs.
        """
        work = self._work
        if self.machine.promised or work is None or not work.started:
            return
        step = self.state.release()
        if step is not None and step > self._released:
            self._released = step
            self.driver.call(RunMachine.forget_before, step)
            self._start(trio.to_thread.run_sync, self.state.forget_replicas, step)

    # Views.

    def _take_begin(self, device: DeviceId, begin: Begin) -> None:
        plan = self.founding
        if plan is None or device != plan.home or begin.stamp != stamp_of(plan):
            return
        if self._begin is None and self.machine.view is None:
            self._begin = begin
            self._signal.notify()

    async def _await_begin(self, by_s: float) -> None:
        """Wait for the home peer to begin the lineage, unless a later view is known.

        However long our own disk took: a home peer that never begins holds nobody longer.
        """
        plan = self.founding
        if plan is None:
            await trio.lowlevel.checkpoint()
            return
        with trio.move_on_at(by_s):
            await self._signal.wait_until(
                lambda: self._begin is not None or self.machine.view is not None
            )
        begin = self._begin
        if begin is None and self.machine.view is None:
            name = self._services.directory.name_of(plan.home)
            raise PeerLost(
                f"the home peer {name} did not begin the run within {BEGIN_WITHIN_S:.0f} s"
            )
        if begin is not None:
            await self.state.take_listing(plan.home, begin)
            view = first_view(plan, self.state.contract, begin)
            self.driver.call(RunMachine.found, view, self.driver.now())
            self.reachable()

    async def _await_next_view(self) -> None:
        """After a restart: vote, give what is on the disk, but do nothing in the present view."""
        view, own = self.machine.view, self._services.device
        if view is None:
            await trio.lowlevel.checkpoint()
            return
        self.state.enter(view)
        self.founding = None
        self.reachable()
        self._counted = True
        self._signal.notify()
        wait_s = math.inf if own in view.members else limits.KEEPS_ON_S
        if own in view.members:
            name = self._services.directory.name_of(own)
            self.want(f"{name} has restarted", after_s=limits.VIEW_WAIT_SILENT_S)
        with trio.move_on_after(wait_s):
            await self._signal.wait_until(
                lambda: goes_on_without(own, view, self.machine.view, self._offered_by)
            )

    async def _enter_newest(self) -> bool:
        """Work in the newest view until it ends; whether the run is finished with it."""
        entered = self._work
        await self._signal.wait_until(
            lambda: (
                self.machine.view is not None
                and (entered is None or stamp_of(self.machine.view.plan) != entered.stamp)
            )
        )
        view = self.machine.view
        if view is None or self._services.device not in (*view.members, *givers(view)):
            raise LeftOut("the run goes on without this peer")
        with trio.CancelScope() as self._view_scope:
            finished = await self._work_in(view)
            if self._services.device not in view.members:
                with trio.move_on_after(limits.KEEPS_ON_S):
                    await self._signal.wait_until(lambda: self.state.keeps_in_vain(view))
                raise LeftOut("this peer has handed over its part of the run")
            return finished
        return False

    async def _work_in(self, view: View) -> bool:
        self.state.enter(view)
        self._services.say_activity(activity(view.plan, self._services.device))
        if (meter := self._meter) is None:
            meter = self._services.open_meter(view.plan, view.contract.minibatch_size)
            self._meter = meter
        hooks = WorkHooks(
            complete=self._complete,
            told=lambda step: self.driver.call(RunMachine.told, step, plan=view.plan.digest),
            fail=self.fail,
            begun=self._begun,
            want=partial(self.want, after_s=0.0),
            promised=lambda: self.machine.promised,
        )
        work = ViewWork(
            view=view,
            state=self.state,
            hooks=hooks,
            home=self.home,
            meter=meter,
            clock=self.recovery,
        )
        self._work = work
        for device, message in self._early.take(work.stamp):
            self.receive(device, work.stamp, message)
        if admits(view, self._services.device):
            self._open_admission(view)
        if (absent := unreachable(view, self._services)) is not None:
            self.want(absent, after_s=limits.VIEW_WAIT_SILENT_S)
        try:
            await work.run()
        except* PeerLost as group:
            if not self.started:
                raise
            self.want(as_ours(group).message, after_s=limits.VIEW_WAIT_SILENT_S)
        else:
            return True
        finally:
            self._close_admission()
        await trio.sleep_forever()  # until the next view
        return False

    def _begun(self, view: View) -> None:
        self.recovery.ready()
        self._start(self.data.run, view)

    def _open_admission(self, view: View) -> None:
        self._admission = Admission(
            view=view,
            bundle=self.state.bundle,
            services=self._services,
            admit=partial(self.want, after_s=0.0),
        )
        self._admission.begin()
        self._start(self._admission.run)

    def _close_admission(self) -> None:
        if self._admission is not None:
            self._admission.close()
            self._admission = None

    def _complete(self, view: View, record: StepRecord) -> None:
        now, plan = self.driver.now(), view.plan.digest
        self.driver.call(RunMachine.complete, record, now, plan=plan)

    def _is_later(self, stamp: Stamp) -> bool:
        work = self._work
        here = (-1, -1) if work is None else (work.stamp.lineage, work.stamp.view)
        return (stamp.lineage, stamp.view) > here

    def _start(self, task: Callable[..., object], *args: object) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(task, *args)  # type: ignore[arg-type]  # an async function
