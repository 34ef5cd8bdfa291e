"""Replicas of stage states in the background: the owner's snapshots, the keeper's store.

The owner copies its stage's memory between two steps and goes on training; hashing, publishing and
the keeper's fetching, checking and fsyncing happen beside that. What is waited for and what may be
deleted is decided elsewhere: this only says what is stored.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import trio

from p2ptrain import limits
from p2ptrain.bundle.manifest import Manifest
from p2ptrain.errors import CheckpointError, PeerLost, RemoteProtocolError
from p2ptrain.ids import DeviceId, Digest
from p2ptrain.runtime.exchange.blobs import BlobExchange
from p2ptrain.runtime.exchange.slice_joining import Announced, SliceJoiner
from p2ptrain.runtime.signal import Signal
from p2ptrain.store.replicas import ReplicaPlace, ReplicaStore
from p2ptrain.training.contract import Contract
from p2ptrain.training.messages import SegmentSaved, Stamp
from p2ptrain.training.segment_image import SegmentImage
from p2ptrain.training.segment_state import SegmentState, StateHeader, values_bytes
from p2ptrain.wire.flows import Flow


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotStatistics:
    """What the owner of a stage holds for its keepers."""

    snapshot_count: int
    """In memory now."""
    snapshot_bytes: int
    taken_count: int
    replaced_count: int
    """Snapshots that a newer one replaced before every keeper had stored them."""
    stored_step: int | None
    """The newest step whose states every keeper has stored."""


@dataclass(slots=True)
class _Snapshot:
    stamp: Stamp
    step: int
    taken_at_s: float
    images: dict[int, SegmentImage]
    collector: DeviceId | None = None
    """Who collects it as part of a checkpoint; it stays until that is stored."""
    states: dict[int, Digest] = field(default_factory=dict)
    stored: set[tuple[DeviceId, int]] = field(default_factory=set)
    """Keepers, and the segments that they have."""
    collected: bool = False


class Snapshotted(Protocol):
    """What a device runs of a model, and can be kept."""

    @property
    def segments(self) -> Sequence[int]:
        """The stage's, ascending."""

    def image(self, header: StateHeader) -> SegmentImage:
        """A segment's file with its present state, between two steps; blocking."""


