"""How a run comes about: ask who can, plan, agree, begin.

Whoever wants to train owns the data and does this once; what it proposes is decided by its members
(agreement), and from the first step on it is one member among the others (runtime.runs.run_member).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import trio

from p2ptrain import limits
from p2ptrain.errors import Interrupted, InvariantBroken, PeerLost, PlanInfeasible
from p2ptrain.ids import DeviceId, Digest
from p2ptrain.planner.asked import Known
from p2ptrain.planner.plan import Plan
from p2ptrain.planner.profile import PeerProfile, is_plausible
from p2ptrain.runtime.home.checkpoint_listing import checkpoint_listing
from p2ptrain.runtime.home.home_duty import HomeSession
from p2ptrain.runtime.home.progress import ProgressTracker
from p2ptrain.runtime.planning.job import Job
from p2ptrain.runtime.planning.placement import Group, place
from p2ptrain.runtime.planning.variants import may_delay, other_sizes
from p2ptrain.runtime.reporting.plan_report import plan_report
from p2ptrain.runtime.reports import NoteReport, TrainRequest
from p2ptrain.runtime.services import Emit, Proposals, Services
from p2ptrain.runtime.signal import Signal
from p2ptrain.store.runs import CheckpointRecord
from p2ptrain.store.weights import Weights, keep_weights
from p2ptrain.training.contract import Contract
from p2ptrain.training.messages import Begin, Declined, Offer, Profiled, stamp_of
from p2ptrain.wire.flows import Flow


class Founding:
    """From the request to the first view of a lineage."""

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
        self._profiles: dict[DeviceId, PeerProfile] = {}
        self._decided = self._stopping = False
        self._refusal: str | None = None
        self._published: list[Digest] = []
        self.plan: Plan | None = None
        self._contract: Contract = job.contract

    @property
    def is_stopping(self) -> bool:
        """Whether it is to end before the run begins."""
        return self._stopping

    async def found(self) -> None:
        """Get a first plan decided, write the run down and tell its members to begin.

        Raises:
            PlanInfeasible: nobody can, or the members refused; nothing was trained.
            Interrupted: stopped before the first step.
            PeerLost: a member is gone before it was told; start again.
            CheckpointError: the run cannot be written down.
        """
        for note in self.job.data_notes:
            self._note(note)
        profiles = await self._collect_profiles()
        group = self._group(profiles)
        placement = await trio.to_thread.run_sync(place, self._request, self.job, group)
        for left in placement.left_out:
            name = self._services.directory.name_of(left.device)
            self._note(f"{name} has no stage: {left.reason}")
        plan, contract = placement.plan, placement.contract
        self._profiles = {d: placement.profiles[d] for d in plan.members if d in profiles}
        await self._wait_until(lambda: not self._stopping)  # or given up: then nobody is asked
        await self._agree(plan, contract)
        await trio.to_thread.run_sync(self._write_run, contract)
        manifest, name_of = self.job.bundle.manifest, self._services.directory.name_of
        self._emit("plan", plan_report(plan, contract, manifest, name_of))
        await self._begin(plan)

    def session(self) -> HomeSession:
        """What this device keeps of the run as its home peer; once the plan is proposed."""
        if self.plan is None:
            raise InvariantBroken("a home session before its plan")
        progress = ProgressTracker(
            job=self.job,
            plan=self.plan,
            contract=self._contract,
            services=self._services,
            emit=self._emit,
        )
        out, safetensors = self._request.out, self._request.safetensors
        session = HomeSession(
            job=self.job,
            weights=self.weights,
            progress=progress,
            out=None if out is None else Path(out),
            safetensors=None if safetensors is None else Path(safetensors),
        )
        session.stopping = self._stopping
        return session

    def receive(self, device: DeviceId, message: Profiled | Declined) -> None:
        """Take a member's answer to the offer."""
        if device in self._answers:
            self._answers[device] = self._checked(device, message)
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
        """End what has not begun yet; a run that trains is stopped by its member."""
        self._stopping = True
        self._signal.notify()

    async def _collect_profiles(self) -> dict[DeviceId, PeerProfile]:
        """Offer the run to every member; who measured itself, by device."""
        bundle = self.job.bundle
        tokenizer = bundle.tokenizer() if self.job.own_data else None
        blobs = [bundle.manifest_bytes, *bundle.graphs().values()]
        blobs += [] if tokenizer is None else [tokenizer]
        for content in blobs:
            self._publish(content, kind="bundle")
        offer = Offer(
            run=self.job.run,
            view=self.job.view,
            bundle=bundle.digest,
            bundle_bytes=len(blobs[0]),
            microbatch_size=self._contract.microbatch_size,
            form=self._contract.form,
            threads=self._contract.threads,
            in_parts=may_delay(
                self.job.wanted_schedule(self._request), bundle.manifest, self._contract
            ),
            other_sizes=() if self.job.resumed else other_sizes(self._request),
            optimizer=self._contract.optimizer.name,
            own_data=self.job.own_data,
            tokenizer_bytes=0 if tokenizer is None else len(tokenizer),
        )
        going = self._services.directory.leaving()
        there = (record.device for record in self._services.directory.alive())
        members = [device for device in there if device not in going]
        self._answers = dict.fromkeys(members)
        for device in members:
            try:
                self._services.outlet.send(device, offer)
            except PeerLost:
                self.peer_down(device)
        await self._wait_answered(limits.OFFER_TIMEOUT_S)
        waits_for = [device for device, answer in self._answers.items() if answer is None]
        if self.job.own_data and waits_for:
            names = ", ".join(map(self._services.directory.name_of, waits_for))
            self._note(f"waiting for {names}: data is looked through before its first use")
            await self._wait_answered(limits.OWN_DATA_TIMEOUT_S)
        profiles = {}
        for device, answer in self._answers.items():
            if isinstance(answer, Profiled):
                profiles[device] = answer.profile
            else:
                name = self._services.directory.name_of(device)
                self._note(f"{name} takes no part: {_reason(answer)}")
        return profiles

    async def _wait_answered(self, timeout_s: float) -> None:
        with trio.move_on_after(timeout_s):
            await self._wait_until(lambda: None not in self._answers.values())

    def _group(self, profiles: dict[DeviceId, PeerProfile]) -> Group:
        answers = self._answers.items()
        reasons = {d: _reason(answer) for d, answer in answers if d not in profiles}
        known = {*self._answers, *(owner.device for owner in self.job.contract.owners)}
        return Group(
            profiles=profiles,
            home=self._services.device,
            links={d: answer.links for d, answer in answers if isinstance(answer, Profiled)},
            known=Known(
                names={device: self._services.directory.name_of(device) for device in known},
                absent=reasons,
            ),
            data={
                d: answer.data
                for d, answer in answers
                if isinstance(answer, Profiled) and answer.data is not None
            },
        )

    async def _agree(self, plan: Plan, contract: Contract) -> None:
        self.plan, self._contract = plan, contract
        self._proposals.propose(plan, contract)
        await self._wait_until(lambda: self._decided or self._refusal is not None)
        if self._refusal is not None:
            raise PlanInfeasible(f"the members did not agree: {self._refusal}")

    def _write_run(self, contract: Contract) -> None:
        bundle, directory = self.job.bundle, self.job.directory
        directory.write_record(self.job.record(contract))
        directory.write_bundle(bundle.manifest_bytes, bundle.graphs(), bundle.tokenizer())
        keep_weights(bundle, directory.bundle_path)

    async def _begin(self, plan: Plan) -> None:
        """Tell every member where to begin, and offer it the checkpoint that is resumed."""
        checkpoint, listing = self.job.checkpoint, b""
        if checkpoint is not None:
            listing = checkpoint_listing(checkpoint.segments)
            await self._publish_checkpoint(checkpoint)
        begin = Begin(
            stamp=stamp_of(plan),
            first_step=self.job.first_step,
            checkpoint_every=self.job.checkpoint_every,
            profiles=tuple(self._profiles[device] for device in sorted(self._profiles)),
            checkpoint=self._publish(listing, kind="state") if listing else None,
            checkpoint_bytes=len(listing),
        )
        for device in plan.members:
            self._services.outlet.send(device, begin)

    async def _publish_checkpoint(self, checkpoint: CheckpointRecord) -> None:
        """Offer every segment of a checkpoint until all stages have theirs."""
        read = self.job.directory.read_segment
        for saved in checkpoint.segments:
            content = await trio.to_thread.run_sync(read, checkpoint.step, saved)
            self._publish(content, kind="state")

    def _publish(self, content: bytes | memoryview, *, kind: str) -> Digest:
        flow = Flow(self.job.run, kind)
        digest = self._services.blobs.publish(content, flow=flow)
        self._published.append(digest)
        return digest

    def _withdraw_blobs(self) -> None:
        for digest in self._published:
            self._services.blobs.withdraw(digest)
        self._published.clear()

    async def _wait_until(self, predicate: Callable[[], bool]) -> None:
        """Wait for what precedes the first step; a stop ends it at once."""
        await self._signal.wait_until(lambda: self._stopping or predicate())
        if self._stopping and not predicate():
            raise Interrupted("stopped before the first step", hint="start it again")

    def _checked(self, device: DeviceId, answer: Profiled | Declined) -> Profiled | Declined:
        """An answer, or what a measurement of another device or model amounts to."""
        if isinstance(answer, Declined):
            return answer
        profile, kinds = answer.profile, self.job.bundle.manifest.kinds
        if self.job.own_data and answer.data is None:
            reason = "its version of p2ptrain gives no data of its own"
            return Declined(run=answer.run, view=answer.view, reason=reason)
        if profile.device == device and is_plausible(profile, kinds):
            return answer
        reason = "its measurement does not fit the model"
        return Declined(run=answer.run, view=answer.view, reason=reason)

    def _note(self, text: str) -> None:
        self._emit("note", NoteReport(text=text))


def _reason(answer: Profiled | Declined | None) -> str:
    """Why a device has no profile."""
    return answer.reason if isinstance(answer, Declined) else "it did not answer in time"
