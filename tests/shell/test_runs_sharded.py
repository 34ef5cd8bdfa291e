"""Runs whose model several peers compute together: tensor and sequence parallelism."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import trio

from p2ptrain import limits
from p2ptrain.agreement.run_messages import ViewPrepare
from p2ptrain.bundle.sharding import Mode
from p2ptrain.planner.pace import STEPS_MIN
from p2ptrain.runtime.reports import PlanReport, StepReport, TrainRequest, TrainResult
from p2ptrain.store.bundles import Bundle, load_bundle, shipped_bundles
from p2ptrain.training.contract import OptimizerChoice
from tests.bundles import write_bundle
from tests.memory_group import (
    MemoryGroup,
    float_bits,
    memory_group,
    stopped_after,
    tiny_text,
)
from tests.shipped_training import short_context

SGD = OptimizerChoice(name="sgd", peak_learning_rate=0.05, warmup_steps=2, clip_norm=0.5)
SECONDS_MAX = 60
TOLERANCE = 1e-5


@functools.cache
def bundle() -> Bundle:
    return short_context(load_bundle(shipped_bundles()["gpt-nano"]))


def request_for(path: Path, **changes: object) -> TrainRequest:
    folder, data = path / "bundle", path / "data.txt"
    if not folder.exists():
        write_bundle(folder, bundle())
        data.write_bytes(tiny_text())
    asked = {
        "bundle": str(folder), "data": str(data), "steps": 4, "microbatches": 2,
        "microbatch_size": 2, "threads": 1, "heldout_microbatches": 2, "checkpoint_every": 0,
        "optimizer": SGD,
    } | changes  # fmt: skip
    if "resume" in changes:
        asked |= {"bundle": "", "data": ""}
    return TrainRequest(**asked)  # type: ignore[arg-type]  # fields by name


def plan_text(group: MemoryGroup, mode: Mode | None, weights: Sequence[int]) -> str:
    """One stage of all segments, shared among the group's first members."""
    names = [group[rank].name for rank in range(len(weights))]
    table = f"[[stage]]\ndevices = {names}\nsegments = {len(bundle().manifest.segments)}\n"
    return table + (f'split = "{mode}"\nweights = {list(weights)}\n' if mode else "")


async def train(
    path: Path, mode: Mode | None, weights: Sequence[int], **changes: object
) -> tuple[TrainResult, MemoryGroup]:
    async with memory_group(path, len(weights)) as group:
        asked = {"plan": plan_text(group, mode, weights)} | changes
        with trio.fail_after(SECONDS_MAX):
            result = await group[0].train(request_for(path, **asked))
        assert not group.broken, "a peer did what another one refuses, and the run went on without"
        return result, group


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """One peer's run."""
    return trio.run(train, tmp_path_factory.mktemp("one"), None, (1,))[0]


@pytest.mark.parametrize(
    ("mode", "weights"),
    [("tensor", (1, 1)), ("tensor", (2, 1, 1)), ("sequence", (4, 3)), ("sequence", (1, 1, 1))],
)
async def test_shards_agree_with_one_peer(
    mode: Mode, weights: tuple[int, ...], tmp_path: Path, one: TrainResult
) -> None:
    shared, group = await train(tmp_path, mode, weights)
    (report,) = group.reports("plan")
    assert isinstance(report, PlanReport)
    assert [stage.split for stage in report.stages] == [mode] * len(weights)
    np.testing.assert_allclose(shared.losses, one.losses, rtol=TOLERANCE)
    assert shared.heldout_last == pytest.approx(one.heldout_last, rel=TOLERANCE)
    again, _ = await train(tmp_path, mode, weights)
    assert float_bits(again.losses) == float_bits(shared.losses)
    assert again.state_digest == shared.state_digest


@pytest.mark.parametrize("mode", ["tensor", "sequence"])
async def test_stop_and_resume_by_other_shards_or_none(mode: Mode, tmp_path: Path) -> None:
    """Checkpoints hold whole states, whoever had the slices."""
    whole, _ = await train(tmp_path, mode, (2, 1), steps=6)
    async with memory_group(tmp_path, 3) as group:
        with trio.fail_after(SECONDS_MAX):
            asked = {"plan": plan_text(group, mode, (2, 1)), "steps": 6}
            first = await stopped_after(group, 2, request_for(tmp_path, **asked))
            assert first.stopped
            text = plan_text(group, mode, (1, 1, 1))
            second = await stopped_after(
                group, 3, request_for(tmp_path, resume=first.run, plan=text)
            )
            text = plan_text(group, None, (1,))
            third = await group[0].train(request_for(tmp_path, resume=first.run, plan=text))
    assert float_bits(first.losses) == float_bits(whole.losses[: first.steps])
    losses = (*first.losses, *second.losses, *third.losses)
    np.testing.assert_allclose(losses, whole.losses, rtol=TOLERANCE)
    assert second.heldout_first == pytest.approx(first.heldout_last, rel=TOLERANCE)


async def test_under_sequence_sharding_the_others_go_on_with_what_they_have(
    tmp_path: Path,
) -> None:
    """Every shard has all parameters: no committed step is lost or done again."""
    whole, _ = await train(tmp_path, "sequence", (1, 1, 1), steps=8)
    async with memory_group(tmp_path, 3) as group:
        text, results = plan_text(group, "sequence", (1, 1, 1)), list[TrainResult]()

        async def conduct() -> None:
            asked = request_for(tmp_path, steps=8, plan=text)
            results.append(await group[0].train(asked))

        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(conduct)
                await group.wait(lambda: len(group.reports("step")) >= 3)
                group.kill(group[2])
        (result,) = results
        steps = [report.step for report in group.reports("step") if isinstance(report, StepReport)]
    assert result.steps == 8
    assert steps == sorted(set(steps))
    assert float_bits(result.losses[:3]) == float_bits(whole.losses[:3])
    np.testing.assert_allclose(result.losses, whole.losses, rtol=TOLERANCE)


@pytest.mark.parametrize("mode", ["tensor", "sequence"])
async def test_a_shard_that_becomes_slow_keeps_its_part(
    mode: Mode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "DRIFT_FOR_S", 0.0)
    monkeypatch.setattr(limits, "DRIFT_SAMPLE_S", 0.0)
    steps = 2 * STEPS_MIN + 12
    async with memory_group(tmp_path, 2) as group:

        async def slow_down() -> None:
            await group.wait(lambda: len(group.reports("step")) >= 2)
            group[1].work.slowness = 4

        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(slow_down)
                asked = request_for(tmp_path, steps=steps, plan=plan_text(group, mode, (1, 1)))
                result = await group[0].train(asked)
        told = [message for member in group.members.values() for message in member.received]
    assert result.steps == steps
    assert not any(isinstance(message, ViewPrepare) for message in told)
