"""Runs on this peer: answer offers, take part in what was decided, found our own."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Awaitable, Callable

import trio

from p2ptrain import limits
from p2ptrain.agreement.run_messages import DecidedView, RunMessage, run_of
from p2ptrain.engine.contract import Array
from p2ptrain.errors import (
    ConfigError,
    Interrupted,
    InvariantBroken,
    P2PTrainError,
    PeerLost,
    error_class,
)
from p2ptrain.ids import DeviceId, RunId, short
from p2ptrain.planner.plan import Plan
from p2ptrain.runtime.compute.memory_release import release_memory
from p2ptrain.runtime.exchange.blobs import serve_blob
from p2ptrain.runtime.exchange.bodies import BodyReader, discard
from p2ptrain.runtime.exchange.foreign import SURVIVABLE, as_ours
from p2ptrain.runtime.keeping.holdings import nothing_held
from p2ptrain.runtime.planning.job import Job, new_run_id, open_job
from p2ptrain.runtime.planning.offers import OfferDesk, kept_s
from p2ptrain.runtime.reporting.plan_report import plan_report
from p2ptrain.runtime.reports import EnergyReport, NoteReport, PlanReport, TrainRequest, TrainResult
from p2ptrain.runtime.runs.ended_runs import EndedRuns
from p2ptrain.runtime.runs.expected import ExpectedPlan
from p2ptrain.runtime.runs.founding import Founding
from p2ptrain.runtime.runs.run_member import LeftOut, RunMember
from p2ptrain.runtime.runs.run_opening import RunOpener
from p2ptrain.runtime.runs.run_parts import Conduct, Part, RunStatistics, abort, may_be_over
from p2ptrain.runtime.services import Emit, Proposals, Services
from p2ptrain.runtime.signal import Signal
from p2ptrain.store.weights import open_weights
from p2ptrain.training.contract import Contract
from p2ptrain.training.messages import (
    Abort,
    BlobMissing,
    BlobRequest,
    Declined,
    Ended,
    HoldingsAsked,
    Offer,
    Profiled,
    Stamp,
    stamp_of,
)
from p2ptrain.wire.frames import TensorHeader


class RunService:
    """At most one run at a time; everything about runs arrives here.

    `run` owns the task of every run and transfer; they end with it.
    """

    def __init__(
        self,
        services: Services,
        *,
        proposals: Proposals,
        default_threads: Callable[[], int],
    ) -> None:
        self._services = services
        self._proposals = proposals
        self._default_threads = default_threads
        self._desk = OfferDesk(services)
        self._opener = RunOpener(services)
        self._conduct: Conduct | None = None
        self._part: Part | None = None
        self._expected = ExpectedPlan()
        self._ended = EndedRuns()
        self._changed = Signal()
        self._restored = trio.Event()
        self._aside = False
        """Whether an interrupted run has made room for one that a person asked for."""
        self._nursery: trio.Nursery | None = None
        self.last_failure: str | None = None
        self.last_energy: EnergyReport | None = None
        """Of the last run that this peer conducted, all its peers together."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._restore)
            task_status.started()
            await trio.sleep_forever()

    @property
    def current_run(self) -> RunId | None:
        """The run this peer is in, as home or as a member, or has promised itself to."""
        if self._part is not None:
            return self._part.member.state.run
        if self._conduct is not None:
            return self._conduct.founding.job.run
        return self._expected.run

    @property
    def member(self) -> RunMember | None:
        """This peer's part in the run it is in."""
        return None if self._part is None else self._part.member

    @property
    def plan_report(self) -> PlanReport | None:
        """The plan of the run this peer takes part in."""
        member = self.member
        plan = None if member is None else member.plan
        if member is None or plan is None:
            return None
        name_of = self._services.directory.name_of
        return plan_report(plan, member.state.contract, member.state.manifest, name_of)

    def statistics(self) -> RunStatistics:
        """What is held for runs now."""
        return RunStatistics(
            prepared_count=self._desk.prepared_count,
            taking_part=self._part is not None,
            conducting=self._conduct is not None,
        )

    async def train(self, request: TrainRequest, emit: Emit) -> TrainResult:
        """Conduct a run as its home peer.

        A cancellation abandons the session on every member; the last checkpoint stays.

        Raises:
            P2PTrainError: as `Founding.found` and `RunMember.run`; ConfigError when a run is in the
                way.
        """
        await self._wait_cleared()
        under_way = None if self._part is None else self._part.member
        if request.resume and under_way and under_way.state.run.startswith(request.resume):
            return await self._watch(under_way, request, emit)
        await self._make_room(emit)
        try:
            return await self._conduct_new(request, emit)
        finally:
            self._take_up_again()

    async def _conduct_new(self, request: TrainRequest, emit: Emit) -> TrainResult:
        self._refuse_when_busy()
        job = await trio.to_thread.run_sync(self._open_job, request)
        weights = await trio.to_thread.run_sync(open_weights, job.bundle)
        self._refuse_when_busy()
        view = max(job.view, self._proposals.next_view(job.run, job.lineage))
        founding = Founding(
            request=request,
            job=dataclasses.replace(job, view=view),
            weights=weights,
            services=self._services,
            proposals=self._proposals,
            emit=emit,
        )
        conduct = Conduct(founding, trio.CancelScope())
        self._conduct = conduct
        result = None
        try:
            result = await self._run_conduct(conduct)
            await self._changed.wait_until(lambda: self._part is None)
        finally:
            self._end_conduct(conduct, finished=result is not None)
        if result is None and conduct.failure is None:
            raise PeerLost(
                f"run {short(job.run)} goes on, or has ended, without this peer's data",
                hint="p2ptrain status on another member shows it",
            )
        if result is None:
            raise conduct.resumable()
        self.last_energy = result.energy
        return result

    async def _watch(self, member: RunMember, request: TrainRequest, emit: Emit) -> TrainResult:
        """Follow a run that is under way here to its end; who only watches may go at any time.

        Raises:
            ConfigError: this device does not have the run's data, so it cannot tell its result.
            PlanInfeasible: a view was to be forced, and cannot be.
            PeerLost: another member ended the run.
        """
        if request.force_view:
            await member.force()
        session = member.home
        if session is None:
            raise ConfigError(
                f"run {short(member.state.run)} goes on, but its data is not on this device",
                hint="p2ptrain status names the devices that have it: watch it there",
            )
        session.progress.watch(emit)
        part = self._part
        await self._changed.wait_until(lambda: self._part is None)
        if part is not None and part.failure is not None:
            raise part.failure
        if session.result is None:
            raise PeerLost("the run has ended elsewhere", hint="see p2ptrain status there")
        return session.result

    def stop(self) -> None:
        """End the run that this peer conducts after the step that has begun."""
        if self._conduct is not None:
            self._conduct.founding.stop()
        if self._part is not None:
            self._part.member.stop()

    async def leave(self) -> str | None:
        """Hand over this peer's part of a run; why that is impossible, or None.

        Waits until the others do without it, for ever if they cannot: the caller sets a limit.
        """
        part = self._part
        problem = None if part is None else part.member.leave()
        if problem is None:
            await self._changed.wait_until(lambda: self._part is None)
        return problem

    def receive(self, device: DeviceId, message: object) -> None:
        """Take a control message about runs or blobs."""
        try:
            self._receive(device, message)
        except SURVIVABLE as error:
            self._fail(as_ours(error))

    async def receive_tensor(
        self, device: DeviceId, header: TensorHeader, length: int, reader: BodyReader
    ) -> None:
        """Take a tensor frame; one of another run, view or plan is dropped."""
        part = self._part
        if part is None or part.member.state.run != header.run:
            await discard(reader, length)
            return
        await part.member.receive_tensor(device, header, length, reader)

    def deliver(self, header: TensorHeader, array: Array) -> None:
        """Take inputs or labels that this very peer feeds."""
        if self._part is not None and self._part.member.state.run == header.run:
            self._part.member.deliver(header, array)

    # What the agreement machine says (runtime.runs.ballots).

    def consider(self, plan: Plan, contract: Contract) -> str | None:
        """Why this peer cannot take the part a proposal gives it.

        None: it can, and from now on it is promised to this plan until that is decided or
        withdrawn, or the plan's home peer is gone.
        """
        busy_with = self.current_run
        if self._part is not None or busy_with not in (None, plan.run):
            return f"busy with run {short(busy_with or plan.run)}"
        reason = self._desk.refusal(plan, contract)
        if reason is None:
            self._expected.expect(plan)
        else:
            self._desk.over(plan)
        return reason

    def withdrawn(self, plan: Plan) -> None:
        """A proposal will not be decided: its engine may go."""
        self._expected.forget(plan)
        self._desk.over(plan)
        self._changed.notify()

    def decided(self, plan: Plan, contract: Contract) -> None:
        """All members agreed: begin our part, or say that it is too late."""
        early = self._expected.take(plan)
        conduct = self._conduct
        is_home = plan.home == self._services.device
        abandoned = is_home and (conduct is None or not conduct.founding.proposed(plan))
        late = abandoned or self._part is not None
        member = None if early is None or late else self._make_member(plan, contract)
        if member is None or early is None:
            name = self._services.directory.name_of(self._services.device)
            self._abort(plan, PeerLost(f"{name} is not ready for this run any more"))
            return
        if is_home and conduct is not None:
            conduct.member = member
            conduct.founding.decided(plan)
        self._begin_part(member)
        for device, message in early:
            self.receive(device, message)

    def proposal_failed(self, plan: Plan, reason: str, devices: tuple[DeviceId, ...]) -> None:
        """A proposal of this peer was not agreed."""
        for device in devices:
            reason = reason.replace(short(device), self._services.directory.name_of(device))
        if self._conduct is not None and self._conduct.founding.proposed(plan):
            self._conduct.founding.refused(reason)

    # What membership and links say.

    def peer_down(self, device: DeviceId, reason: str, *, sure: bool = False) -> None:
        """A link broke or a member is gone; a run that trains goes on without it.

        `sure`: it is known to be gone, not only silent.
        """
        self._services.blobs.peer_down(device)
        self._expected.home_down(device)
        self._desk.home_down(device)
        self._changed.notify()
        if self._conduct is not None:
            self._conduct.founding.peer_down(device)
        if self._part is not None:
            self._part.member.reachable()
            name = self._services.directory.name_of(device)
            self._part.member.lost(device, f"{name} is gone: {reason}", sure=sure)

    def peer_up(self, device: DeviceId) -> None:
        """A device of the group can be talked to."""
        if self._part is not None:
            self._part.member.reachable()
            self._part.member.arrived(device)

    def _receive(self, device: DeviceId, message: object) -> None:
        match message:
            case Offer():
                self._ended.goes_on(message.run)
                self._start(self._answer_offer, device, message, self.current_run)
            case BlobRequest():
                self._start(serve_blob, self._services.blobs, device, message)
            case Ended():
                self._end_told(device, message)
            case BlobMissing():
                self._services.blobs.missing(device, message)
            case Profiled() | Declined():
                conduct, part = self._conduct, self._part
                if part is not None and part.member.state.run == message.run:
                    part.member.answered(device, message)
                elif conduct is not None and conduct.founding.job.run == message.run:
                    conduct.founding.receive(device, message)
            case _:
                self._receive_stamped(device, message)

    def _receive_stamped(self, device: DeviceId, message: object) -> None:
        stamp = getattr(message, "stamp", None)
        if not isinstance(stamp, Stamp) or self._expected.keep(device, stamp, message):
            return
        part = self._part
        if part is None or part.member.state.run != stamp.run:
            if isinstance(message, HoldingsAsked):
                self._start(self._tell_kept, device, message)
            return
        if isinstance(message, Abort):
            plan = part.member.plan
            if plan is not None and device in plan.members and stamp == stamp_of(plan):
                self._aborted(device, message)
            return
        part.member.receive(device, stamp, message)

    async def receive_agreement(self, device: DeviceId, message: RunMessage) -> None:
        """Take a message of a run's machine; waits while that one's inbox is full."""
        part = self._part
        if part is not None and part.member.state.run == run_of(message):
            await part.member.driver.deliver(device, message)
            return
        ended = self._ended.answer_to(message)
        if ended is not None:
            self._send(device, ended)
        elif isinstance(message, DecidedView) and part is None:
            self._joined(message)
        await trio.lowlevel.checkpoint()

    def _joined(self, message: DecidedView) -> None:
        """A view with this device in it was decided: it was offered the run, and begins."""
        view = message.value
        prepared = self._desk.prepared(view.run)
        if prepared is not None and self._services.device in view.members and not self._conduct:
            self._begin_part(self._opener.joined(view, prepared))

    async def _restore(self) -> None:
        """Take up our part in a run that the end of our last process interrupted."""
        await self._changed.wait_until(lambda: self.current_run is None)
        await trio.to_thread.run_sync(self._ended.load, self._services.runs_path)
        found = await trio.to_thread.run_sync(self._opener.interrupted)
        if found is not None and self.current_run is None:
            self._begin_part(self._opener.restored(found))
        self._restored.set()

    async def _tell_kept(self, device: DeviceId, asked: HoldingsAsked) -> None:
        """A run that went on without us lacks a state: if we keep it, be there to give it."""
        found = await trio.to_thread.run_sync(self._opener.left, asked.stamp)
        if found is not None and self.current_run is None:
            self._begin_part(self._opener.restored(found))
        part = self._part
        if part is None or part.member.state.run != asked.stamp.run:
            self._send(device, nothing_held(asked))
            return
        await part.member.wait_counted()
        part.member.receive(device, asked.stamp, asked)

    async def _make_room(self, emit: Emit) -> None:
        """An interrupted run that nobody goes on with lets another one pass; it stays on disk."""
        part = self._part
        if part is None or self._conduct is not None or not await part.member.waits_in_vain():
            return
        if self._part is part and self._conduct is None:
            run = short(part.member.state.run)
            text = f"run {run} was interrupted and lacks members: it is left on the disk meanwhile"
            emit("note", NoteReport(text=text))
            self._aside = True
            part.scope.cancel()
            await self._wait_cleared()

    def _take_up_again(self) -> None:
        if self._aside:
            self._aside = False
            with contextlib.suppress(RuntimeError):  # the service has ended meanwhile
                self._start(self._restore)

    def _make_member(self, plan: Plan, contract: Contract) -> RunMember | None:
        """Our part in a plan that begins; None when what it needs is not there any more."""
        conduct = self._conduct if plan.home == self._services.device else None
        founding = None if conduct is None else conduct.founding
        return self._opener.founded(plan, contract, self._desk.prepared(plan.run), founding)

    def _begin_part(self, member: RunMember) -> None:
        self._part = Part(member, trio.CancelScope())
        self.last_failure = None
        member.offer_weights()
        self._start(self._take_part, self._part)

    async def _run_conduct(self, conduct: Conduct) -> TrainResult | None:
        """The result, or None when the session failed or was told to end."""
        result: TrainResult | None = None
        try:
            async with conduct.held(self._changed):
                await conduct.founding.found()
                member = conduct.member
                if member is None or member.home is None:
                    raise InvariantBroken("a run was founded without this peer")
                session = member.home
                await self._changed.wait_until(
                    lambda: session.result is not None or self._part is None
                )
                result = session.result
        except* SURVIVABLE as group:
            self._fail(as_ours(group))
        finally:
            self._changed.notify()
        return result

    def _end_conduct(self, conduct: Conduct, *, finished: bool) -> None:
        """A session that did not finish is over on every member when whoever asked has left."""
        self._conduct = None
        error = conduct.failure or Interrupted("its home peer ended the run")
        conduct.founding.close(error.message)
        if self._part is not None and not finished:
            self._fail(error)
        self._desk.forget(conduct.founding.job.run)
        self._changed.notify()

    async def _take_part(self, part: Part) -> None:
        """Take part in a run to its end; where it is over for everybody, nothing of it stays."""
        member = part.member
        try:
            await self._run_part(part)
            if part.ended is not None:
                self._ended.note(part.ended)
                with contextlib.suppress(OSError):
                    await trio.to_thread.run_sync(member.state.forget, part.ended)
        finally:
            plan = member.plan
            self._part = None
            if plan is not None:
                self._desk.over(plan)
            self._start(self._release)
            self._services.say_activity("idle")
            self._changed.notify()

    async def _run_part(self, part: Part) -> None:
        member = part.member
        try:
            with part.scope:
                await member.run()
            if member.failure is not None:
                self._fail(member.failure)
            elif not part.scope.cancelled_caught:
                part.ended = member.ended()
        except* LeftOut as left:
            self._left(part, as_ours(left))
        except* SURVIVABLE as group:
            self._fail(as_ours(group))
        if part.failure is not None:
            part.ended = member.ended("failed", part.failure.message)

    def _left(self, part: Part, error: P2PTrainError) -> None:
        """The run goes on without this peer; whoever watches it here is told."""
        self.last_failure = error.message
        if self._conduct is not None and self._conduct.failure is None:
            self._conduct.failure = error
            self._conduct.scope.cancel()

    async def _release(self) -> None:
        """Give the memory of a finished run back, unless the next one has begun."""
        if self._part is None:
            await trio.to_thread.run_sync(release_memory)

    def _aborted(self, device: DeviceId, message: Abort) -> None:
        name = self._services.directory.name_of(device)
        reason = message.reason[: limits.REASON_CHARACTERS_MAX]
        self._fail(error_class(message.error)(reason), told_by=name)

    def _end_told(self, device: DeviceId, message: Ended) -> None:
        """The run that we are in ended while we could not hear it."""
        part = self._part
        if part is None or not part.ends_with(device, message):
            return
        part.ended = message
        part.scope.cancel()
        self._left(part, PeerLost(message.reason or "the run has ended without this peer"))

    def _fail(self, error: P2PTrainError, *, told_by: str | None = None) -> None:
        """End the current run on this device; what comes after the first reason changes nothing.

        The others are told, unless they told us; the home peer repeats it to all.
        """
        conduct, part = self._conduct, self._part
        sentence = error.message if told_by is None else f"{error.message} ({told_by})"
        if conduct is not None and conduct.failure is None:
            conduct.failure = error
            conduct.scope.cancel()
            self.last_failure = sentence
        if part is not None and part.failure is None:
            part.failure = error
            part.scope.cancel()
            self.last_failure = sentence
            plan = part.member.plan
            if plan is not None and (told_by is None or plan.home == self._services.device):
                self._abort(plan, error)

    def _abort(self, plan: Plan, error: P2PTrainError) -> None:
        """Tell all members that the run cannot go on."""
        message = abort(plan, error)
        for device in plan.members:
            if device != self._services.device:
                self._send(device, message)

    def _send(self, device: DeviceId, message: object) -> None:
        with contextlib.suppress(PeerLost):
            self._services.outlet.send(device, message)

    async def _answer_offer(self, device: DeviceId, offer: Offer, busy_with: RunId | None) -> None:
        """Answer; an engine that no decision claims in time is closed.

        Who asks may have let go of a run before we have.
        """
        if not self._restored.is_set():
            await self._restored.wait()
            busy_with = self.current_run
        await self._wait_cleared()
        if busy_with is not None:
            if self._part is not None:
                self._part.member.offered(device, offer.run)
            with trio.move_on_after(limits.OFFER_TIMEOUT_S / 2):
                await self._changed.wait_until(lambda: not self._may_be_over(device, offer.run))
            busy_with = self.current_run
        await self._desk.answer(device, offer, busy_with)
        await trio.sleep(kept_s(offer))
        self._desk.expire(offer)

    def _may_be_over(self, device: DeviceId, run: RunId) -> bool:
        """Whether what we are busy with may be over for a device that offers a run: what is only
        promised is begun or withdrawn within moments."""
        if self._part is not None:
            return may_be_over(self._part, device, run)
        return self._conduct is None and self._expected.run not in (None, run)

    def _open_job(self, request: TrainRequest) -> Job:
        return open_job(
            request, runs_path=self._services.runs_path, new_run=new_run_id(),
            default_threads=self._default_threads(),
        )  # fmt: skip

    async def _wait_cleared(self) -> None:
        """A run that has to end may still be in a thread, on the disk or a promise to ourselves."""

        def cleared() -> bool:
            conduct, own = self._conduct, self._expected.home == self._services.device
            ending = own if conduct is None else conduct.is_ending
            return not ending and (self._part is None or not self._part.is_ending)

        await self._restored.wait()
        await self._changed.wait_until(cleared)

    def _refuse_when_busy(self) -> None:
        if self.current_run is not None:
            raise ConfigError(
                f"this peer is busy with run {short(self.current_run)}",
                hint="wait for it, or stop it with Ctrl-C where it was started",
            )

    def _start(self, task: Callable[..., Awaitable[None]], *args: object) -> None:
        if self._nursery is None:
            raise InvariantBroken("the run service is not running")
        self._nursery.start_soon(task, *args)