class SnapshotOwner:
    """Takes snapshots of this device's stage and offers them to its keepers.

    At most two are in memory: the one that is offered, and a newer one until it is offered in its
    place. A transfer that is under way then holds on to its one segment until it ends.
    """

    def __init__(
        self,
        *,
        worker: Snapshotted,
        bundle: Digest,
        keepers: Collection[DeviceId],
        receivers: Collection[tuple[DeviceId, int]] = (),
        blobs: BlobExchange,
        announce: Callable[[DeviceId, SegmentSaved], None],
    ) -> None:
        """Nothing happens before `snapshot`.

        Args:
            worker: Of the stage.
            bundle: Of the model.
            keepers: Who stores the stage's replicas.
            receivers: Who is to run which of its segments next, and stores that one, too.
            blobs: Where they are offered.
            announce: Sends a message to a keeper; PeerLost when there is no link.
        """
        self._worker, self._bundle = worker, bundle
        self._receivers = frozenset(receivers)
        self._keepers = frozenset(itertools.product(keepers, worker.segments))
        self._places = self._keepers | self._receivers
        self._blobs, self._announce = blobs, announce
        self._signal = Signal()
        self._fresh: _Snapshot | None = None
        self._offered: _Snapshot | None = None
        self._taken_count = self._replaced_count = 0
        self._stored_step: int | None = None

    @property
    def is_receiving(self) -> bool:
        """Whether a receiver still lacks some of the newest snapshot, not taken long ago.

        One that is replaced meanwhile never reaches a receiver whose link needs longer than the
        time between two sets, so the caller leaves out the next set, unless logs lack the room.
        """
        newest = self._offered if self._fresh is None else self._fresh
        if newest is None or self._receivers <= newest.stored:
            return False
        return trio.current_time() - newest.taken_at_s < limits.ADVANCE_S

    async def snapshot(
        self,
        stamp: Stamp,
        step: int,
        *,
        collector: DeviceId | None = None,
        limiter: trio.CapacityLimiter | None = None,
    ) -> None:
        """Copy the stage's memory as it is after `step`: all that training waits for.

        Between two steps, while `run` runs. Waits until keepers have stored the snapshot before,
        because a set that the next one overtakes is never whole; for one that does not store, no
        longer than REPLICA_WAIT_S, and then takes its place. Always waits for a checkpoint's
        collector, never for receivers. A cancellation leaves the stage as it is, without a
        snapshot.

        Args:
            stamp: Of the view.
            step: Updates applied.
            collector: The home peer, where this is part of a checkpoint.
            limiter: Of the stage's compute thread.
        """
        with trio.move_on_after(limits.REPLICA_WAIT_S):
            await self._signal.wait_until(self._is_idle)
        await self._signal.wait_until(lambda: self._fresh is None and not self._is_awaited())
        images = await trio.to_thread.run_sync(self._copy, stamp, step, limiter=limiter)
        self._fresh = _Snapshot(
            stamp=stamp,
            step=step,
            taken_at_s=trio.current_time(),
            images=images,
            collector=collector,
        )
        self._taken_count += 1
        self._signal.notify()

    async def run(self) -> None:
        """Offer what is taken until cancelled; then nothing is offered any more."""
        try:
            while True:
                await self._signal.wait_until(lambda: self._fresh is not None)
                snapshot = self._fresh
                if snapshot is not None:
                    await self._offer(snapshot)
        finally:
            self._withdraw()

    def stored(self, device: DeviceId, step: int, segment: int, state: Digest) -> bool:
        """A keeper says that it has stored a segment; whether all have all of that step.

        A digest that is not the announced one counts for nothing.
        """
        snapshot = self._offered
        if snapshot is None or snapshot.step != step or (device, segment) not in self._places:
            return False
        if snapshot.states.get(segment) == state:
            snapshot.stored.add((device, segment))
        if not self._is_stored(snapshot):
            return False
        self._stored_step = step
        if not self._is_awaited():
            self._withdraw()
        self._signal.notify()
        return True

    def collected(self, step: int) -> None:
        """The home peer has stored the checkpoint of a step."""
        snapshot = self._offered
        if snapshot is not None and snapshot.step == step:
            snapshot.collected = True
            if self._is_stored(snapshot):
                self._withdraw()
            self._signal.notify()

    def peer_up(self, device: DeviceId) -> None:
        """There is a link with a keeper (again): tell it what it has not stored."""
        if self._offered is not None:
            self._announce_to(device, self._offered)

    def state(self, step: int, segment: int) -> Digest | None:
        """The digest that was announced of a segment of the newest offered step."""
        offered = self._offered
        return offered.states.get(segment) if offered and offered.step == step else None

    def statistics(self) -> SnapshotStatistics:
        """What is held now and what has become of the others."""
        held = {id(s): s for s in (self._fresh, self._offered) if s is not None}.values()
        images = [image for snapshot in held for image in snapshot.images.values()]
        return SnapshotStatistics(
            snapshot_count=len(held),
            snapshot_bytes=sum(len(image.content) for image in images),
            taken_count=self._taken_count,
            replaced_count=self._replaced_count,
            stored_step=self._stored_step,
        )

    def _is_stored(self, snapshot: _Snapshot) -> bool:
        """Whether every keeper and receiver has all that is for it."""
        return snapshot.stored == self._places

    def _is_idle(self) -> bool:
        """Whether nothing waits to be offered, or to be stored by keepers."""
        offered = self._offered
        return self._fresh is None and (offered is None or self._keepers <= offered.stored)

    def _is_awaited(self) -> bool:
        """Whether a checkpoint's collector may still fetch what is offered."""
        offered = self._offered
        return offered is not None and offered.collector is not None and not offered.collected

    def _copy(self, stamp: Stamp, step: int) -> dict[int, SegmentImage]:
        return {segment: self._image(stamp, step, segment) for segment in self._worker.segments}

    def _image(self, stamp: Stamp, step: int, segment: int) -> SegmentImage:
        header = StateHeader(
            run=stamp.run,
            lineage=stamp.lineage,
            view=stamp.view,
            plan=stamp.plan,
            step=step,
            segment=segment,
            bundle=self._bundle,
        )
        return self._worker.image(header)

    async def _offer(self, snapshot: _Snapshot) -> None:
        """Hash every segment, then let it take the place of what was offered before."""
        for segment, image in snapshot.images.items():
            snapshot.states[segment] = await trio.to_thread.run_sync(image.state_digest)
        if self._offered is not None:
            self._replaced_count += 1
        self._withdraw()
        self._fresh, self._offered = None, snapshot
        for segment, image in snapshot.images.items():
            flow = Flow(snapshot.stamp.run, "state")
            self._blobs.publish(image.values, digest=snapshot.states[segment], flow=flow)
        self._signal.notify()
        collector = set() if snapshot.collector is None else {snapshot.collector}
        for device in sorted({keeper for keeper, _ in self._places} | collector):
            self._announce_to(device, snapshot)

    def _announce_to(self, device: DeviceId, snapshot: _Snapshot) -> None:
        """Tell a keeper, or the collector, what it has not stored."""
        collects = device == snapshot.collector
        with contextlib.suppress(PeerLost):  # `peer_up` tells it later, or a view without it
            for segment in snapshot.images:
                place = (device, segment)
                if place not in snapshot.stored and (collects or place in self._places):
                    self._announce(device, _saved(snapshot, segment))

    def _withdraw(self) -> None:
        """Offer nothing any more. A transfer under way keeps its own view of the memory, which
        nobody writes again."""
        if self._offered is not None:
            for state in self._offered.states.values():
                self._blobs.withdraw(state)
        self._offered = None


