"""Get this member's segments as they were after the step where a view goes on.

First every survivor settles: it applies the resumed step if it has not, or drops a later one that
it had begun. Then lost ranges are replayed, moved segments fetched, and what is here already stays.
DESIGN section 7, rules 1, 4 and 5.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping

import trio

from p2ptrain import limits
from p2ptrain.agreement.view import View
from p2ptrain.engine.contract import Array
from p2ptrain.errors import CheckpointError, InvariantBroken, PeerLost
from p2ptrain.ids import DeviceId
from p2ptrain.recovery.restoration import Replay, SpanAt
from p2ptrain.runtime.compute.ends_worker import EndsWorker
from p2ptrain.runtime.compute.replay import Replayer, ShardReplayer
from p2ptrain.runtime.compute.shard_group import WholeStates, joined_states
from p2ptrain.runtime.compute.shard_worker import ShardWorker
from p2ptrain.runtime.compute.stage import StageWorker
from p2ptrain.runtime.exchange.asking import Asker
from p2ptrain.runtime.keeping.run_state import (
    WEIGHTS_FOLDER,
    Holder,
    Loadable,
    RunState,
    Stateful,
    Worker,
)
from p2ptrain.runtime.keeping.stage_weights import StageWeights
from p2ptrain.runtime.reporting.recovery_clock import RecoveryClock
from p2ptrain.runtime.views.inheriting import inherit_logs
from p2ptrain.runtime.views.item_run import apply_update
from p2ptrain.schedule.actions import ONE, Held
from p2ptrain.training.messages import Wanted, stamp_of
from p2ptrain.training.replay_inputs import StepInputs, StepPlace, needed_places, step_inputs
from p2ptrain.training.routing import Route
from p2ptrain.training.shard_cuts import Share, share_of
from p2ptrain.training.step_record import StepRecord
from p2ptrain.training.step_tensors import expected_tensors, joined
from p2ptrain.units import NS_PER_S


def replay_limit_s(view: View) -> float:
    """How long the replays that a view begins with may take; all wait for them, and derive the
    same from the view."""
    if view.restoration is None:
        return 0.0
    steps = view.restoration.replayed_steps(view.resume_step)
    return limits.REPLAY_PACE_MAX * steps * view.plan.step_ns / NS_PER_S


class Restorer:
    """One view's restoration at one member, and what it gives to the others."""

    def __init__(
        self,
        *,
        view: View,
        state: RunState,
        changed: Callable[[], None],
        clock: RecoveryClock,
    ) -> None:
        """`changed` is called whenever `read` may give more than before."""
        self._view, self._state, self._changed, self._clock = view, state, changed, clock
        self._services = state.services
        self.asker = Asker(
            stamp=stamp_of(view.plan),
            outlet=state.services.outlet,
            blobs=state.services.blobs,
            signal=state.signal,
            replay_s=replay_limit_s(view),
        )
        self._settled = False
        self._replayed: list[StageWorker | WholeStates] = []
        self.replayed_steps = 0

    @property
    def draws(self) -> bool:
        """Whether somebody begins with the bundle's own parameters."""
        restoration = self._view.restoration
        if restoration is None:
            return self._view.first_step == 0
        return any(replay.step == 0 for replay in restoration.replays)

    async def settle(self) -> None:
        """Bring what is here to the view's step; blocking work happens in a thread."""
        state, step = self._state, self._view.resume_step
        worker = state.worker
        if worker is not None:
            if worker.applied_step == step - 1 and worker.gradients_complete:
                record = self._record(step)
                await trio.to_thread.run_sync(apply_update, worker, self._view.contract, record)
            elif worker.applied_step == step:
                await trio.to_thread.run_sync(worker.abandon_step)
            else:
                state.worker = None  # it was away while others went on: its state is an old one
        state.log.finish(step)
        state.log.truncate(step)
        state.released_step = step
        self._settled = True

    async def restore(self) -> Worker | None:
        """This member's stage of the view, with its state; None without a stage.

        Raises:
            PeerLost: a giver, or a replica of our own, is gone; the view must change.
            CheckpointError, BundleError, EngineError: what is needed is damaged or does not run.
        """
        if self._view.restoration is not None:
            for replay in self._view.restoration.replays:
                if replay.replayer == self._services.device:
                    self._replayed.append(await self._replay(replay))
                    self._changed()
        own = self._view.plan.stages_of(self._services.device)
        if not own:
            return None
        share = share_of(self._view.plan, self._services.device)
        worker: Worker
        if share is not None:
            worker = await self._assemble_shard(share)
        else:
            stages = [await self._assemble(index) for index in own]
            worker = stages[0] if len(stages) == 1 else EndsWorker(*stages)
        await inherit_logs(self._view, self._state, self.asker)
        return worker

    def adopt(self, worker: Worker | None) -> None:
        """Everybody is ready: from now on this is our stage, the old one may go."""
        self._state.worker = worker
        self._replayed.clear()

    async def read(self, wanted: Wanted) -> bytes | None:
        """What another member may have of us; None while it is not there yet.

        Raises:
            CheckpointError: a replica or log that the view says is here is not.
        """
        if not self._settled:
            await trio.lowlevel.checkpoint()
            return None
        if wanted.what != "state":
            return await self._read_step(wanted)
        if wanted.step != self._view.resume_step:
            found = await trio.to_thread.run_sync(
                self._state.read_replica, wanted.step, wanted.segment
            )
            return _there(found, f"the replica of segment {wanted.segment}")
        worker = self._holder(wanted.segment)
        if worker is None:  # a replica of this very step, or a replay that is not finished
            return await trio.to_thread.run_sync(
                self._state.read_replica, wanted.step, wanted.segment
            )
        return await trio.to_thread.run_sync(
            self._state.serialise, worker, wanted.segment, wanted.stamp, wanted.step
        )

    async def _read_step(self, wanted: Wanted) -> bytes | None:
        place = StepPlace(wanted.what, wanted.segment)  # type: ignore[arg-type]  # checked: WANTED
        found = await trio.to_thread.run_sync(
            self._state.read_log, place, wanted.step, wanted.microbatches
        )
        return _there(found, f"the {wanted.what} of step {wanted.step}")

    # Our stage.

    async def _assemble(self, index: int) -> StageWorker:
        """Keep a worker that covers exactly this stage; else make one and load every segment."""
        stage, holds = self._view.plan.stages[index], self._holds(index)
        present = self._state.worker
        here = present.ends if isinstance(present, EndsWorker) else (present,)
        for worker in (*here, *self._replayed):
            if not isinstance(worker, StageWorker):
                continue
            fits = worker.segments == stage.segments and not worker.rounds_inside
            if fits and worker.holds.covers(holds):
                return worker
        made = await self._make_worker(stage.segments, holds)
        await self._fill(made)
        return made

    async def _assemble_shard(self, share: Share) -> ShardWorker:
        """Keep the shard that we have had; else make one and load our slices of every segment."""
        worker, step = self._state.worker, self._view.resume_step
        known = isinstance(worker, ShardWorker) and worker.share == share
        if known and isinstance(worker, ShardWorker) and worker.applied_step == step:
            return worker
        weights = await self._weights(range(len(self._state.manifest.segments)))
        made = await trio.to_thread.run_sync(self._state.make_shard, share, weights)
        await self._fill(made)
        return made

    async def _fill(self, made: Stateful) -> None:
        """Give a worker its state, from wherever the view says it is."""
        if self._view.restoration is None:
            await self._start(made)
            return
        for segment in made.segments:
            holder = self._holder(segment)
            if holder is not None:
                step = self._view.resume_step
                saved = await trio.to_thread.run_sync(holder.state, segment, step)
                await trio.to_thread.run_sync(made.load, segment, saved)
            else:
                source = _device_of(self._view.restoration.sources, segment)
                await self._load_from(made, segment, source, self._view.resume_step)

    def _holds(self, index: int) -> Held:
        """How many microbatches a stage of ours has room for."""
        route = Route(self._view.plan, self._services.device, stage=index)
        return route.held(self._view.contract)

    async def _make_worker(
        self, segments: range, holds: Held, cuts: Collection[int] = ()
    ) -> StageWorker:
        weights = await self._weights(segments)
        return await trio.to_thread.run_sync(
            lambda: self._state.make_worker(segments, holds, weights, cuts)
        )

    async def _weights(self, segments: range) -> Mapping[str, Array]:
        """The bundle's weights of these segments: our own bundle's, or the home peer's."""
        if self._state.own_weights is not None:
            return self._state.own_weights
        stage_weights = StageWeights(
            self._state.path / WEIGHTS_FOLDER, manifest=self._state.manifest, segments=segments
        )
        return await stage_weights.fetch(
            self._services.blobs, self._view.plan.home, resumed=not self.draws
        )

    async def _start(self, worker: Stateful) -> None:
        """The state with which a lineage begins: drawn, or of the checkpoint that it resumes."""
        if self._view.first_step == 0:
            await trio.to_thread.run_sync(worker.draw_parameters)
            return
        for segment in worker.segments:
            saved = self._state.checkpoint_listing.get(segment)
            if saved is None:
                raise CheckpointError(f"the checkpoint lacks segment {segment}")
            content = await self._services.blobs.fetch(
                self._view.plan.home, saved.blob, size=saved.blob_bytes
            )
            await trio.to_thread.run_sync(
                self._state.load, worker, segment, self._view.first_step, content
            )

    def _holder(self, segment: int) -> Holder | None:
        """A worker of ours with this segment's whole state at the view's step."""
        step = self._view.resume_step
        for worker in (self._state.worker, *self._replayed):
            if isinstance(worker, ShardWorker) and not worker.has_whole_states:
                continue
            if worker is not None and segment in worker.segments and worker.applied_step == step:
                return worker
        return None

    async def _load_from(self, worker: Loadable, segment: int, source: DeviceId, step: int) -> None:
        if source == self._services.device:
            content = await self._own_replica(segment, step)
        else:
            content = await self._fetch(source, "state", segment, step)
        await trio.to_thread.run_sync(self._state.load, worker, segment, step, content)

    async def _own_replica(self, segment: int, step: int) -> bytes:
        """A replica that is kept here. PeerLost where it has vanished or rotted since the promise:
        the store lists it no longer, so the next view looks elsewhere or says what it takes."""
        try:
            content = await trio.to_thread.run_sync(self._state.read_replica, step, segment)
        except CheckpointError as error:
            raise PeerLost(error.message) from error
        if content is None:
            raise PeerLost(f"the replica of segment {segment} at step {step} is gone")
        return content

    # Replay.

    async def _replay(self, replay: Replay) -> StageWorker | WholeStates:
        """Make a lost range again: its replica, then every step since, from logs and records."""
        segments, plan, present = replay.span.segments, self._view.plan, self._state.worker
        if isinstance(present, ShardWorker) and not present.has_whole_states:
            self._state.worker = None  # slices are of no more use, and what follows needs the room
        if replay.shares:
            return await self._replay_shards(replay)
        if plan.stages[0].split == "tensor" and replay.step == self._view.resume_step > 0:
            states = WholeStates(segments)  # nobody here is to run them whole
            await self._load_replicas(states, replay)
            return states
        own = plan.stages_of(self._services.device)
        ours = next((index for index in own if plan.stages[index].segments == segments), None)
        holds = ONE if ours is None else self._holds(ours)
        worker = await self._make_worker(segments, holds, replay.cuts)
        await self._load_replayed(worker, replay)
        replayer = Replayer(
            worker,
            manifest=self._state.manifest,
            contract=self._view.contract,
            on_sent=self._state.log_replayed,
            cuts=replay.cuts,
        )
        await self._replay_steps(replay, replayer.run_step)
        return worker

    async def _replay_shards(self, replay: Replay) -> WholeStates:
        """As `_replay`, of a model that shards had computed: all of them are computed here, and
        are gone before our next part is made."""
        weights = await self._weights(replay.span.segments)
        group = await trio.to_thread.run_sync(self._state.make_group, replay.shares, weights)
        await self._load_replayed(group, replay)
        replayer = ShardReplayer(group, self._view.contract)
        await self._replay_steps(replay, replayer.run_step)
        return await trio.to_thread.run_sync(joined_states, group, self._view.resume_step)

    async def _load_replayed(self, worker: Stateful, replay: Replay) -> None:
        if replay.step == 0:
            await trio.to_thread.run_sync(worker.draw_parameters)
            return
        await self._load_replicas(worker, replay)

    async def _load_replicas(self, worker: Loadable, replay: Replay) -> None:
        for segment in replay.span.segments:
            source = _device_of(replay.replicas, segment)
            await self._load_from(worker, segment, source, replay.step)

    async def _replay_steps(
        self, replay: Replay, run_step: Callable[[StepInputs, StepRecord], None]
    ) -> None:
        segments = replay.span.segments
        for step in range(replay.step + 1, self._view.resume_step + 1):
            packed = {
                place: await self._packed(replay, place, step)
                for place in needed_places(self._state.manifest, segments)
            }
            inputs = step_inputs(self._state.manifest, self._view.contract, segments, packed)
            record = self._record(step)
            began_s = time.monotonic()
            await trio.to_thread.run_sync(run_step, inputs, record)
            self._clock.replay_s += time.monotonic() - began_s
            self._state.log.finish(step)
            self.replayed_steps += 1

    async def _packed(self, replay: Replay, place: StepPlace, step: int) -> bytes:
        givers = _givers(replay, place, step)
        if not givers:
            raise InvariantBroken(f"the view names nobody for {place}")
        parts = [(own, await self._part(device, place, step, own)) for device, own in givers]
        if len(parts) == 1:
            return parts[0][1]
        state = self._state
        expected = expected_tensors(state.manifest, state.contract, place.kind, place.segment)
        return await trio.to_thread.run_sync(joined, expected, parts)

    async def _part(
        self, giver: DeviceId, place: StepPlace, step: int, microbatches: tuple[int, ...]
    ) -> bytes:
        if giver != self._services.device:
            return await self._fetch(giver, place.kind, place.segment, step, microbatches)
        content = await trio.to_thread.run_sync(self._state.read_log, place, step, microbatches)
        if content is None:
            raise PeerLost(f"the log of step {step} is not here any more")
        return content

    async def _fetch(
        self,
        device: DeviceId,
        what: str,
        segment: int,
        step: int,
        microbatches: tuple[int, ...] = (),
    ) -> bytes:
        began_s = time.monotonic()
        content = await self.asker.fetch(device, what, segment, step, microbatches)
        self._clock.fetch_s += time.monotonic() - began_s
        return content

    def _record(self, step: int) -> StepRecord:
        for record in reversed(self._view.records):
            if record.step == step:
                return record
        raise InvariantBroken(f"the view lacks the record of step {step}")


def _there(content: bytes | None, what: str) -> bytes:
    if content is None:
        raise CheckpointError(f"{what} is not here any more")
    return content


def _device_of(spans: tuple[SpanAt, ...], segment: int) -> DeviceId:
    for at in spans:
        if segment in at.span.segments:
            return at.device
    raise InvariantBroken(f"the view names nobody for segment {segment}")


def _givers(
    replay: Replay, place: StepPlace, step: int
) -> tuple[tuple[DeviceId, tuple[int, ...]], ...]:
    """Who gives which microbatches; none named: all."""
    match place.kind:
        case "activation" | "cotangent":
            return replay.givers(place.kind, step)
        case "tied":
            return tuple((at.device, ()) for at in replay.tied_from if at.segment == place.segment)
        case _:
            return () if replay.data_from is None else ((replay.data_from, ()),)
