"""Runs that lose members go on to the same bits: one group in one process, real engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from p2ptrain.ids import DeviceId
from p2ptrain.runtime.reports import PlanReport, StepReport, TrainRequest, TrainResult
from p2ptrain.training.contract import OptimizerChoice
from tests.bundles import tiny_bundle
from tests.memory_group import Member, MemoryGroup, float_bits, memory_group, request_for

CLIPPING = OptimizerChoice(warmup_steps=2, clip_norm=0.05, peak_learning_rate=0.02)
BUNDLE = tiny_bundle()
SECONDS_MAX = 60
STEPS = 14


def request(path: Path, **changes: object) -> TrainRequest:
    fields = {"optimizer": CLIPPING, "steps": STEPS, "replicate_every": 3, **changes}
    return request_for(path, BUNDLE, **fields)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The undisturbed run."""
    path = tmp_path_factory.mktemp("alone")

    async def train() -> TrainResult:
        async with memory_group(path, 1) as group:
            return await group[0].train(request(path))

    return trio.run(train)


def assert_same(result: TrainResult, alone: TrainResult) -> None:
    assert float_bits(result.losses) == float_bits(alone.losses)
    assert result.state_digest == alone.state_digest
    assert result.heldout_last == alone.heldout_last


class Disturbed:
    """A run under way, and what a test does to it."""

    def __init__(self, group: MemoryGroup) -> None:
        self.group = group
        self.result: TrainResult | None = None

    async def train(self, asked: TrainRequest) -> None:
        self.result = await self.group[0].train(asked)

    async def wait_step(self, step: int) -> None:
        await self.group.wait(
            lambda: any(isinstance(r, StepReport) and r.step >= step for _, r in self.group.events)
        )

    def stage_devices(self) -> list[DeviceId]:
        plan = next(r for _, r in self.group.events if isinstance(r, PlanReport))
        return [stage.device for stage in plan.stages]


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
    """The home peer is asked to be elsewhere: the planner puts equal peers in the order of ids."""
    asked = request(tmp_path, stages=3, checkpoint_every=2, evaluate_every=1)
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