def _saved(snapshot: _Snapshot, segment: int) -> SegmentSaved:
    return SegmentSaved(
        stamp=snapshot.stamp,
        step=snapshot.step,
        segment=segment,
        state=snapshot.states[segment],
        checkpoint=snapshot.collector is not None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class KeeperStatistics:
    """What a keeper has to fetch, and how that went."""

    waiting_count: int
    stored_count: int
    fetched_bytes: int
    failed_count: int
    """Fetches that ended without a replica; those that are still wanted are tried again."""
    refusal: str | None
    """Why the newest replica could not be stored here; None since the last that could."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    device: DeviceId
    saved: SegmentSaved
    """Of slices that of the first shard."""
    slices: Announced | None = None
    """What all shards have announced, to be joined; None: the segment is whole where it is."""

    def is_from(self, device: DeviceId) -> bool:
        """Whether it takes that device to fetch it."""
        return device == self.device or (self.slices is not None and device in self.slices.devices)


class ReplicaKeeper:
    """Stores the replicas that this device keeps of other members' stages, one at a time.

    Of a sharded model it joins the slices of all shards, and stores whole segments, too.
    """

    def __init__(
        self,
        *,
        store: ReplicaStore,
        manifest: Manifest,
        state_names: tuple[str, ...],
        contract: Contract,
        blobs: BlobExchange,
        on_stored: Callable[[SegmentSaved], None],
    ) -> None:
        """Nothing is fetched before `run`.

        Args:
            store: Opened and scanned.
            manifest: Of the model.
            state_names: The optimizer's state vectors.
            contract: Of the run.
            blobs: To fetch from.
            on_stored: Called when a replica is durable, so that everybody can be told.
        """
        self._store, self._manifest, self._state_names = store, manifest, state_names
        self._contract, self._blobs, self._on_stored = contract, blobs, on_stored
        self._bundle = manifest.digest
        self._wanted: dict[int, _Wanted] = {}
        self._joiner: SliceJoiner | None = None
        self._slices: dict[int, Announced] = {}
        self._signal = Signal()
        self._stored_count = self._fetched_bytes = self._failed_count = 0
        self._refusal: str | None = None

    def begin(self, joiner: SliceJoiner | None) -> None:
        """Another view counts, in which `joiner` joins slices; None: owners have whole segments.

        Slices of the view before are not fetched any more: their owners offer them no longer.
        """
        self._joiner = joiner
        self._slices.clear()
        self._wanted = {s: each for s, each in self._wanted.items() if each.slices is None}
        self._signal.notify()

    def announce(self, device: DeviceId, saved: SegmentSaved) -> None:
        """The owner of a segment has a snapshot to fetch; it replaces an older one. Of a sharded
        model all owners have to say so, in any order.

        The caller has checked that the stamp is the view's and that the device owns the segment.

        Raises:
            RemoteProtocolError: no such segment, or the step is older than one before.
        """
        if not 0 <= saved.segment < len(self._manifest.segments):
            raise RemoteProtocolError(f"a snapshot of segment {saved.segment} was announced")
        if self._joiner is not None:
            self._announce_slices(self._joiner, device, saved)
            return
        before = self._wanted.get(saved.segment)
        if before is not None and before.saved.step > saved.step:
            raise RemoteProtocolError(f"segment {saved.segment} was saved against the plan")
        self._wanted[saved.segment] = _Wanted(device, saved)
        self._signal.notify()

    def _announce_slices(self, joiner: SliceJoiner, device: DeviceId, saved: SegmentSaved) -> None:
        """Note one shard's part of a segment; of the newest step only, which others may have
        reached before this one said what it has of an older one."""
        known = self._slices.get(saved.segment)
        if known is not None and known.step > saved.step:
            return
        if known is None or known.step < saved.step:
            known = self._slices[saved.segment] = Announced(saved.step)
        if joiner.note(known, device, saved):
            first, of_first = known.by_rank[0]
            self._wanted[saved.segment] = _Wanted(first, of_first, known)
            self._signal.notify()

    def peer_down(self, device: DeviceId) -> None:
        """What a member that is gone had announced is not fetched any more."""
        self._wanted = {s: each for s, each in self._wanted.items() if not each.is_from(device)}

    async def run(self) -> None:
        """Fetch and store until cancelled, which leaves no half replica.

        A device that goes away, and a disk that refuses, cost only the replica; what is still
        wanted is tried again after a while.
        """
        while True:
            await self._signal.wait_until(lambda: bool(self._wanted))
            tried = sorted(self._wanted.values(), key=_order)
            for wanted in tried:
                stored = await self._keep(wanted) if self._is_wanted(wanted) else None
                if stored is not None:
                    self._drop(wanted)
                    self._on_stored(stored)
            # What was announced meanwhile is not made to wait for what cannot be had.
            if self._wanted and all(wanted in tried for wanted in self._wanted.values()):
                await self._pause()

    def statistics(self) -> KeeperStatistics:
        """What waits now and what was done."""
        return KeeperStatistics(
            waiting_count=len(self._wanted),
            stored_count=self._stored_count,
            fetched_bytes=self._fetched_bytes,
            failed_count=self._failed_count,
            refusal=self._refusal,
        )

    def _is_wanted(self, wanted: _Wanted) -> bool:
        return self._wanted.get(wanted.saved.segment) is wanted

    def _drop(self, wanted: _Wanted) -> None:
        if self._is_wanted(wanted):
            del self._wanted[wanted.saved.segment]

    async def _pause(self) -> None:
        """Let some time pass, or until something else is announced."""
        before = dict(self._wanted)
        with trio.move_on_after(limits.REPLICA_RETRY_S):
            await self._signal.wait_until(lambda: self._wanted != before)

    async def _keep(self, wanted: _Wanted) -> SegmentSaved | None:
        """What is durable now, with the digest of the whole; it may have been here before."""
        saved, slices = wanted.saved, wanted.slices
        place = ReplicaPlace(lineage=saved.stamp.lineage, step=saved.step, segment=saved.segment)
        known = self._store.replica(place)
        if known is not None and slices is None and known.state == saved.state:
            await trio.lowlevel.checkpoint()
            return saved
        try:
            if slices is None or self._joiner is None:
                await self._fetch(wanted.device, saved)
            else:
                saved = await self._fetch_slices(self._joiner, slices)
        except PeerLost:
            self._failed_count += 1
            return None
        except RemoteProtocolError:
            self._failed_count += 1
            self._drop(wanted)  # it is not what was announced, and never will be
            return None
        except CheckpointError as error:
            self._failed_count += 1
            self._refusal = error.message
            return None
        self._stored_count += 1
        self._refusal = None
        return saved

    async def _fetch(self, device: DeviceId, saved: SegmentSaved) -> None:
        size = values_bytes(self._manifest, saved.segment, self._state_names, self._contract)
        header = saved.header(self._bundle)
        writer = await trio.to_thread.run_sync(self._store.writer, header, saved.state)
        try:
            await self._blobs.fetch_into(device, saved.state, size=size, write=writer.write)
            await trio.to_thread.run_sync(writer.keep, saved.state)
            self._fetched_bytes += size
        except OSError as error:
            raise CheckpointError(f"a replica cannot be stored: {error.strerror}") from error
        finally:
            writer.discard()

    async def _fetch_slices(self, joiner: SliceJoiner, slices: Announced) -> SegmentSaved:
        """Join the slices of all shards; the announcement that the whole would have had."""
        saved, state = await joiner.joined(slices)
        await trio.to_thread.run_sync(self._store_whole, saved, state)
        self._fetched_bytes += sum(map(len, state.values()))
        return saved

    def _store_whole(self, saved: SegmentSaved, state: SegmentState) -> None:
        writer = self._store.writer(saved.header(self._bundle), saved.state)
        try:
            for chunk in state.values():
                writer.write(chunk)
            writer.keep(saved.state)
        except OSError as error:
            raise CheckpointError(f"a replica cannot be stored: {error.strerror}") from error
        finally:
            writer.discard()


def _order(wanted: _Wanted) -> tuple[int, int]:
    return wanted.saved.step, wanted.saved.segment
