"""The home peer's duty in one view: feed, watch, collect checkpoints, end the run.

Whichever member the view names does this: it has the data, commands nobody, and may be replaced
by the next view like any other.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import trio

from p2ptrain.agreement.view import View
from p2ptrain.errors import CheckpointError, InvariantBroken, PeerLost
from p2ptrain.ids import DeviceId
from p2ptrain.runtime.home.checkpoints import CheckpointCollector
from p2ptrain.runtime.home.feeder import Feeder
from p2ptrain.runtime.home.own_feeder import OwnFeeder
from p2ptrain.runtime.home.progress import ProgressTracker
from p2ptrain.runtime.home.trained_model import write_trained_model, write_trained_safetensors
from p2ptrain.runtime.home.trained_weights import TrainedRun
from p2ptrain.runtime.planning.job import Job
from p2ptrain.runtime.reports import TrainResult
from p2ptrain.runtime.services import Services
from p2ptrain.runtime.signal import Signal
from p2ptrain.store.runs import CheckpointRecord, RunDirectory
from p2ptrain.store.weights import Weights
from p2ptrain.training.messages import (
    Ended,
    Evaluated,
    Finish,
    Outcome,
    SegmentSaved,
    StopAfter,
    Usage,
    stamp_of,
)
from p2ptrain.training.program import Program
from p2ptrain.training.segment_state import state_digest


class HomeSession:
    """What the home peer keeps of a run across its views."""

    def __init__(
        self,
        *,
        job: Job,
        weights: Weights,
        progress: ProgressTracker,
        out: Path | None = None,
        safetensors: Path | None = None,
    ) -> None:
        self.job, self.weights, self.progress = job, weights, progress
        self.out, self.safetensors = out, safetensors
        self.latest: CheckpointRecord | None = job.checkpoint
        self.stopping = False
        self.started_s = time.monotonic()
        self.result: TrainResult | None = None


class HomeDuty:
    """Conducts one view from the moment when all members are ready."""

    def __init__(
        self,
        *,
        session: HomeSession,
        view: View,
        program: Program,
        services: Services,
        signal: Signal,
        feeder: OwnFeeder | None = None,
    ) -> None:
        """`feeder`: of `program`, where peers feed their own data; None: this one feeds all."""
        self._session, self._view, self._plan = session, view, view.plan
        self._program, self._services, self._signal = program, services, signal
        session.progress.begin_view(view.plan)
        self._feeder: Feeder | OwnFeeder = feeder or Feeder(
            job=session.job,
            plan=view.plan,
            contract=view.contract,
            program=program,
            outlet=services.outlet,
            signal=signal,
            completed=lambda: session.progress.completed_items,
        )
        self._collector = CheckpointCollector(
            job=session.job,
            plan=view.plan,
            contract=view.contract,
            services=services,
            signal=signal,
        )

    async def run(self) -> None:
        """Feed until the program ends and everything is stored, then tell all to finish.

        Cancelled (by the next view): what is stored stays, the session goes on elsewhere or here.

        Raises:
            DataError, CheckpointError: the data or the disk refuses; the run ends everywhere.
            PeerLost: a member is gone; the view changes.
        """
        if self._session.stopping:
            self.stop()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._collector.run)
            await self._feeder.run()
            await self._signal.wait_until(self._all_stored)
            nursery.cancel_scope.cancel()
        await self._finish()

    def receive(self, device: DeviceId, message: SegmentSaved | Evaluated | Usage) -> None:
        """Take what stages report to the home peer.

        Raises:
            RemoteProtocolError: a segment that the plan does not give to that device.
            NumericsError: the held-out loss is not finite; the session ends.
        """
        match message:
            case SegmentSaved():
                self._collector.announce(device, message)
            case Evaluated() | Usage():
                self._session.progress.receive(device, message)

    def stop(self) -> None:
        """End the session after the step that has begun."""
        self._session.stopping = True
        step = self._feeder.last_step_begun
        self._program.stop_after(step)
        for device in self._plan.members:
            with contextlib.suppress(PeerLost):  # then the view changes, and says it again
                self._services.outlet.send(device, StopAfter(stamp=stamp_of(self._plan), step=step))
        self._signal.notify()

    def _all_stored(self) -> bool:
        latest = self._collector.latest
        stored = -1 if latest is None else latest.step
        progress = self._session.progress
        return progress.evaluated_at == self._program.step and stored >= self._program.step

    async def _finish(self) -> None:
        session, latest = self._session, self._collector.latest
        if latest is None:
            raise InvariantBroken("a run finished without a checkpoint")
        model_path = None if self._program.stopped else self._model_path()
        if model_path is not None:
            await trio.to_thread.run_sync(self._write_model, model_path, latest)
        session.result = session.progress.result(
            seconds=time.monotonic() - session.started_s,
            state_digest=state_digest(saved.state for saved in latest.segments),
            model_path=model_path,
            stopped=self._program.stopped,
        )
        await trio.to_thread.run_sync(note_end, session.job.directory, self._ended())
        for device in self._plan.members:
            with contextlib.suppress(PeerLost):
                self._services.outlet.send(device, Finish(stamp=stamp_of(self._plan)))

    def _ended(self) -> Ended:
        outcome: Outcome = "stopped" if self._program.stopped else "complete"
        return Ended(run=self._view.run, lineage=self._view.lineage, outcome=outcome)

    def _model_path(self) -> Path:
        return self._session.out or self._session.job.directory.model_path

    def _write_model(self, path: Path, checkpoint: CheckpointRecord) -> None:
        run = TrainedRun(
            bundle=self._session.job.bundle,
            weights=self._session.weights,
            contract=self._view.contract,
            directory=self._session.job.directory,
            checkpoint=checkpoint,
        )
        write_trained_model(path, run)
        if self._session.safetensors is not None:
            write_trained_safetensors(self._session.safetensors, run)


def note_end(directory: RunDirectory, ended: Ended) -> None:
    """Write down that a run which is written down is over; blocking.

    A disk that refuses costs nothing but that a restart takes the run up, and is told its end.
    """
    if directory.exists():
        with contextlib.suppress(CheckpointError):
            directory.write_ended(ended)
