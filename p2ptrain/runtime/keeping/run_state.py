"""What a member holds of a run across its views: its stage, its logs, its replicas, the data."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import trio

from p2ptrain import limits
from p2ptrain.agreement.view import View
from p2ptrain.bundle.manifest import Manifest
from p2ptrain.data.opening import OpenData
from p2ptrain.engine.contract import Array, Engine
from p2ptrain.errors import CheckpointError, DataError, InvariantBroken
from p2ptrain.ids import DeviceId, Lineage, RunId
from p2ptrain.planner.plan import is_sharded
from p2ptrain.recovery.inventory import Inventory, LiveShard, LiveStage, LogKind, live_stage
from p2ptrain.recovery.protection import Provisional, Safeguards, is_kept_in_vain, protection
from p2ptrain.recovery.replica_sets import ReplicaSets
from p2ptrain.recovery.step_log import LogKey, StepLog
from p2ptrain.runtime.compute.ends_worker import EndsWorker
from p2ptrain.runtime.compute.shard_group import ShardGroup
from p2ptrain.runtime.compute.shard_worker import ShardWorker
from p2ptrain.runtime.compute.stage import StageWorker
from p2ptrain.runtime.exchange.slice_joining import SliceJoiner
from p2ptrain.runtime.home.checkpoint_listing import parse_listing
from p2ptrain.runtime.home.home_duty import HomeSession, note_end
from p2ptrain.runtime.keeping.replication import ReplicaKeeper
from p2ptrain.runtime.planning.own_data import owner_samples
from p2ptrain.runtime.planning.pacing import Pacing
from p2ptrain.runtime.services import Services
from p2ptrain.runtime.signal import Signal
from p2ptrain.schedule.actions import Held
from p2ptrain.store.bundles import Bundle
from p2ptrain.store.replicas import Replica, ReplicaPlace, ReplicaStore
from p2ptrain.store.runs import RunDirectory, SavedSegment
from p2ptrain.training.contract import Contract
from p2ptrain.training.feed import Samples
from p2ptrain.training.messages import Begin, Ended, SegmentSaved, Stamp
from p2ptrain.training.minibatch import FedKind, read_minibatch
from p2ptrain.training.owners import owner_of
from p2ptrain.training.program import Item
from p2ptrain.training.replay_inputs import StepPlace
from p2ptrain.training.segment_state import SegmentState, StateHeader, read_segment_state
from p2ptrain.training.shard_cuts import Share
from p2ptrain.training.step_tensors import (
    PackedTensor,
    encoded,
    expected_of,
    expected_tensors,
    pack,
    unpack,
)

JOURNAL_FILE = "agreement.jsonl"
WEIGHTS_FOLDER = "weights"


class Holder(Protocol):
    """What has the whole state of segments in memory."""

    @property
    def segments(self) -> Sequence[int]:
        """Ascending."""

    @property
    def applied_step(self) -> int | None:
        """Updates applied to every segment; None while they differ."""

    def state(self, segment_index: int, step: int) -> SegmentState:
        """A copy of one segment's state after `step` updates."""


class Loadable(Protocol):
    """What takes the whole states of segments."""

    def load(self, segment_index: int, state: SegmentState) -> None:
        """Take over one segment's state; CheckpointError when it does not fit."""


class Stateful(Holder, Loadable, Protocol):
    """What has such states and takes them, and can draw them."""

    def draw_parameters(self) -> None:
        """Start afresh."""


Worker = StageWorker | EndsWorker | ShardWorker
"""What a device runs of a model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogPlace:
    """One microbatch's tensors at one place, as the log names them."""

    kind: LogKind
    step: int
    microbatch: int
    segment: int


