"""Runs that lose members go on to the same bits: one group in one process, real engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from p2ptrain.runtime.reports import TrainRequest, TrainResult
from p2ptrain.runtime.runs.run_status import run_status_report
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
from tests.memory_group import (
    Member,
    MemoryGroup,
    float_bits,
    memory_group,
    request_for,
    until,
)
from tests.replicated import plan_text


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The undisturbed run."""
    return undisturbed(tmp_path_factory.mktemp("alone"))


async def disturbed(
    path: Path, members: int, asked: TrainRequest, act: Callable[[Disturbed], object], *, at: int
) -> tuple[TrainResult, MemoryGroup]:
    """Train with an act after step `at`; the result and the group as it was at the end."""
    async with memory_group(path, members) as group:
        run = Disturbed(group)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, asked)
                await run.wait_step(at)
                act(run)
    assert run.result is not None
    return run.result, group


def takes_part(group: MemoryGroup, member: Member) -> bool:
    """Whether the home peer is in a view with that member."""
    home = group[0].runs.member
    return home is not None and home.view is not None and member.device in home.view.members


def kill_stage(run: Disturbed, index: int) -> Member:
    victim = run.group.members[run.stage_devices()[index]]
    assert victim.device != run.group[0].device
    run.group.kill(victim)
    return victim


@pytest.mark.parametrize("at", [1, 2, 3, 4, 7])
async def test_lost_stage_is_replayed_by_a_survivor(
    tmp_path: Path, alone: TrainResult, at: int
) -> None:
    def act(run: Disturbed) -> None:
        others = [i for i, d in enumerate(run.stage_devices()) if d != run.group[0].device]
        kill_stage(run, others[at % len(others)])

    result, _ = await disturbed(tmp_path, 3, request(tmp_path, stages=3), act, at=at)
    assert_same(result, alone)
    assert result.stages == 2


@pytest.mark.parametrize("index", [1, 2])
@pytest.mark.parametrize("kind", ["activation", "cotangent", "release", "labels"])
async def test_stage_lost_while_tensors_travel(
    tmp_path: Path, alone: TrainResult, index: int, kind: str
) -> None:
    """The home peer has the first stage, so that labels travel, too."""
    plan = plan_text([((peer,), segments, (1,)) for peer, segments in enumerate((2, 2, 2))])
    asked = request(tmp_path, plan=plan, checkpoint_every=2, evaluate_every=1)
    async with memory_group(tmp_path, 3) as group:
        run = Disturbed(group)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, asked)
                await run.wait_step(5)
                count = len(group.tensors)
                await group.wait(lambda: any(h.kind == kind for _, _, h in group.tensors[count:]))
                group.kill(group[index])
        # Links between those that are left are as they were.
        assert all(group[index].device in pair for pair in group.broken)
    assert run.result is not None
    assert_same(run.result, alone)


async def test_two_losses_one_after_the_other(tmp_path: Path, alone: TrainResult) -> None:
    async with memory_group(tmp_path, 4) as group:
        run = Disturbed(group)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, request(tmp_path, stages=4))
                await run.wait_step(4)
                group.kill(group[1])
                await run.wait_step(9)
                group.kill(group[3])
    assert run.result is not None
    assert_same(run.result, alone)


async def test_broken_link_between_members_that_live_changes_the_view_only(
    tmp_path: Path, alone: TrainResult
) -> None:
    async with memory_group(tmp_path, 3) as group:
        run = Disturbed(group)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, request(tmp_path, stages=3))
                await run.wait_step(5)
                group.break_link(group[1].device, group[2].device)
                group.heal_link(group[1].device, group[2].device)
    assert run.result is not None
    assert_same(run.result, alone)
    assert run.result.stages == 3


async def test_member_in_reserve_takes_a_lost_stage_whole(
    tmp_path: Path, alone: TrainResult
) -> None:
    async with memory_group(tmp_path, 4) as group:
        run = Disturbed(group)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, request(tmp_path, stages=3))
                await run.wait_step(7)
                victim = next(d for d in run.stage_devices() if d != group[0].device)
                group.kill(group.members[victim])
    assert run.result is not None
    assert_same(run.result, alone)


@pytest.mark.parametrize("members", [2, 3])
async def test_home_peer_lost_with_a_second_copy_of_the_data(
    tmp_path: Path, alone: TrainResult, members: int
) -> None:
    """Three go on; of two the one without the tie-breaker pauses and says what helps."""
    async with memory_group(tmp_path, members) as group:
        run = Disturbed(group)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, request(tmp_path, stages=members))
                await until(lambda: all(len(copies(m)) == 2 for m in group.members.values()))
                await run.wait_step(5)
                group.kill(group[0])
                nursery.cancel_scope.cancel()
            survivor = group[1]
            if members == 2:
                await until(lambda: survivor.runs.member.paused is not None)
                status = run_status_report(survivor.runs.member)
                run_name = survivor.runs.member.state.run[:8]
                assert status.waits_for == (
                    "paused: no quorum (1 of 2: peer-0 missing); goes on when it is back, or start "
                    f"it anew here with --resume {run_name} --force-view"
                )
                return
            left = [group[1], group[2]]
            await until(lambda: all(member.runs.current_run is None for member in left))
        assert_stored(left, alone)


