"""Losses while a run recovers from one: it goes on to the same bits, or says who must return."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import trio

from p2ptrain.agreement.run_events import ProposalWanted
from p2ptrain.ids import DeviceId
from p2ptrain.planner.plan import Plan
from p2ptrain.planner.profile import KindCost
from p2ptrain.recovery.restoration import Replay
from p2ptrain.runtime.compute.stage import StageWorker
from p2ptrain.runtime.keeping.run_state import RunState
from p2ptrain.runtime.reports import TrainResult
from p2ptrain.runtime.runs.proposing import Proposing
from p2ptrain.runtime.runs.run_status import waits_for
from p2ptrain.runtime.views.restoring import Restorer
from p2ptrain.training.messages import DataOffered, Offer, ReplicaStored
from tests.disturbed_runs import (
    BUNDLE,
    SECONDS_MAX,
    STEPS,
    Disturbed,
    assert_same,
    assert_stored,
    copies,
    request,
    undisturbed,
)
from tests.memory_group import Member, MemoryGroup, memory_group, request_for, until

LEFT_OUT = "the run goes on without this peer"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The undisturbed run."""
    return undisturbed(tmp_path_factory.mktemp("alone"))


@contextlib.asynccontextmanager
async def told_group(path: Path, count: int) -> AsyncIterator[MemoryGroup]:
    """A group that says, when a test fails, where each of its members stood."""
    async with memory_group(path, count) as group:
        try:
            yield group
        except BaseException:
            for member in group.members.values():
                part = member.runs.member
                view = None if part is None else part.view
                stands = None if part is None or view is None else (
                    view.members, part.machine.standing, part.machine.statistics(), part.is_restored
                )  # fmt: skip
                print(member.name, member.lives, entered(member), said(member), stands)
                print(member.runs.last_failure)
            raise


def said(member: Member) -> str:
    """Why the run waits at a member, as `status` shows it."""
    part = member.runs.member
    return "" if part is None else waits_for(part) or ""


def plan_of(member: Member) -> Plan:
    """Of the run that it is in."""
    part = member.runs.member
    assert part is not None
    assert part.plan is not None
    return part.plan


def has_copies(group: MemoryGroup) -> bool:
    return all(len(copies(member)) == 2 for member in group.members.values())


async def all_ended(group: MemoryGroup) -> None:
    await until(lambda: all(m.runs.current_run is None for m in group.members.values() if m.lives))


async def test_run_without_its_data_names_who_must_return_and_goes_on(
    tmp_path: Path, alone: TrainResult
) -> None:
    """The home peer is lost before there is a second copy."""
    async with told_group(tmp_path, 3) as group:
        run = Disturbed(group)
        group[0].drops = lambda message: isinstance(message, DataOffered)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, request(tmp_path, stages=3))
                await run.wait_step(8)
                group.kill(group[0])
                nursery.cancel_scope.cancel()
            sentence = "paused: nobody who is left has the run's data: it takes peer-0 back"
            await until(lambda: all(said(group[index]) == sentence for index in (1, 2)))
            home = await group.restart(group[0])
            await until(lambda: home.runs.member is not None)
            await all_ended(group)
        assert_stored([*group.members.values()], alone)


def entered(member: Member) -> int:
    """The view that a member works in."""
    part = member.runs.member
    work = None if part is None else part.work
    return 0 if work is None else work.plan.view


Hook = Callable[..., Awaitable[object]]


def before(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, act: Callable[..., None]
) -> None:
    """Do something once, ahead of the first call of an async method."""
    inner: Hook = getattr(owner, name)
    done: list[bool] = []

    async def wrapped(self: object, *given: object) -> object:
        if not done:
            done.append(True)
            act(self, *given)
        return await inner(self, *given)

    monkeypatch.setattr(owner, name, wrapped)


