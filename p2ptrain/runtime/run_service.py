"""Runs on this peer: answer offers, take part in what was decided, conduct our own."""

from __future__ import annotations

import base64
import contextlib
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from p2ptrain.engine.contract import Array
from p2ptrain.errors import (
    ConfigError,
    Interrupted,
    InvariantBroken,
    NumericsError,
    P2PTrainError,
    PeerLost,
    error_class,
    first_error,
)
from p2ptrain.ids import DeviceId, RunId, short
from p2ptrain.planner.plan import Plan
from p2ptrain.runtime.coordinator import Coordinator
from p2ptrain.runtime.inbox import BodyReader, discard
from p2ptrain.runtime.job import Job, open_job
from p2ptrain.runtime.member_run import MemberRun
from p2ptrain.runtime.offers import OfferDesk
from p2ptrain.runtime.reports import EnergyReport, TrainRequest, TrainResult
from p2ptrain.runtime.services import Emit, Services
from p2ptrain.runtime.signal import Signal
from p2ptrain.training.contract import Contract
from p2ptrain.training.messages import (
    Abort,
    BlobMissing,
    BlobRequest,
    Declined,
    Offer,
    Profiled,
    Stamp,
    stamp_of,
)
from p2ptrain.wire.frames import TensorHeader


@dataclass(slots=True)
class _Part:
    """What this device does in a decided plan; without a member it only holds the data."""

    plan: Plan
    member: MemberRun | None
    scope: trio.CancelScope


@dataclass(slots=True)
class _Conduct:
    """The run that this peer conducts, and why it had to end."""

    coordinator: Coordinator
    scope: trio.CancelScope
    failure: P2PTrainError | None = None


