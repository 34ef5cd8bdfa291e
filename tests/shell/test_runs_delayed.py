"""Runs under ZB-H1: the bits of any other schedule, through losses of members as well."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import trio

from p2ptrain.runtime.compute.stage import StageWorker
from p2ptrain.runtime.reports import PlanReport, StepReport, TrainResult
from p2ptrain.schedule.actions import SCHEDULES, delays_gradients
from p2ptrain.store.bundles import Bundle
from p2ptrain.training.contract import OptimizerChoice
from tests.adapted_bundle import adapted_bundle
from tests.bundles import CONTEXT, VOCABULARY, tiny_bundle
from tests.memory_group import MemoryGroup, float_bits, memory_group, request_for, until
from tests.parted_bundle import parted_bundle

CLIPPING = OptimizerChoice(warmup_steps=2, clip_norm=0.05, peak_learning_rate=0.02)
SECONDS_MAX = 60
BUNDLES: dict[str, Callable[[], Bundle]] = {
    "dropout": tiny_bundle,
    "running values, ties, frozen, adapters": adapted_bundle,
}


@pytest.fixture
def delayed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Microbatches whose gradients were computed by themselves, in order."""
    seen: list[int] = []
    inner = StageWorker.backward_gradients

    def gradients(self: StageWorker, *, microbatch: int, sequence: int) -> None:
        if self.contract.microbatches > 1:  # a profile has one
            seen.append(microbatch)
        inner(self, microbatch=microbatch, sequence=sequence)

    monkeypatch.setattr(StageWorker, "backward_gradients", gradients)
    return seen


async def train(
    path: Path, bundle: Bundle, stages: int, **changes: object
) -> tuple[TrainResult, PlanReport]:
    async with memory_group(path, stages) as group:
        with trio.fail_after(SECONDS_MAX):
            asked = request_for(
                path, bundle, **{"optimizer": CLIPPING, "stages": stages, **changes}
            )
            result = await group[0].train(asked)
            await until(lambda: all(m.runs.current_run is None for m in group.members.values()))
        (plan,) = group.reports("plan")
        assert isinstance(plan, PlanReport)
        return result, plan


def written_arrays(path: Path) -> Path:
    """Data for a model of two inputs."""
    rng = np.random.Generator(np.random.Philox(4))
    tokens = rng.integers(0, VOCABULARY, (60, CONTEXT + 1))
    keep = rng.random((60, CONTEXT)) < 0.8
    np.savez(path / "data.npz", tokens=tokens[:, :-1], keep=keep, labels=tokens[:, 1:])
    return path / "data.npz"


def same(result: TrainResult, other: TrainResult) -> bool:
    return (
        float_bits(result.losses) == float_bits(other.losses)
        and result.state_digest == other.state_digest
        and result.heldout_last == other.heldout_last
    )


@pytest.mark.parametrize("name", BUNDLES)
async def test_every_schedule_has_one_curve_on_one_to_three_stages(
    tmp_path: Path, name: str, delayed: list[int]
) -> None:
    bundle = parted_bundle(BUNDLES[name]())
    data = {"data": str(written_arrays(tmp_path))} if len(bundle.manifest.data_ports) > 1 else {}
    one, _ = await train(tmp_path, bundle, 1, **data)
    assert not delayed
    for schedule in SCHEDULES:
        for stages in (1, 2, 3):
            before = len(delayed)
            other, plan = await train(tmp_path, bundle, stages, schedule=schedule, **data)
            assert plan.schedule == schedule
            assert same(other, one), (schedule, stages)
            assert (len(delayed) > before) == (delays_gradients(schedule) and stages > 1)


@pytest.mark.parametrize(
    ("changes", "parted", "said"),
    [
        ({}, False, "no portable backwards in two parts; export the model again"),
        ({"rematerialise": True}, True, "rematerialised backwards stay whole"),
    ],
)
async def test_without_parts_the_schedule_is_1f1b_and_the_plan_says_why(
    tmp_path: Path, delayed: list[int], changes: dict[str, object], parted: bool, said: str
) -> None:
    bundle = parted_bundle(tiny_bundle()) if parted else tiny_bundle()
    one, _ = await train(tmp_path, bundle, 1, **changes)
    other, plan = await train(tmp_path, bundle, 2, schedule="zb-h1", **changes)
    assert same(other, one)
    assert plan.schedule == "1f1b"
    assert [reason for reason in plan.reasons if said in reason]
    assert not delayed


@pytest.mark.parametrize("schedule", SCHEDULES)
async def test_an_evaluation_may_have_more_microbatches_than_a_step(
    tmp_path: Path, schedule: str
) -> None:
    bundle = parted_bundle(tiny_bundle())
    sizes = {"microbatches": 2, "heldout_microbatches": 9, "steps": 2}
    one, _ = await train(tmp_path, bundle, 1, **sizes)
    three, _ = await train(tmp_path, bundle, 3, schedule=schedule, **sizes)
    assert same(three, one)


@pytest.mark.parametrize(("at", "schedule"), [(1, "zb-h1"), (4, "eager-zb-h1")])
async def test_a_lost_stage_is_replayed_to_the_same_bits(
    tmp_path: Path, at: int, schedule: str, delayed: list[int]
) -> None:
    bundle = parted_bundle(tiny_bundle())
    changes = {"steps": 20, "replicate_every": 3}
    alone, _ = await train(tmp_path, bundle, 1, **changes)
    asked = request_for(
        tmp_path, bundle, optimizer=CLIPPING, stages=3, schedule=schedule, **changes
    )
    results: list[TrainResult] = []
    async with memory_group(tmp_path, 3) as group:

        async def conduct() -> None:
            results.append(await group[0].train(asked))

        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(conduct)
                await group.wait(lambda: has_made(group, at))
                victim = next(d for d in stage_devices(group)[1:] if d != group[0].device)
                before = len(delayed)
                group.kill(group.members[victim])
    assert same(results[0], alone)
    assert results[0].stages == 2
    assert len(delayed) > before, "the survivors go on under the same schedule"


def has_made(group: MemoryGroup, step: int) -> bool:
    reports = group.reports("step")
    return any(isinstance(report, StepReport) and report.step >= step for report in reports)


def stage_devices(group: MemoryGroup) -> list[str]:
    plan = group.reports("plan")[0]
    assert isinstance(plan, PlanReport)
    return [stage.device for stage in plan.stages]