async def test_replayer_lost_amid_its_replay_is_replayed_with_its_stage(
    tmp_path: Path, alone: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two data holders at most is lost, so nobody need be waited for."""
    async with told_group(tmp_path, 4) as group:
        run = Disturbed(group)
        replayers: list[DeviceId] = []

        def kill(restorer: Restorer, replay: Replay) -> None:
            replayers.append(replay.replayer)
            group.kill(group.members[replay.replayer])

        before(monkeypatch, Restorer, "_replay", kill)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, request(tmp_path, stages=4))
                await until(lambda: has_copies(group))
                await run.wait_step(8)
                victim = next(d for d in run.stage_devices() if d not in copies(group[0]))
                group.kill(group.members[victim])
                await until(lambda: bool(replayers))
                await all_ended(group)
                nursery.cancel_scope.cancel()
        assert victim not in replayers
        assert_stored([*group.members.values()], alone)


def independent_pair(plan: Plan) -> tuple[DeviceId, DeviceId]:
    """Two devices beside the home peer of which neither keeps the other's replicas."""
    keepers = {
        stage.device: keeper for stage, keeper in zip(plan.stages, plan.replicas, strict=True)
    }
    pairs = itertools.combinations(sorted({*plan.members} - {plan.home}), 2)
    return next(pair for pair in pairs if not {keepers[pair[0]], keepers[pair[1]]} & {*pair})


async def test_member_lost_while_a_view_is_decided_does_not_hold_it_up(
    tmp_path: Path, alone: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It promised, so the view names it; that it is gone was known before that was decided."""
    async with told_group(tmp_path, 4) as group:
        run = Disturbed(group)
        killed: list[DeviceId] = []

        def kill(proposing: Proposing, wanted: ProposalWanted) -> None:
            assert victim in [promise.device for promise in wanted.promises]
            killed.append(victim)
            group.kill(group.members[victim])

        before(monkeypatch, Proposing, "propose", kill)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, request(tmp_path, stages=4))
                await until(lambda: has_copies(group))
                await run.wait_step(8)
                first, victim = independent_pair(plan_of(group[0]))
                group.kill(group.members[first])
        assert killed
    assert run.result is not None
    assert_same(run.result, alone)


async def test_leaver_lost_while_it_hands_over_is_not_waited_for(
    tmp_path: Path, alone: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with told_group(tmp_path, 3) as group:
        run = Disturbed(group)
        leaver: list[Member] = []

        def kill(restorer: Restorer, worker: StageWorker, segment: int, source: DeviceId,
                 step: int) -> None:  # fmt: skip
            assert source == leaver[0].device
            group.kill(leaver[0])

        before(monkeypatch, Restorer, "_load_from", kill)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, request(tmp_path, stages=3))
                await until(lambda: has_copies(group))
                await run.wait_step(8)
                (index,) = [i for i in (1, 2) if group[i].device not in copies(group[0])]
                leaver.append(group[index])
                leaver[0].leaves = True
                nursery.start_soon(leaver[0].runs.leave)
    assert run.result is not None
    assert_same(run.result, alone)


async def test_neighbour_lost_after_a_leave_is_replayed_from_the_logs_of_who_took_over(
    tmp_path: Path, alone: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the next replica set, when the leaver's logs would have gone with it."""
    cost = KindCost(forward_ns=1_000_000, backward_ns=2_000_000)
    costs = dict.fromkeys(BUNDLE.manifest.kinds, cost)
    monkeypatch.setattr(
        "p2ptrain.runtime.compute.known_profiles.profile_kinds", lambda *_, **__: costs
    )
    async with told_group(tmp_path, 5) as group:
        run = Disturbed(group)
        for member in group.members.values():  # no set is whole after that of step 6
            member.drops = lambda m: isinstance(m, ReplicaStored) and m.step > 6
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, request(tmp_path, stages=3))
                await until(lambda: has_copies(group))
                await run.wait_step(8)
                leaver, victim = (group.members[d] for d in run.stage_devices()[1:])
                leaver.leaves = True
                await leaver.runs.leave()
                await until(lambda: is_working(group[0], view=2))
                group.kill(victim)
                for member in group.members.values():
                    member.drops = lambda message: False
    assert run.result is not None
    assert_same(run.result, alone)


def is_working(member: Member, *, view: int) -> bool:
    part = member.runs.member
    work = None if part is None else part.work
    return work is not None and work.plan.view == view and work.started


def spoil(member: Member, step: int) -> int:
    """Damage all replicas of a step on a member's disk; how many there were."""
    paths = [*member.runs_path.glob(f"*/replicas/*-{step:08d}/*.safetensors")]
    for path in paths:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    return len(paths)


def stored_count(group: MemoryGroup, step: int) -> int:
    """How many segments have a replica of a step somewhere."""
    parts = [member.runs.member for member in group.members.values()]
    kept = [r.place for part in parts if part is not None for r in part.state.kept()]
    return len({place.segment for place in kept if place.step == step})


@pytest.mark.parametrize("members", [2, 3])
async def test_damaged_replica_gives_way_to_an_older_one(
    tmp_path: Path, alone: TrainResult, members: int
) -> None:
    """Of two members the survivor keeps it itself; of three it may have to ask."""
    async with told_group(tmp_path, members) as group:
        run = Disturbed(group)
        for member in group.members.values():  # the set of step 3 stays, with the logs since
            member.drops = lambda m: isinstance(m, ReplicaStored) and m.step == 6
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, request(tmp_path, stages=members))
                await until(lambda: has_copies(group))
                others = [m for m in group.members.values() if m is not group[0]]
                await until(lambda: stored_count(group, 6) == len(BUNDLE.manifest.segments))
                group.kill(others[-1])
                assert sum(spoil(m, 6) for m in group.members.values() if m.lives)
    assert run.result is not None
    assert_same(run.result, alone)


