"""What a link loses when it ends and is back at once: nothing waits for it for ever."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from p2ptrain.agreement.run_events import ViewDecided
from p2ptrain.agreement.run_messages import StepRecorded
from p2ptrain.runtime.reports import TrainResult
from p2ptrain.training.messages import Done, Ready
from tests.disturbed_runs import SECONDS_MAX, Disturbed, assert_same, request, undisturbed
from tests.memory_group import memory_group


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The undisturbed run."""
    return undisturbed(tmp_path_factory.mktemp("alone"))


async def test_done_that_the_tie_breaker_missed_holds_nobody_up(
    tmp_path: Path, alone: TrainResult
) -> None:
    async with memory_group(tmp_path, 2) as group:
        run = Disturbed(group)
        group[1].drops = lambda message: isinstance(message, Done) and message.step == 5
        with trio.fail_after(SECONDS_MAX):
            await run.train(request(tmp_path, stages=2))
    assert run.result is not None
    assert_same(run.result, alone)


@pytest.mark.parametrize("count", [2, 3])
async def test_dones_that_a_link_took_with_it_hold_nobody_up(
    count: int, tmp_path: Path, alone: TrainResult
) -> None:
    async with memory_group(tmp_path, count) as group:
        run = Disturbed(group)
        losers = set[int]()

        def losing(index: int) -> Callable[[object], bool]:
            """Each lacks the other's, so no record of the step can be made in this view."""

            def drops(message: object) -> bool:
                is_lost = (
                    isinstance(message, Done) and message.step == 5 and message.stamp.view == 1
                )
                losers.update({index} if is_lost else ())
                group.changed.notify()
                return is_lost

            return drops

        group[0].drops, group[1].drops = losing(0), losing(1)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, request(tmp_path, stages=count))
                await group.wait(lambda: len(losers) == 2)
                group.break_link(group[0].device, group[1].device)
                group.heal_link(group[0].device, group[1].device)
    assert run.result is not None
    assert_same(run.result, alone)


async def test_ready_that_was_lost_is_said_again(tmp_path: Path, alone: TrainResult) -> None:
    async with memory_group(tmp_path, 2) as group:
        run = Disturbed(group)
        lost: list[object] = []

        def drops(message: object) -> bool:
            """The first one, as by a member that did not know of the run yet."""
            is_first = isinstance(message, Ready) and not lost
            lost.extend([message] if is_first else [])
            return is_first

        group[1].drops = drops
        with trio.fail_after(SECONDS_MAX):
            await run.train(request(tmp_path, stages=2))
    assert lost
    assert run.result is not None
    assert_same(run.result, alone)


async def test_view_that_is_told_late_does_not_end_the_work_of_a_later_one(
    tmp_path: Path, alone: TrainResult
) -> None:
    async with memory_group(tmp_path, 3) as group:
        run = Disturbed(group)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, request(tmp_path, stages=3))
                await run.wait_step(4)
                member = group[0].runs.member
                assert member is not None
                first = member.view
                assert first is not None
                group.kill(group[2])
                await run.wait_step(7)
                assert member.view is not first
                member.follow(ViewDecided(view=first))
    assert run.result is not None
    assert_same(run.result, alone)


async def test_record_that_nobody_can_have_ends_the_link_and_costs_nothing(
    tmp_path: Path, alone: TrainResult
) -> None:
    async with memory_group(tmp_path, 3) as group:
        run = Disturbed(group)
        forged: list[object] = []

        def drops(message: object) -> bool:
            """Beside its record of step 4 a member tells another one of a step not yet made."""
            if isinstance(message, StepRecorded) and message.records and not forged:
                newest = message.records[-1]
                if newest.step == 4:
                    ahead = replace(newest, step=5, loss=newest.loss + 1.0)
                    forged.append(replace(message, records=(*message.records, ahead)))
                    group[1].send(group[2].device, forged[0])  # one of them is left out then
            return False

        group[1].drops = drops
        with trio.fail_after(SECONDS_MAX):
            await run.train(request(tmp_path, stages=3))
        assert frozenset((group[1].device, group[2].device)) in group.broken
    assert run.result is not None
    assert_same(run.result, alone)