async def test_newcomer_gets_a_part_and_changes_no_bit(tmp_path: Path, alone: TrainResult) -> None:
    async with memory_group(tmp_path, 4) as group:
        group.leave_out(group[3])
        run = Disturbed(group)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, request(tmp_path, stages=3, steps=STEPS))
                await run.wait_step(3)
                async with group.held_link(group[0].device, group[1].device):
                    group.let_in(group[3])  # the run stands still: it does not end before
                    await until(lambda: takes_part(group, group[3]))
    assert run.result is not None
    assert_same(run.result, alone)
    assert run.result.peers == 4


@pytest.mark.parametrize("who", [0, 1])
async def test_member_that_leaves_hands_over_first(
    tmp_path: Path, alone: TrainResult, who: int
) -> None:
    async with memory_group(tmp_path, 3) as group:
        run = Disturbed(group)
        said: list[str | None] = []

        async def leave() -> None:
            group[who].leaves = True
            said.append(await group[who].runs.leave())

        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train_or_hand_over, request(tmp_path, stages=3))
                await until(lambda: all(len(copies(m)) == 2 for m in group.members.values()))
                await run.wait_step(5)
                nursery.start_soon(leave)
            others = [m for m in group.members.values() if m is not group[who]]
            await until(lambda: all(member.runs.current_run is None for member in others))
        assert said == [None]
        if who == 0:
            assert run.result is None
            assert_stored(others, alone)
        else:
            assert run.result is not None
            assert_same(run.result, alone)


async def test_data_that_stays_pauses_the_run_until_its_peer_returns(
    tmp_path: Path, alone: TrainResult
) -> None:
    async with memory_group(tmp_path, 3) as group:
        run = Disturbed(group)
        asked = request(tmp_path, stages=3, keep_data_here=True, checkpoint_every=0)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, asked)
                await run.wait_step(8)
                group.kill(group[0])
                nursery.cancel_scope.cancel()
            others = [group[1], group[2]]
            await until(lambda: any(m.runs.member.paused is not None for m in others))
            sentence = "paused: nobody who is left has the run's data: it takes peer-0 back"
            await until(lambda: {run_status_report(m.runs.member).waits_for for m in others}
                        == {sentence})  # fmt: skip
            home = await group.restart(group[0])
            await until(lambda: home.runs.member is not None)
            await until(lambda: all(m.runs.current_run is None for m in group.members.values()))
        assert_stored([home], alone)


@pytest.mark.parametrize("changes", [{"keep_data_here": True}, {"private": True}])
async def test_home_peer_on_a_low_battery_is_waited_for_where_its_data_stays(
    tmp_path: Path, alone: TrainResult, changes: dict[str, object]
) -> None:
    """It spends nothing below its reserve, and goes on once it is charged."""
    async with memory_group(tmp_path, 3) as group:
        run = Disturbed(group)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, request(tmp_path, stages=3, **changes))
                await run.wait_step(8)
                group[0].leaves = True
                said = await group[0].runs.leave()
                assert said == "this device keeps the run's data: it waits until it is back"
                sentence = "paused: peer-0 leaves with the run's data: it takes peer-0 back"
                await until(lambda: {run_status_report(m.runs.member).waits_for
                                     for m in group.members.values()} == {sentence})  # fmt: skip
                group[0].leaves = False
    assert run.result is not None
    assert_same(run.result, alone)


async def test_pair_goes_on_when_the_tie_breaker_returns(
    tmp_path: Path, alone: TrainResult
) -> None:
    async with memory_group(tmp_path, 2) as group:
        run = Disturbed(group)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, request(tmp_path, stages=2))
                await until(lambda: all(len(copies(m)) == 2 for m in group.members.values()))
                await run.wait_step(8)
                group.kill(group[0])
                nursery.cancel_scope.cancel()
            await until(lambda: group[1].runs.member.paused is not None)
            home = await group.restart(group[0])
            await until(lambda: home.runs.member is not None)
            await until(lambda: all(m.runs.current_run is None for m in group.members.values()))
        assert_stored([home, group[1]], alone)


async def test_killed_stage_peer_that_returns_is_taken_in_again(
    tmp_path: Path, alone: TrainResult
) -> None:
    async with memory_group(tmp_path, 3) as group:
        run = Disturbed(group)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, request(tmp_path, stages=3))
                await run.wait_step(6)
                group.kill(group[2])
                await run.wait_step(10)
                async with group.held_link(group[0].device, group[1].device):
                    fresh = await group.restart(group[2])  # the run does not end before
                    await until(lambda: takes_part(group, fresh))
    assert run.result is not None
    assert_same(run.result, alone)
    assert run.result.peers == 3


async def test_forced_view_goes_on_alone_from_the_very_step(
    tmp_path: Path, alone: TrainResult
) -> None:
    async with memory_group(tmp_path, 2) as group:
        run = Disturbed(group)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, request(tmp_path, stages=2))
                await until(lambda: all(len(copies(m)) == 2 for m in group.members.values()))
                await run.wait_step(8)
                group.kill(group[0])
                nursery.cancel_scope.cancel()
            await until(lambda: group[1].runs.member.paused is not None)
            name = group[1].runs.member.state.run
            wanted = request_for(tmp_path, BUNDLE, resume=name[:8], force_view=True)
            result = await group[1].train(wanted)
    assert float_bits(result.losses) == float_bits(alone.losses)
    assert result.state_digest == alone.state_digest
    assert group[1].runs.member is None