async def test_state_whose_only_replica_is_damaged_pauses_and_can_be_forced(
    tmp_path: Path, alone: TrainResult
) -> None:
    async with told_group(tmp_path, 2) as group:
        run, home = Disturbed(group), group[0]
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, request(tmp_path, stages=2))
                await run.wait_step(8)
                group.kill(group[1])
                assert sum(spoil(home, step) for step in range(STEPS + 1))
                await until(lambda: "is lost" in said(home))
                assert "--force-view to go back to step 0" in said(home)
                name = plan_of(home).run[:8]
                forced = request_for(tmp_path, BUNDLE, resume=name, force_view=True)
                await home.train(forced)
    assert run.result is not None
    assert_same(run.result, alone)


async def test_restarted_member_with_a_slow_disk_is_not_left_waiting_in_a_view_without_it(
    tmp_path: Path, alone: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It learns of that view before it has looked at its disk; the offer of a part in the next one
    says that nobody waits for what it keeps, so it is taken in at once."""
    inner, knows = RunState.open_disk, threading.Event()

    def open_disk(state: RunState) -> None:
        assert knows.wait(SECONDS_MAX)
        inner(state)

    async with told_group(tmp_path, 3) as group:
        run = Disturbed(group)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, request(tmp_path, stages=3))
                await run.wait_step(6)
                group.kill(group[2])
                await run.wait_step(9)
                monkeypatch.setattr(RunState, "open_disk", open_disk)
                async with group.held_link(group[0].device, group[1].device):
                    fresh = await group.restart(group[2])
                    await until(lambda: knows_view(fresh) >= 2)
                    knows.set()
                    await until(lambda: fresh.runs.last_failure == LEFT_OUT or is_offered(fresh))
    assert run.result is not None
    assert_same(run.result, alone)


def is_offered(member: Member) -> bool:
    """Whether it left the run and has been offered it again."""
    return any(isinstance(message, Offer) for message in member.received) and (
        member.runs.member is None or not member.runs.member.is_restored
    )


def knows_view(member: Member) -> int:
    part = member.runs.member
    view = None if part is None else part.view
    return 0 if view is None else view.number
