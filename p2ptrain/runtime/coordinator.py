"""The home peer's conduct of one run: ask who can, plan, agree, feed, watch, store, report.

The home peer owns the data; it does not command. What it proposes is decided by its members
(agreement), what happens in a step follows from the contract on every peer alike (program), and
whoever notices that the run cannot go on says so to all.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import trio

from p2ptrain import limits
from p2ptrain.errors import Interrupted, InvariantBroken, PeerLost, PlanInfeasible
from p2ptrain.ids import DeviceId, Digest
from p2ptrain.planner.plan import Plan
from p2ptrain.planner.profile import PeerProfile
from p2ptrain.runtime.checkpoints import CheckpointCollector
from p2ptrain.runtime.feeder import Feeder
from p2ptrain.runtime.job import Job
from p2ptrain.runtime.member_run import checkpoint_listing
from p2ptrain.runtime.placement import place
from p2ptrain.runtime.plan_report import plan_report
from p2ptrain.runtime.progress import ProgressTracker
from p2ptrain.runtime.reports import NoteReport, TrainRequest, TrainResult
from p2ptrain.runtime.services import Emit, Proposals, Services
from p2ptrain.runtime.signal import Signal
from p2ptrain.runtime.stage_weights import prepare_timeout_s
from p2ptrain.runtime.trained_model import write_trained_model, write_trained_safetensors
from p2ptrain.runtime.trained_weights import TrainedRun
from p2ptrain.store.bundles import Bundle
from p2ptrain.store.runs import CheckpointRecord
from p2ptrain.store.weights import Weights, keep_weights, needed_weights
from p2ptrain.training.contract import Contract
from p2ptrain.training.messages import (
    Begin,
    Declined,
    Done,
    Evaluated,
    Finish,
    Go,
    Offer,
    Profiled,
    Ready,
    SegmentSaved,
    StopAfter,
    Usage,
    stamp_of,
)
from p2ptrain.training.program import Program
from p2ptrain.training.safetensors import raw_bytes
from p2ptrain.training.segment_state import state_digest


class Coordinator:
    """One session of a run, from the request to the result."""

    def __init__(
        self,
        *,
        request: TrainRequest,
        job: Job,
        weights: Weights,
        services: Services,
        proposals: Proposals,
        emit: Emit,
    ) -> None:
        self._request, self.job, self._services = request, job, services
        self.weights = weights
        self._proposals, self._emit = proposals, emit
        self._signal = Signal()
        self._answers: dict[DeviceId, Profiled | Declined | None] = {}
        self._ready: set[DeviceId] = set()
        self._decided = self._stopping = False
        self._refusal: str | None = None
        self._published: list[Digest] = []
        self.plan: Plan | None = None
        self._contract: Contract = job.contract
        self._program: Program | None = None
        self._feeder: Feeder | None = None
        self._progress: ProgressTracker | None = None
        self._collector: CheckpointCollector | None = None

    async def conduct(self) -> TrainResult:
        """Run the session to its end.

        Cancelling it ends the session for this device; the caller tells the members.

        Raises:
            PlanInfeasible: nobody can, or the members refused; nothing was trained.
            Interrupted: stopped before the first step.
            PeerLost, NumericsError, CheckpointError: the session ended; resume goes on from the
                last checkpoint.
        """
        started_s = time.monotonic()
        for note in self.job.data_notes:
            self._note(note)
        profiles = await self._collect_profiles()
        placement = await trio.to_thread.run_sync(
            lambda: place(self._request, self.job, profiles, home=self._services.device)
        )
        for left in placement.left_out:
            name = self._services.directory.name_of(left.device)
            self._note(f"{name} has no stage: {left.reason}")
        plan, contract = placement.plan, placement.contract
        await self._agree(plan, contract)
        await trio.to_thread.run_sync(self._write_run, contract)
        manifest, name_of = self.job.bundle.manifest, self._services.directory.name_of
        self._emit("plan", plan_report(plan, contract, manifest, name_of))
        await self._begin(plan)
        await self._train(plan)
        return await self._finish(plan, started_s)

    def receive(self, device: DeviceId, message: object) -> None:
        """Take a control message addressed to the run's home peer."""
        match message:
            case Profiled() | Declined() if device in self._answers:
                self._answers[device] = self._checked(device, message)
            case Ready():
                self._ready.add(device)
            case Done() | Evaluated() | Usage() if self._progress is not None:
                self._progress.receive(device, message)
            case SegmentSaved() if self._collector is not None:
                self._collector.announce(device, message)
        self._signal.notify()

    def close(self, reason: str) -> None:
        """The session is over, however it ended: offer nothing more to anybody."""
        self._withdraw_blobs()
        if self.plan is not None and not self._decided:
            self._proposals.withdraw(self.plan.digest, reason)

    def proposed(self, plan: Plan) -> bool:
        """Whether this is the plan that this session has asked its members about."""
        return self.plan is not None and plan.digest == self.plan.digest

    def decided(self, plan: Plan) -> None:
        """The members agreed on a plan; ours, if it is the one we proposed."""
        self._decided = self.proposed(plan)
        self._signal.notify()

    def refused(self, reason: str) -> None:
        """The members did not agree."""
        self._refusal = reason
        self._signal.notify()

    def peer_down(self, device: DeviceId) -> None:
        """A member is gone: do not wait for its answer."""
        if self._answers.get(device, True) is None:
            gone = Declined(run=self.job.run, view=self.job.view, reason="it went away")
            self._answers[device] = gone
            self._signal.notify()

    def stop(self) -> None:
        """End the session after the step that has begun."""
        self._stopping = True
        if self._program is not None and self._feeder is not None and self.plan is not None:
            step = self._feeder.last_step_begun
            self._program.stop_after(step)
            for stage in self.plan.stages:
                stop = StopAfter(stamp=stamp_of(self.plan), step=step)
                with contextlib.suppress(PeerLost):  # then the run ends by itself
                    self._services.outlet.send(stage.device, stop)
        self._signal.notify()

    async def _collect_profiles(self) -> dict[DeviceId, PeerProfile]:
        """Offer the run to every member; who measured itself, by device."""
        bundle = self.job.bundle
        blobs = [bundle.manifest_bytes, *_graphs(bundle).values()]
        for content in blobs:
            self._publish(content)
        offer = Offer(
            run=self.job.run,
            view=self.job.view,
            bundle=bundle.digest,
            bundle_bytes=len(blobs[0]),
            microbatch_size=self._contract.microbatch_size,
            form=self._contract.form,
            threads=self._contract.threads,
        )
        members = [record.device for record in self._services.directory.alive()]
        self._answers = dict.fromkeys(members)
        for device in members:
            try:
                self._services.outlet.send(device, offer)
            except PeerLost:
                self.peer_down(device)
        with trio.move_on_after(limits.OFFER_TIMEOUT_S):
            await self._wait_until(lambda: None not in self._answers.values())
        profiles = {}
        for device, answer in self._answers.items():
            if isinstance(answer, Profiled):
                profiles[device] = answer.profile
            else:
                reason = answer.reason if answer else "it did not answer in time"
                self._note(f"{self._services.directory.name_of(device)} takes no part: {reason}")
        return profiles

    async def _agree(self, plan: Plan, contract: Contract) -> None:
        self.plan, self._contract = plan, contract
        self._program = Program(
            contract,
            first_step=self.job.first_step,
            checkpoint_every=self.job.checkpoint_every,
        )
        self._progress = ProgressTracker(
            job=self.job,
            plan=plan,
            contract=contract,
            services=self._services,
            signal=self._signal,
            emit=self._emit,
        )
        self._collector = CheckpointCollector(
            job=self.job,
            plan=plan,
            contract=contract,
            services=self._services,
            signal=self._signal,
        )
        self._proposals.propose(plan, contract)
        await self._wait_until(lambda: self._decided or self._refusal is not None)
        if self._refusal is not None:
            raise PlanInfeasible(f"the members did not agree: {self._refusal}")

    def _write_run(self, contract: Contract) -> None:
        bundle, directory = self.job.bundle, self.job.directory
        directory.write_record(self.job.record(contract))
        directory.write_bundle(bundle.manifest_bytes, _graphs(bundle), bundle.tokenizer())
        keep_weights(bundle, directory.bundle_path)

    async def _begin(self, plan: Plan) -> None:
        """Have every stage prepared, then let all begin."""
        checkpoint, listing = self.job.checkpoint, b""
        if checkpoint is not None:
            listing = checkpoint_listing(checkpoint.segments)
            await self._publish_checkpoint(checkpoint)
        self._publish_weights(resumed=checkpoint is not None)
        begin = Begin(
            stamp=stamp_of(plan),
            first_step=self.job.first_step,
            checkpoint_every=self.job.checkpoint_every,
            checkpoint=self._publish(listing) if listing else None,
            checkpoint_bytes=len(listing),
        )
        for stage in plan.stages:
            self._services.outlet.send(stage.device, begin)
        everyone = {stage.device for stage in plan.stages}
        limit_s = prepare_timeout_s(self.job.bundle.manifest, resumed=checkpoint is not None)
        with trio.move_on_after(limit_s) as scope:
            await self._wait_until(lambda: self._ready >= everyone)
        if scope.cancelled_caught:
            late = ", ".join(map(self._services.directory.name_of, everyone - self._ready))
            raise PeerLost(f"{late} did not get ready within {limit_s:.0f} s")
        self._withdraw_blobs()
        for stage in plan.stages:
            self._services.outlet.send(stage.device, Go(stamp=stamp_of(plan)))

    async def _publish_checkpoint(self, checkpoint: CheckpointRecord) -> None:
        """Offer every segment of a checkpoint until all stages have theirs."""
        read = self.job.directory.read_segment
        for saved in checkpoint.segments:
            self._publish(await trio.to_thread.run_sync(read, checkpoint.step, saved))

    def _publish_weights(self, *, resumed: bool) -> None:
        """Offer every tensor that a stage may fetch; nothing is read before it is asked for."""
        manifest = self.job.bundle.manifest
        for segment in range(len(manifest.segments)):
            for tensor in needed_weights(manifest, segment, resumed=resumed):
                self._publish(raw_bytes(self.weights.unchecked(tensor.name)), tensor.digest)

    def _publish(self, content: bytes | memoryview, digest: Digest | None = None) -> Digest:
        digest = self._services.blobs.publish(content, digest=digest)
        self._published.append(digest)
        return digest

    def _withdraw_blobs(self) -> None:
        for digest in self._published:
            self._services.blobs.withdraw(digest)
        self._published.clear()

    async def _train(self, plan: Plan) -> None:
        progress, program, collector = self._tracker(), self._program, self._collector
        if program is None or collector is None:
            raise InvariantBroken("a run was trained before it was agreed")
        self._feeder = Feeder(
            job=self.job,
            plan=plan,
            contract=self._contract,
            program=program,
            outlet=self._services.outlet,
            signal=self._signal,
            completed=lambda: progress.completed_items,
        )
        if self._stopping:
            self.stop()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(collector.run)
            await self._feeder.run()
            await self._signal.wait_until(lambda: self._all_stored(program, collector))
            nursery.cancel_scope.cancel()

    def _all_stored(self, program: Program, collector: CheckpointCollector) -> bool:
        stored = -1 if collector.latest is None else collector.latest.step
        return self._tracker().evaluated_at == program.step and stored >= program.step

    async def _finish(self, plan: Plan, started_s: float) -> TrainResult:
        program, collector, progress = self._program, self._collector, self._tracker()
        if program is None or collector is None or collector.latest is None:
            raise InvariantBroken("a run finished without a checkpoint")
        for stage in plan.stages:
            self._services.outlet.send(stage.device, Finish(stamp=stamp_of(plan)))
        model_path = None if program.stopped else self._model_path()
        if model_path is not None:
            await trio.to_thread.run_sync(self._write_model, model_path, collector.latest)
        return progress.result(
            seconds=time.monotonic() - started_s,
            state_digest=state_digest(saved.state for saved in collector.latest.segments),
            model_path=model_path,
            stopped=program.stopped,
        )

    def _model_path(self) -> Path:
        return Path(self._request.out) if self._request.out else self.job.directory.model_path

    def _write_model(self, path: Path, checkpoint: CheckpointRecord) -> None:
        run = TrainedRun(
            bundle=self.job.bundle,
            weights=self.weights,
            contract=self._contract,
            directory=self.job.directory,
            checkpoint=checkpoint,
        )
        write_trained_model(path, run)
        if self._request.safetensors is not None:
            write_trained_safetensors(Path(self._request.safetensors), run)

    async def _wait_until(self, predicate: Callable[[], bool]) -> None:
        """Wait for what precedes the first step; a stop ends it at once."""
        await self._signal.wait_until(lambda: self._stopping or predicate())
        if self._stopping and not predicate():
            raise Interrupted("stopped before the first step", hint="start it again")

    def _tracker(self) -> ProgressTracker:
        if self._progress is None:
            raise InvariantBroken("a run made progress before it was agreed")
        return self._progress

    def _checked(self, device: DeviceId, answer: Profiled | Declined) -> Profiled | Declined:
        """An answer, or what a measurement of another device or model amounts to."""
        if isinstance(answer, Declined):
            return answer
        profile, kinds = answer.profile, self.job.bundle.manifest.kinds
        if profile.device == device and profile.kinds.keys() == kinds.keys():
            return answer
        reason = "its measurement does not fit the model"
        return Declined(run=answer.run, view=answer.view, reason=reason)

    def _note(self, text: str) -> None:
        self._emit("note", NoteReport(text=text))


def _graphs(bundle: Bundle) -> dict[Digest, bytes]:
    return {Digest(digest): bundle.graph(Digest(digest)) for digest in bundle.manifest.graphs}