class RunState:
    """One run's holdings at one device; what is blocking says so."""

    def __init__(
        self,
        *,
        run: RunId,
        bundle: Bundle,
        contract: Contract,
        engine: Engine | None,
        services: Services,
    ) -> None:
        """`engine` is None at a device that has no stage, ever."""
        self.run, self.bundle, self.contract, self.services = run, bundle, contract, services
        self._engine = engine
        self.signal = Signal()
        self.path: Path = services.runs_path / run
        self.worker: Worker | None = None
        """Our stage; None: we have none, or not yet."""
        self.released_step = 0
        """The newest step whose update may be on its way into `worker`."""
        self.checkpoint_listing: dict[int, SavedSegment] = {}
        self.log = self._empty_log()
        self.own_weights: Mapping[str, Array] | None = None
        self.data_copies: set[DeviceId] = set()
        """Members known to have the run's data."""
        self.offered_data: OpenData | None = None
        """This device's own data as this process has offered it; None: it has not."""
        self.own_samples: Samples | None = None
        """What this device feeds of a run whose peers feed their own."""
        self.own_problem: DataError | None = None
        """Why it cannot, where it should."""
        self._session: HomeSession | None = None
        self.state_names = self.manifest.updates[contract.optimizer.name].state
        self.replicas = ReplicaStore(self.path, self.manifest, self.state_names, contract=contract)
        self.sets = ReplicaSets()
        self.pacing = Pacing(services, self.manifest)
        self._lineages: list[tuple[Lineage, int]] = []
        """Lineages whose replicas are of this run's past, oldest first, up to which step each."""
        self.view: View | None = None
        self.on_stored: Callable[[SegmentSaved], None] = lambda saved: None
        """Told when a replica that is kept here has become durable."""
        self.keeper = ReplicaKeeper(
            store=self.replicas,
            manifest=self.manifest,
            state_names=self.state_names,
            contract=contract,
            blobs=services.blobs,
            on_stored=lambda saved: self.on_stored(saved),
        )

    @property
    def manifest(self) -> Manifest:
        """Of the model."""
        return self.bundle.manifest

    def take_session(self, session: HomeSession) -> None:
        """This device holds the run's data."""
        self._session = session
        self.own_weights = session.weights
        self.data_copies.add(self.services.device)

    def open_own_data(self) -> None:
        """Open what this device owns of the run's data, or note why that cannot be. Blocking."""
        owner = owner_of(self.contract.owners, self.services.device)
        if owner is None:
            return
        self.own_problem = DataError("the data is still being looked through")
        try:
            self.own_samples = owner_samples(
                self.services, self.manifest, self.contract, owner, self.offered_data
            )
            self.own_problem = None
        except DataError as error:
            self.own_problem = error

    def check_own_data(self) -> None:
        """DataError where this device cannot feed what it owns: the run has not begun yet, since no
        later view has it as a member then."""
        if self.own_problem is not None:
            raise self.own_problem

    async def take_listing(self, home: DeviceId, begin: Begin) -> None:
        """Learn where the segments of a resumed checkpoint are.

        Raises:
            PeerLost: the home peer is gone.
            CheckpointError: what came is no listing.
        """
        if begin.checkpoint is None:
            await trio.lowlevel.checkpoint()
            return
        content = await self.services.blobs.fetch(
            home, begin.checkpoint, size=begin.checkpoint_bytes
        )
        self.checkpoint_listing = parse_listing(content)

    # Stages. All of these block.

    def make_worker(
        self,
        segments: range,
        holds: Held,
        weights: Mapping[str, Array] | None,
        cuts: Collection[int] = (),
    ) -> StageWorker:
        """A stage over these segments, neither drawn nor loaded; `cuts` as `StageWorker` has."""
        if self._engine is None:
            raise InvariantBroken("a stage on a device without an engine")
        return StageWorker(
            engine=self._engine,
            bundle=self.bundle,
            segments=segments,
            contract=self.contract,
            holds=holds,
            weights=weights,
            cuts=cuts,
        )

    def make_shard(self, share: Share, weights: Mapping[str, Array] | None) -> ShardWorker:
        """One shard of the whole model, neither drawn nor loaded."""
        if self._engine is None:
            raise InvariantBroken("a shard on a device without an engine")
        return ShardWorker(
            engine=self._engine,
            bundle=self.bundle,
            contract=self.contract,
            share=share,
            weights=weights,
        )

    def make_group(
        self, shares: tuple[int, ...], weights: Mapping[str, Array] | None
    ) -> ShardGroup:
        """Every tensor shard of the whole model, for a replay; neither drawn nor loaded."""
        if self._engine is None:
            raise InvariantBroken("shards on a device without an engine")
        return ShardGroup(
            engine=self._engine,
            bundle=self.bundle,
            contract=self.contract,
            mode="tensor",
            shares=shares,
            weights=weights,
        )

    def load(self, worker: Loadable, segment: int, step: int, content: bytes) -> None:
        """Give a worker one segment's state; CheckpointError when it is something else."""
        stored = read_segment_state(
            content,
            self.manifest,
            bundle=self.manifest.digest,
            state_names=self.state_names,
        )
        place = (stored.header.run, stored.header.segment, stored.header.step)
        if place != (self.run, segment, step):
            raise CheckpointError(f"what came as segment {segment} is something else")
        worker.load(segment, stored.state)

    def serialise(self, worker: Holder, segment: int, stamp: Stamp, step: int) -> bytes:
        """One segment's state as a checkpoint file."""
        header = StateHeader(
            run=stamp.run,
            lineage=stamp.lineage,
            view=stamp.view,
            plan=stamp.plan,
            step=step,
            segment=segment,
            bundle=self.bundle.digest,
        )
        return worker.state(segment, step).to_bytes(header)

    # The log.

    def _empty_log(self) -> StepLog:
        return StepLog(bytes_max=limits.STEP_LOG_BYTES_MAX, microbatches=self.contract.microbatches)

    def log_sent(self, place: LogPlace, arrays: tuple[Array, ...]) -> None:
        """Keep a copy of what is sent at one place in a microbatch of a training step."""
        self.log_replayed(place.kind, place.step, place.microbatch, place.segment, arrays)

    def log_replayed(
        self, kind: LogKind, step: int, microbatch: int, segment: int, arrays: tuple[Array, ...]
    ) -> None:
        """Keep again what a lost stage had sent."""
        expected = [
            each.index
            for each in expected_tensors(self.manifest, self.contract, kind, segment)
            if each.microbatch == microbatch
        ]
        for index, array in zip(expected, arrays, strict=True):
            key = LogKey(kind=kind, step=step, microbatch=microbatch, segment=segment, index=index)
            self.log.put(key, encoded(array))

    def read_log(
        self, place: StepPlace, step: int, microbatches: tuple[int, ...] = ()
    ) -> bytes | None:
        """One step at a place, or some microbatches of it, packed; None where they are not all
        here. Blocking."""
        if place.kind == "input" or place.kind == "labels":  # narrows as `in` does not
            return self._read_feed(place.kind, step)
        bodies = self.log.read(place.kind, place.segment, step, microbatches)
        expected = expected_of(
            expected_tensors(self.manifest, self.contract, place.kind, place.segment), microbatches
        )
        if bodies is None or len(bodies) != len(expected):
            return None
        return pack([
            PackedTensor(microbatch=each.microbatch, index=each.index, body=body)
            for each, body in zip(expected, bodies, strict=True)
        ])  # fmt: skip

    def inherit_log(
        self, place: StepPlace, step: int, content: bytes, microbatches: tuple[int, ...] = ()
    ) -> None:
        """Keep what another member had sent in a step, or some microbatches of it, and gives away,
        packed. Blocking.

        Raises:
            RemoteProtocolError: it is not what is sent at that place; nothing was kept.
        """
        if place.kind == "input" or place.kind == "labels":
            raise InvariantBroken("data is not logged")
        expected = expected_tensors(self.manifest, self.contract, place.kind, place.segment)
        for tensor in unpack(content, expected_of(expected, microbatches)):
            key = LogKey(
                kind=place.kind, step=step, microbatch=tensor.microbatch, segment=place.segment,
                index=tensor.index,
            )  # fmt: skip
            self.log.put(key, tensor.body)
        self.log.finish(step)

    def _read_feed(self, kind: FedKind, step: int) -> bytes | None:
        """What a data holder feeds in a step, packed; None without the data."""
        if self._session is None or self.contract.owners:
            return None
        item = Item(kind="train", step=step)
        samples, loss = self._session.job.samples, self.manifest.loss
        return read_minibatch(samples, self.contract, loss, item).packed(kind)

    def read_replica(self, step: int, segment: int) -> bytes | None:
        """A replica that is kept here; None where there is none. Blocking."""
        for lineage, last in reversed(self._lineages):
            place = ReplicaPlace(lineage=lineage, step=step, segment=segment)
            if step <= last and self.replicas.replica(place) is not None:
                return bytes(self.replicas.content(place))
        return None

    # Replicas.

    def enter(self, view: View) -> None:
        """Another view counts: owners and members may have changed."""
        self._note_lineage(view)
        self.view = view
        self.sets.begin(view)
        self.keeper.begin(self._joiner(view))
        self.pacing.begin(view.plan)
        self.data_copies &= {self.services.device}  # the others say it again

    def _joiner(self, view: View) -> SliceJoiner | None:
        if not is_sharded(view.plan):
            return None
        return SliceJoiner(
            plan=view.plan,
            manifest=self.manifest,
            contract=self.contract,
            blobs=self.services.blobs,
        )

    def kept(self) -> tuple[Replica, ...]:
        """Replicas of this lineage that are durable here, to be told again in each view."""
        return tuple(
            replica
            for lineage, last in self._lineages
            for replica in self.replicas.kept(lineage)
            if replica.place.step <= last
        )

    def keeps_in_vain(self, view: View) -> bool:
        """Whether what is kept here is of no more use, or there is nothing."""
        return is_kept_in_vain(view, self.sets.releasable_step()) or not self.kept()

    def release(self) -> int | None:
        """Forget what a whole replica set has made needless; the step up to which, or None."""
        step = self.sets.releasable_step()
        if step is not None:
            self.log.release(step)
            self.sets.forget_before(step)
        return step

    def forget_replicas(self, step: int) -> None:
        """Delete replica sets of earlier steps. Blocking."""
        for lineage, _ in self._lineages:
            self.replicas.forget_before(lineage, step)

    def _note_lineage(self, view: View) -> None:
        known = self._lineages[-1][0] if self._lineages else None
        if known == view.lineage:
            return
        # A forced view shares the past up to where it goes on; a resumed run shares nothing.
        shared = [] if view.restoration is None else self._lineages
        past = [(lineage, min(last, view.resume_step)) for lineage, last in shared]
        self._lineages = [*past, (view.lineage, limits.STEPS_MAX)]

    @property
    def whole_step(self) -> int | None:
        """The newest step from which any one lost stage can be replayed."""
        return self.sets.whole_step((self.services.device, *self.services.directory.linked()))

    def safety(self, committed_step: int, record_count: int) -> str:
        """`protected`, or `provisional` and why."""
        if self.view is None:
            return "provisional: the run has not begun"
        present = (self.services.device, *self.services.directory.linked())
        verdict = protection(
            self.view.plan,
            Safeguards(
                present=present,
                whole_step=self.sets.whole_step(present),
                data_copies=self.data_copies,
                log_full=self.log.full,
                record_count=record_count,
                newest_step=committed_step,
                replicated_step=committed_step if len(present) > 1 else 0,
            ),
        )
        if isinstance(verdict, Provisional):
            return f"provisional: {verdict.reason}"
        return f"protected: any one device may vanish (replicas of step {verdict.replica_step})"

    def inventory(self) -> Inventory:
        """What this device holds now, for a promise."""
        return Inventory(
            live=self._live(),
            states=tuple(
                held
                for lineage, last in self._lineages
                for held in self.replicas.held(lineage)
                if held.step <= last
            ),
            logs=self.log.inventory(),
            has_data=self._has_data(),
            linked=self.services.directory.linked(),
            links=self.services.link_figures(),
            battery=self.services.battery(),
            shard=self._live_shard(),
        )

    def _has_data(self) -> bool:
        if self.contract.owners:
            return self.own_samples is not None
        return self._session is not None

    def close(self) -> None:
        """The run is over here: give the memory back."""
        self.worker = None
        self.log = self._empty_log()

    def open_disk(self) -> None:
        """Look what replicas are here, and put the model's graphs beside them, so that a restarted
        process can go on. Blocking.

        Raises:
            CheckpointError: the disk refuses.
        """
        self.replicas.scan()
        directory = RunDirectory(self.path)
        if not directory.exists():
            directory.write_bundle(self.bundle.manifest_bytes, self.bundle.graphs())

    def forget(self, ended: Ended) -> None:
        """Delete what only a run that goes on needs; weights stay for a resumption. Blocking.

        The end is written down first: after a crash in between, the journal is not taken up.
        """
        note_end(RunDirectory(self.path), ended)
        self.forget_replicas(limits.STEPS_MAX)
        (self.path / JOURNAL_FILE).unlink(missing_ok=True)
        directory = RunDirectory(self.path)
        if ended.outcome == "complete":
            shutil.rmtree(self.path / WEIGHTS_FOLDER, ignore_errors=True)
        if not directory.exists():
            shutil.rmtree(directory.bundle_path, ignore_errors=True)
        with contextlib.suppress(OSError):  # a folder that holds anything else stays
            self.path.rmdir()

    def _live(self) -> LiveStage | None:
        worker = self.worker
        if worker is None or worker.applied_step is None:
            return None
        if isinstance(worker, ShardWorker) and not worker.has_whole_states:
            return None  # of no segment is enough here
        stages = worker.ends if isinstance(worker, EndsWorker) else (worker,)
        return live_stage(
            [s.segments for s in stages],
            worker.applied_step,
            gradients_complete=self._reaches_next(worker, worker.applied_step),
        )

    def _live_shard(self) -> LiveShard | None:
        worker = self.worker
        if not isinstance(worker, ShardWorker) or worker.has_whole_states:
            return None
        step = worker.applied_step
        if step is None:
            return None
        return LiveShard(
            weights=worker.share.weights,
            rank=worker.share.rank,
            step=step,
            gradients_complete=self._reaches_next(worker, step),
        )

    def _reaches_next(self, worker: Worker, step: int) -> bool:
        """Whether the update after `step` can be applied, or is on its way."""
        return worker.gradients_complete or self.released_step > step