class RunService:
    """At most one run at a time; everything about runs arrives here.

    `run` owns the task of every run and transfer; they end with it.
    """

    def __init__(
        self,
        services: Services,
        *,
        propose: Callable[[Plan, Contract], None],
        default_threads: Callable[[], int],
    ) -> None:
        self._services = services
        self._propose = propose
        self._default_threads = default_threads
        self._desk = OfferDesk(services)
        self._conduct: _Conduct | None = None
        self._part: _Part | None = None
        self._changed = Signal()
        self._nursery: trio.Nursery | None = None
        self.last_failure: str | None = None
        self.last_energy: EnergyReport | None = None
        """Of the last run that this peer conducted, all its peers together."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    @property
    def current_run(self) -> RunId | None:
        """The run this peer is in, as home or as a stage."""
        if self._part is not None:
            return self._part.plan.run
        return None if self._conduct is None else self._conduct.coordinator.job.run

    async def train(self, request: TrainRequest, emit: Emit) -> TrainResult:
        """Conduct a run as its home peer.

        A cancellation abandons the session on every member; the last checkpoint stays.

        Raises:
            P2PTrainError: as `Coordinator.conduct`; ConfigError when a run is in the way.
        """
        self._refuse_when_busy()
        job = await trio.to_thread.run_sync(self._open_job, request)
        self._refuse_when_busy()
        coordinator = Coordinator(
            request=request,
            job=job,
            services=self._services,
            propose=self._propose,
            emit=emit,
        )
        conduct = _Conduct(coordinator, trio.CancelScope())
        self._conduct = conduct
        try:
            result = await self._run_conduct(conduct)
            self.last_energy = result.energy
            if self._part is not None and self._part.member is None:
                self._part.scope.cancel()  # without a stage of our own nothing is left to do
            await self._changed.wait_until(lambda: self._part is None)
            return result
        finally:
            self._end_conduct(conduct)

    def stop(self) -> None:
        """End the run that this peer conducts after the step that has begun."""
        if self._conduct is not None:
            self._conduct.coordinator.stop()

    def receive(self, device: DeviceId, message: object) -> None:
        """Take a control message about runs or blobs."""
        try:
            self._receive(device, message)
        except P2PTrainError as error:
            self._fail(error)

    async def receive_tensor(
        self, device: DeviceId, header: TensorHeader, length: int, reader: BodyReader
    ) -> None:
        """Take a tensor frame; one of another run, view or plan is dropped."""
        part = self._part_of(_header_stamp(header))
        if part is None or part.member is None or device not in part.plan.members:
            await discard(reader, length)
            return
        await part.member.receive_tensor(header, length, reader)

    def deliver(self, header: TensorHeader, array: Array) -> None:
        """Take inputs or labels that this very peer feeds."""
        part = self._part_of(_header_stamp(header))
        if part is not None and part.member is not None:
            part.member.deliver(header, array)

    def refusal(self, plan: Plan, contract: Contract) -> str | None:
        """Why this peer cannot take the part a proposal gives it; None when it can."""
        if self._part is not None:
            return f"busy with run {self._part.plan.run[:8]}"
        return self._desk.refusal(plan, contract)

    def decided(self, plan: Plan, contract: Contract) -> None:
        """All members agreed: begin our part."""
        if self._part is not None:
            raise InvariantBroken("a second run was decided on a busy peer")
        member = None
        if plan.stage_of(self._services.device) is not None:
            bundle, engine = self._desk.prepared(plan.run)
            member = MemberRun(
                plan=plan,
                contract=contract,
                bundle=bundle,
                engine=engine,
                services=self._services,
            )
        self._part = _Part(plan, member, trio.CancelScope())
        self._start(self._take_part, self._part)
        if self._conduct is not None:
            self._conduct.coordinator.decided(plan)

    def proposal_failed(self, reason: str) -> None:
        """Our proposal was not agreed."""
        if self._conduct is not None:
            self._conduct.coordinator.refused(reason)

    def peer_down(self, device: DeviceId, reason: str) -> None:
        """A member of the group is gone; a run it takes part in ends here and now."""
        self._services.blobs.peer_down(device)
        if self._conduct is not None:
            self._conduct.coordinator.peer_down(device)
        if self._part is not None and device in self._part.plan.members:
            name = self._services.directory.name_of(device)
            self._fail(PeerLost(f"peer {name} ({short(device)}) is gone: {reason}"))

    def _receive(self, device: DeviceId, message: object) -> None:
        match message:
            case Offer():
                self._start(self._desk.answer, device, message, self.current_run)
            case BlobRequest():
                self._start(self._serve_blob, device, message)
            case BlobMissing():
                self._services.blobs.missing(device, message)
            case Profiled() | Declined():
                conduct = self._conduct
                if conduct is not None and conduct.coordinator.job.run == message.run:
                    conduct.coordinator.receive(device, message)
            case Abort():
                self._aborted(device, message)
            case _:
                self._receive_stamped(device, message)

    def _receive_stamped(self, device: DeviceId, message: object) -> None:
        stamp = getattr(message, "stamp", None)
        part = self._part_of(stamp) if isinstance(stamp, Stamp) else None
        if part is None or device not in part.plan.members:
            return
        if part.member is not None:
            part.member.receive(device, message)
        if self._conduct is not None and part.plan.home == self._services.device:
            self._conduct.coordinator.receive(device, message)

    async def _run_conduct(self, conduct: _Conduct) -> TrainResult:
        result: TrainResult | None = None
        try:
            with conduct.scope:
                result = await conduct.coordinator.conduct()
        except* P2PTrainError as group:
            self._fail(first_error(group))
        if result is not None:
            return result
        raise self._with_run(conduct.failure or Interrupted("the run was cancelled"), conduct)

    def _end_conduct(self, conduct: _Conduct) -> None:
        """Whatever happened, nothing of the run goes on when its home peer has left it."""
        self._conduct = None
        if self._part is not None:
            self._abort_part(Interrupted("its home peer ended the run"))
        self._desk.forget(conduct.coordinator.job.run)

    async def _take_part(self, part: _Part) -> None:
        """Run our stage to its end; a home peer without one waits for the session to end."""
        try:
            with part.scope:
                if part.member is None:
                    await self._changed.wait_until(lambda: self._conduct is None)
                else:
                    await part.member.run()
        except* P2PTrainError as group:
            self._fail(first_error(group))
        finally:
            if self._part is part:
                self._part = None
            self._desk.forget(part.plan.run)
            self._changed.notify()

    def _aborted(self, device: DeviceId, message: Abort) -> None:
        part = self._part_of(message.stamp)
        if part is None or device not in part.plan.members:
            return
        name = self._services.directory.name_of(device)
        error = error_class(message.error)(message.reason)
        self._fail(error, told_by=name)

    def _fail(self, error: P2PTrainError, *, told_by: str | None = None) -> None:
        """End the current run on this device, and tell the others unless they told us."""
        self.last_failure = error.message if told_by is None else f"{error.message} ({told_by})"
        if self._conduct is not None and self._conduct.failure is None:
            self._conduct.failure = error
            self._conduct.scope.cancel()
        if told_by is None or (self._conduct is not None and self._part is not None):
            self._abort_part(error)
        elif self._part is not None:
            self._part.scope.cancel()

    def _abort_part(self, error: P2PTrainError) -> None:
        part = self._part
        if part is None or part.scope.cancel_called:
            return
        part.scope.cancel()
        message = Abort(stamp=stamp_of(part.plan), error=type(error).__name__, reason=error.message)
        for device in part.plan.members:
            if device != self._services.device:
                with contextlib.suppress(PeerLost):
                    self._services.outlet.send(device, message)

    def _with_run(self, error: P2PTrainError, conduct: _Conduct) -> P2PTrainError:
        """Say which run can be resumed, where a checkpoint of it exists."""
        job = conduct.coordinator.job
        if isinstance(error, PeerLost | NumericsError) and job.directory.checkpoint_steps():
            step = job.directory.checkpoint_steps()[-1]
            error.hint = f"go on from step {step} with: --resume {short(job.run)}"
        return error

    async def _serve_blob(self, device: DeviceId, request: BlobRequest) -> None:
        with contextlib.suppress(PeerLost):
            await self._services.blobs.serve(device, request)

    def _open_job(self, request: TrainRequest) -> Job:
        return open_job(
            request,
            runs_path=self._services.runs_path,
            new_run=new_run_id(),
            default_threads=self._default_threads(),
        )

    def _part_of(self, stamp: Stamp) -> _Part | None:
        part = self._part
        return part if part is not None and stamp_of(part.plan) == stamp else None

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


def new_run_id() -> RunId:
    """26 random base32 characters: 128 bits and more."""
    return RunId(base64.b32encode(secrets.token_bytes(17)).decode().lower()[:26])


def _header_stamp(header: TensorHeader) -> Stamp:
    return Stamp(run=header.run, lineage=header.lineage, view=header.view, plan=header.plan)
