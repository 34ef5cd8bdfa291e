"""Snapshots travel to their keeper in the background, and only what is durable counts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from p2ptrain import limits
from p2ptrain.engine.contract import Engine
from p2ptrain.engine.onnxruntime_engine import open_engine
from p2ptrain.errors import PeerLost, RemoteProtocolError
from p2ptrain.ids import DeviceId, Digest
from p2ptrain.runtime.keeping.replication import ReplicaKeeper, SnapshotOwner
from p2ptrain.runtime.signal import Signal
from p2ptrain.store.replicas import ReplicaPlace, ReplicaStore
from p2ptrain.training.messages import SegmentSaved, stamp_of
from p2ptrain.training.segment_state import values_bytes
from p2ptrain.wire.frames import BulkHeader
from tests.blob_net import BlobNet
from tests.bundles import contract_for
from tests.pipelines import LocalPipeline
from tests.sim.plans import device, make_plan
from tests.varied_bundle import varied_bundle

OWNER, KEEPER, OTHER = device(0), device(1), device(2)
BUNDLE = varied_bundle()
NAMES = BUNDLE.manifest.updates["adamw"].state
TEXT = np.frombuffer(b"a copy elsewhere, before it is needed " * 30, np.uint8)
PLAN = make_plan(OWNER, KEEPER)
STAMP = stamp_of(PLAN)
SEGMENTS = len(BUNDLE.manifest.segments)
BLOBS = SEGMENTS - 1
"""The first and the last segment hold copies of one table, and so one state."""


@pytest.fixture(scope="module")
def engine() -> Engine:
    return open_engine(threads=1)


class Pair:
    """An owner of the whole model, its keepers, and the messages between them."""

    def __init__(
        self, net: BlobNet, engine: Engine, path: Path, keepers: tuple[int, ...],
        receives: tuple[int, ...],
    ) -> None:  # fmt: skip
        self.net = net
        contract = contract_for(BUNDLE)
        self.pipeline = LocalPipeline.make(engine, BUNDLE, contract, (), TEXT)
        (self.worker,) = self.pipeline.workers
        self.changed = Signal()
        self.announced: list[tuple[DeviceId, SegmentSaved]] = []
        self.stored: list[SegmentSaved] = []
        self.whole: list[int] = []
        self.hold = False
        """Keepers hear of nothing."""
        self.receives = receives
        """Segments that the third device gets next; it is told nothing of them by itself."""
        self.owner = SnapshotOwner(
            worker=self.worker, bundle=BUNDLE.digest,
            keepers=[net.devices[index] for index in keepers], blobs=net[0],
            receivers=[(OTHER, segment) for segment in receives],
            announce=self._announce,
        )  # fmt: skip
        self.stores = {index: ReplicaStore(path / f"{index}" / PLAN.run, BUNDLE.manifest, NAMES)
                       for index in keepers}  # fmt: skip
        self.keepers = {index: self._keeper(index) for index in keepers}

    def _keeper(self, index: int) -> ReplicaKeeper:
        def on_stored(saved: SegmentSaved) -> None:
            self.stored.append(saved)
            held = self.net.devices[index]
            if self.owner.stored(held, saved.step, saved.segment, saved.state):
                self.whole.append(saved.step)
            self.changed.notify()

        return ReplicaKeeper(
            contract=contract_for(BUNDLE),
            store=self.stores[index], manifest=BUNDLE.manifest, state_names=NAMES,
            blobs=self.net[index], on_stored=on_stored,
        )  # fmt: skip

    def _announce(self, keeper: DeviceId, saved: SegmentSaved) -> None:
        if keeper in self.net.down:
            raise PeerLost("there is no link")
        self.announced.append((keeper, saved))
        if not self.hold and not (keeper == OTHER and self.receives):
            self.keepers[self.net.devices.index(keeper)].announce(OWNER, saved)
        self.changed.notify()

    def train(self, step: int) -> list[Digest]:
        self.pipeline.train(step, step)
        return [state.digest() for state in self.pipeline.states(step)]

    async def wait(self, count: int) -> None:
        """Until that many segments are stored."""
        with trio.fail_after(30):
            await self.changed.wait_until(lambda: len(self.stored) >= count)


@asynccontextmanager
async def running(
    engine: Engine, path: Path, keepers: tuple[int, ...] = (1,), receives: tuple[int, ...] = ()
) -> AsyncIterator[Pair]:
    async with trio.open_nursery() as nursery:
        net = BlobNet(nursery, 3, (OWNER, KEEPER, OTHER))
        pair = Pair(net, engine, path, keepers, receives)
        nursery.start_soon(pair.owner.run)
        for keeper in pair.keepers.values():
            nursery.start_soon(keeper.run)
        yield pair
        nursery.cancel_scope.cancel()


def digests(store: ReplicaStore, step: int) -> list[Digest]:
    places = [ReplicaPlace(lineage=0, step=step, segment=index) for index in range(SEGMENTS)]
    return [store.read(place).state.digest() for place in places]


async def test_snapshot_is_stored_while_training_goes_on(engine: Engine, tmp_path: Path) -> None:
    async with running(engine, tmp_path) as pair:
        at_one = pair.train(1)
        await pair.owner.snapshot(STAMP, 1)
        pair.train(2)
        await pair.wait(SEGMENTS)
        assert pair.whole == [1]
        assert digests(pair.stores[1], 1) == at_one
        assert [saved.segment for saved in pair.stored] == list(range(SEGMENTS))
        assert pair.net[0].statistics().published_count == 0, "memory is free again"
        stored = pair.owner.statistics()
        assert (stored.snapshot_count, stored.stored_step, stored.taken_count) == (0, 1, 1)
        kept = pair.keepers[1].statistics()
        assert (kept.waiting_count, kept.stored_count, kept.failed_count) == (0, SEGMENTS, 0)
        values = [values_bytes(BUNDLE.manifest, index, NAMES) for index in range(SEGMENTS)]
        assert kept.fetched_bytes == sum(values)


async def test_step_is_stored_when_every_keeper_has_it(engine: Engine, tmp_path: Path) -> None:
    async with running(engine, tmp_path, keepers=(1, 2)) as pair:
        at_one = pair.train(1)
        await pair.owner.snapshot(STAMP, 1)
        await pair.wait(2 * SEGMENTS - 1)
        assert len(pair.stored) == 2 * SEGMENTS or pair.whole == []
        await pair.wait(2 * SEGMENTS)
        assert pair.whole == [1]
        for store in pair.stores.values():
            assert digests(store, 1) == at_one


async def test_newer_snapshot_takes_the_place_of_one_that_nobody_stored(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "REPLICA_WAIT_S", 0.05)  # for a keeper that does not store
    async with running(engine, tmp_path) as pair:
        pair.hold = True
        pair.train(1)
        size = sum(state_bytes(pair, 1))
        await pair.owner.snapshot(STAMP, 1)
        await pair.changed.wait_until(lambda: len(pair.announced) == SEGMENTS)
        assert pair.owner.statistics().snapshot_bytes == size
        at_two = pair.train(2)
        await pair.owner.snapshot(STAMP, 2)
        assert pair.owner.statistics().snapshot_count == 2
        assert pair.owner.statistics().snapshot_bytes == 2 * size
        pair.train(3)
        await pair.owner.snapshot(STAMP, 3)  # waits until the second is hashed
        assert pair.owner.statistics().snapshot_count <= 2
        await pair.changed.wait_until(lambda: len(pair.announced) == 3 * SEGMENTS)
        assert pair.owner.statistics().replaced_count == 2
        assert pair.net[0].statistics().published_count == BLOBS
        second = next(saved for _, saved in pair.announced if saved.step == 2)
        assert second.state == at_two[0]
        assert not pair.owner.stored(KEEPER, 2, 0, second.state), "of a snapshot that is gone"


async def test_set_is_receiving_until_the_joiner_has_its_segments_of_it(
    engine: Engine, tmp_path: Path, mock_clock: MockClock
) -> None:
    async with running(engine, tmp_path, receives=(1, 2)) as pair:
        assert not pair.owner.is_receiving
        states = pair.train(1)
        await pair.owner.snapshot(STAMP, 1)
        assert pair.owner.is_receiving
        await pair.wait(SEGMENTS)
        told = [saved.segment for device, saved in pair.announced if device == OTHER]
        assert told == [1, 2]
        assert not pair.owner.stored(OTHER, 1, 1, states[1])
        assert pair.owner.is_receiving, "the keeper has everything, the joiner one segment of two"
        assert pair.owner.stored(OTHER, 1, 2, states[2])
        assert not pair.owner.is_receiving
        pair.train(2)
        await pair.owner.snapshot(STAMP, 2)
        assert pair.owner.is_receiving
        await pair.wait(2 * SEGMENTS)
        before = trio.current_time()
        await pair.owner.snapshot(STAMP, 3)
        assert trio.current_time() == before, "nobody waits for the joiner"
        mock_clock.jump(limits.ADVANCE_S)
        assert not pair.owner.is_receiving, "a joiner that stores nothing holds back no more sets"


def state_bytes(pair: Pair, step: int) -> list[int]:
    header = pair.pipeline.header
    return [
        len(state.to_bytes(header(index, step)))
        for index, state in enumerate(pair.pipeline.states(step))
    ]


async def test_keeper_goes_on_to_the_newer_snapshot_in_the_middle_of_an_older(
    engine: Engine, tmp_path: Path
) -> None:
    async with running(engine, tmp_path) as pair:
        pair.train(1)
        taken = trio.Event()

        def after_two(header: BulkHeader) -> None:
            if len(pair.stored) == 2:
                taken.set()
                pair.net.on_chunk = lambda header: None

        pair.net.on_chunk = after_two
        await pair.owner.snapshot(STAMP, 1)
        await taken.wait()
        at_two = pair.train(2)
        await pair.owner.snapshot(STAMP, 2)
        await pair.changed.wait_until(lambda: pair.whole[-1:] == [2])
        assert digests(pair.stores[1], 2) == at_two
        steps = [held.step for held in pair.stores[1].held(STAMP.lineage)]
        assert steps in ([1, 2], [1, 1, 2])
        pair.stores[1].forget_before(STAMP.lineage, 2)
        assert pair.stores[1].statistics().set_count == 1


async def test_only_the_announced_digest_of_a_keeper_counts(engine: Engine, tmp_path: Path) -> None:
    async with running(engine, tmp_path) as pair:
        pair.hold = True
        at_one = pair.train(1)
        await pair.owner.snapshot(STAMP, 1)
        await pair.changed.wait_until(lambda: len(pair.announced) == SEGMENTS)
        for segment in range(SEGMENTS):
            assert pair.owner.state(1, segment) == at_one[segment]
            assert not pair.owner.stored(KEEPER, 1, segment, Digest("0" * 64))
            assert not pair.owner.stored(OTHER, 1, segment, at_one[segment])
            assert not pair.owner.stored(KEEPER, 2, segment, at_one[segment])
        last = SEGMENTS - 1
        found = [pair.owner.stored(KEEPER, 1, i, at_one[i]) for i in (*range(last), 0, last)]
        assert found == [False] * SEGMENTS + [True]


async def test_replica_is_tried_again_after_the_transfer_broke(
    engine: Engine, tmp_path: Path, mock_clock: MockClock
) -> None:
    async with running(engine, tmp_path) as pair:
        at_one = pair.train(1)
        broken = trio.Event()

        def drop(header: BulkHeader) -> None:
            pair.net.on_chunk = lambda header: None
            pair.net[1].peer_down(OWNER)  # the link breaks and comes back
            broken.set()

        pair.net.on_chunk = drop
        await pair.owner.snapshot(STAMP, 1)
        await broken.wait()
        await pair.changed.wait_until(lambda: len(pair.stored) == SEGMENTS - 1)
        await trio.testing.wait_all_tasks_blocked()
        assert pair.keepers[1].statistics().waiting_count == 1
        mock_clock.jump(limits.REPLICA_RETRY_S)
        await pair.changed.wait_until(lambda: len(pair.stored) == SEGMENTS)
        assert pair.keepers[1].statistics().failed_count == 1
        assert digests(pair.stores[1], 1) == at_one


async def test_keeper_without_a_link_is_told_when_it_is_back(
    engine: Engine, tmp_path: Path
) -> None:
    async with running(engine, tmp_path) as pair:
        pair.train(1)
        pair.net.down.add(KEEPER)
        await pair.owner.snapshot(STAMP, 1)
        await pair.owner._signal.wait_until(lambda: pair.owner._fresh is None)
        pair.owner.peer_up(OTHER)
        assert pair.announced == []
        pair.net.down.clear()
        pair.owner.peer_up(KEEPER)
        await pair.wait(SEGMENTS)
        assert pair.whole == [1]


async def test_disk_that_is_full_is_said_and_tried_again(
    engine: Engine, tmp_path: Path, mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(engine, tmp_path) as pair:
        monkeypatch.setattr("p2ptrain.store.replicas.free_bytes", lambda path: 1 << 20)
        pair.train(1)
        await pair.owner.snapshot(STAMP, 1)
        keeper = pair.keepers[1]
        while keeper.statistics().failed_count < SEGMENTS:
            await trio.testing.wait_all_tasks_blocked()
        refusal = keeper.statistics().refusal
        assert refusal is not None
        assert "1 MiB of disk are free" in refusal
        monkeypatch.undo()
        mock_clock.jump(limits.REPLICA_RETRY_S)
        await pair.changed.wait_until(lambda: len(pair.stored) == SEGMENTS)
        assert keeper.statistics().refusal is None


async def test_replica_that_is_not_what_was_announced_is_given_up(
    engine: Engine, tmp_path: Path
) -> None:
    async with running(engine, tmp_path) as pair:
        pair.hold = True
        pair.train(1)
        await pair.owner.snapshot(STAMP, 1)
        await pair.changed.wait_until(lambda: len(pair.announced) == SEGMENTS)
        keeper = pair.keepers[1]
        for _, saved in pair.announced[:2]:
            size = values_bytes(BUNDLE.manifest, saved.segment, NAMES)
            pair.net[0].publish(bytes(size), digest=saved.state)
        for _, saved in pair.announced[:3]:
            keeper.announce(OWNER, saved)
        await pair.wait(1)
        assert [saved.segment for saved in pair.stored] == [2]
        assert keeper.statistics().failed_count == 2
        assert keeper.statistics().waiting_count == 0
        assert pair.stores[1].statistics().replica_count == 1


async def test_wild_announcements_are_refused(engine: Engine, tmp_path: Path) -> None:
    async with running(engine, tmp_path) as pair:
        keeper = pair.keepers[1]

        def saved(**changes: object) -> SegmentSaved:
            fields = {"stamp": STAMP, "step": 5, "segment": 1, "state": "2" * 64}
            return SegmentSaved(**{"checkpoint": False, **fields, **changes})

        for changes in ({"segment": -1}, {"segment": SEGMENTS}):
            with pytest.raises(RemoteProtocolError):
                keeper.announce(OWNER, saved(**changes))
        keeper.announce(OWNER, saved())
        with pytest.raises(RemoteProtocolError, match="against the plan"):
            keeper.announce(OWNER, saved(step=4))
        keeper.peer_down(KEEPER)
        assert keeper.statistics().waiting_count == 1
        keeper.peer_down(OWNER)
        assert keeper.statistics().waiting_count == 0


async def test_cancelled_owner_offers_nothing_and_known_replicas_are_not_fetched_again(
    engine: Engine, tmp_path: Path
) -> None:
    async with running(engine, tmp_path) as pair:
        pair.train(1)
        await pair.owner.snapshot(STAMP, 1)
        await pair.wait(SEGMENTS)
        asked = len(pair.net.sent)
        pair.hold = True
        await pair.owner.snapshot(STAMP, 1)
        await pair.changed.wait_until(lambda: len(pair.announced) == 2 * SEGMENTS)
        for _, saved in pair.announced[SEGMENTS:]:
            pair.keepers[1].announce(OWNER, saved)
        await pair.wait(2 * SEGMENTS)
        assert len(pair.net.sent) == asked
        await pair.owner.snapshot(STAMP, 1)
        await pair.changed.wait_until(lambda: len(pair.announced) == 3 * SEGMENTS)
        assert pair.net[0].statistics().published_count == BLOBS
    assert pair.net[0].statistics().published_count == 0
