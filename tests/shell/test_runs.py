"""Runs of a whole group in one process: equal curves on any number of stages."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from p2ptrain.errors import ConfigError, Interrupted, NotFound, NumericsError
from p2ptrain.runtime.reports import (
    EvaluationReport,
    PlanReport,
    StepReport,
    TrainRequest,
    TrainResult,
)
from p2ptrain.store.tensors import read_tensors
from p2ptrain.training.contract import OptimizerChoice
from p2ptrain.training.messages import SegmentSaved, Usage
from p2ptrain.training.safetensors import raw_bytes
from tests.bundles import tiny_bundle
from tests.memory_group import (
    MemoryGroup,
    float_bits,
    memory_group,
    request_for,
    stopped_after,
    until,
)

CLIPPING = OptimizerChoice(warmup_steps=2, clip_norm=0.05, peak_learning_rate=0.02)
BUNDLE = tiny_bundle()
SECONDS_MAX = 60


def request(path: Path, **changes: object) -> TrainRequest:
    return request_for(path, BUNDLE, **{"optimizer": CLIPPING, **changes})


async def train(path: Path, *, members: int, **changes: object) -> TrainResult:
    async with memory_group(path, members) as group:
        with trio.fail_after(SECONDS_MAX):
            result = await group[0].train(request(path, **changes))
            assert_idle(group)
            return result


def stored(result: TrainResult) -> bytes:
    """The model that a run has written."""
    return Path(result.model_path or "").read_bytes()


def assert_idle(group: MemoryGroup) -> None:
    """Nothing of a run is left on the home peer."""
    home = group[0]
    assert home.runs.current_run is None
    assert home.runs.plan_report is None
    assert home.blobs.statistics().published_count == 0
    assert home.activities[-1:] in ([], ["idle"])


async def wait_idle(group: MemoryGroup) -> None:
    """Every member that lives has ended its part, and offers no blob any more."""

    def idle() -> bool:
        return all(
            m.runs.current_run is None and m.blobs.statistics().published_count == 0
            for m in group.members.values() if m.lives
        )  # fmt: skip

    await until(idle)


async def test_losses_and_state_are_equal_on_one_to_four_stages(tmp_path: Path) -> None:
    results = [await train(tmp_path, members=n, stages=n) for n in (1, 2, 3, 4)]
    assert [result.stages for result in results] == [1, 2, 3, 4]
    assert len({float_bits(result.losses) for result in results}) == 1
    assert len({result.state_digest for result in results}) == 1
    assert len({result.heldout_last for result in results}) == 1
    assert len(results[0].losses) == 6
    assert results[0].losses[-1] < results[0].losses[0]
    assert all(stored(result) for result in results)
    other = await train(tmp_path, members=2, stages=2, seed=1)
    assert other.losses[0] != results[0].losses[0]


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "eager-1f1b"])
async def test_schedule_changes_nothing_but_time(tmp_path: Path, schedule: str) -> None:
    one = await train(tmp_path, members=1, stages=1, steps=3)
    three = await train(tmp_path, members=3, stages=3, steps=3, schedule=schedule)
    assert (one.losses, one.state_digest) == (three.losses, three.state_digest)


async def test_home_peer_without_a_stage_feeds_and_finishes(tmp_path: Path) -> None:
    alone = await train(tmp_path, members=1, stages=1, steps=3)
    async with memory_group(tmp_path, 3) as group:
        group[0].memory_bytes = lambda: 0
        with trio.fail_after(SECONDS_MAX):
            result = await group[0].train(request(tmp_path, steps=3, stages=2))
            await wait_idle(group)
        (plan,) = group.reports("plan")
        assert isinstance(plan, PlanReport)
        assert {stage.name for stage in plan.stages} == {"peer-1", "peer-2"}
        assert group[0].activities == [f"run {plan.run[:8]}, data", "idle"]
    assert (result.losses, result.state_digest) == (alone.losses, alone.state_digest)
    assert result.peers == 3


async def test_home_peer_in_the_middle_of_the_pipeline(tmp_path: Path) -> None:
    alone = await train(tmp_path, members=1, stages=1, checkpoint_every=1, evaluate_every=1)
    async with memory_group(tmp_path, 3) as group:
        # The planner orders stages by speed: find the member that conducts from the middle.
        with trio.fail_after(SECONDS_MAX):
            await group[0].train(request(tmp_path, steps=1, stages=3))
            (plan,) = group.reports("plan")
            assert isinstance(plan, PlanReport)
            middle = group.members[plan.stages[1].device]
            await wait_idle(group)
            result = await middle.train(
                request(tmp_path, stages=3, checkpoint_every=1, evaluate_every=1)
            )
            await wait_idle(group)
    assert (result.losses, result.state_digest) == (alone.losses, alone.state_digest)


async def test_evaluations_and_checkpoints_come_at_their_intervals(tmp_path: Path) -> None:
    async with memory_group(tmp_path, 2) as group:
        with trio.fail_after(SECONDS_MAX):
            result = await group[0].train(
                request(tmp_path, stages=2, evaluate_every=2, checkpoint_every=2, steps=5)
            )
            await wait_idle(group)
        evaluations = [r for r in group.reports("evaluation") if isinstance(r, EvaluationReport)]
        assert [report.step for report in evaluations] == [0, 2, 4, 5]
        assert evaluations[-1].heldout_loss == result.heldout_last
        steps = [report for report in group.reports("step") if isinstance(report, StepReport)]
        assert [report.step for report in steps] == [1, 2, 3, 4, 5]
        assert set(steps[-1].activities) <= {"peer-0", "peer-1"}
        checkpoints = group[0].runs_path / result.run / "checkpoints"
        # Two are kept: the one after the last step, and the one before it.
        assert sorted(path.name for path in checkpoints.iterdir()) == [
            "step-00000004", "step-00000005",
        ]  # fmt: skip
        assert (
            len(group[0].runs_path.joinpath(result.run, "progress.jsonl").read_text().split("\n"))
            == 6
        )


async def test_stop_and_resume_on_other_stages_gives_the_same_curve(tmp_path: Path) -> None:
    whole = await train(tmp_path, members=2, stages=2, steps=8, evaluate_every=3)
    async with memory_group(tmp_path, 3) as group:
        with trio.fail_after(SECONDS_MAX):
            first = await stopped_after(
                group, 3, request(tmp_path, stages=3, steps=8, evaluate_every=3)
            )
            assert first.stopped
            assert first.model_path is None
            assert 3 <= first.steps < 8
            again = request(tmp_path, resume=first.run, stages=1)
            second = await group[0].train(again)
            await wait_idle(group)
    assert second.first_step == first.steps
    assert not second.stopped
    assert float_bits(first.losses + second.losses) == float_bits(whole.losses)
    assert second.state_digest == whole.state_digest
    assert second.heldout_last == whole.heldout_last
    assert second.heldout_first == first.heldout_last
    # A resumed session is charged for itself alone.
    assert sum(peer.samples for peer in second.energy.peers) == 8 * len(second.losses)


async def test_stop_before_the_first_step_interrupts(tmp_path: Path) -> None:
    async with memory_group(tmp_path, 2) as group:
        with trio.fail_after(SECONDS_MAX), pytest.RaisesGroup(Interrupted):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(group[0].train, request(tmp_path, stages=2))
                await group.wait(lambda: bool(group[1].received))
                group[0].runs.stop()
        await wait_idle(group)
        with trio.fail_after(SECONDS_MAX):
            result = await group[0].train(request(tmp_path, stages=2, steps=1))
        assert result.steps == 1


async def test_run_that_is_complete_resumes_to_its_model(tmp_path: Path) -> None:
    async with memory_group(tmp_path, 1) as group:
        with trio.fail_after(SECONDS_MAX):
            first = await group[0].train(request(tmp_path, steps=2))
            out = tmp_path / "new" / "trained.onnx"
            tensors = tmp_path / "model.safetensors"
            again = request(tmp_path, resume=first.run[:6], out=str(out), safetensors=str(tensors))
            second = await group[0].train(again)
    assert second.losses == ()
    assert second.steps == 2
    assert second.state_digest == first.state_digest
    assert stored(second) == stored(first)
    assert second.model_path == str(out)
    written = read_tensors(tensors)
    assert set(written.tensors) == {tensor.name for tensor in BUNDLE.manifest.tensors}
    assert all(raw_bytes(value).tobytes() in stored(second) for value in written.tensors.values())


async def test_second_train_is_refused_while_a_run_goes_on(tmp_path: Path) -> None:
    async with memory_group(tmp_path, 2) as group:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(group[0].train, request(tmp_path, stages=2))
            with trio.fail_after(SECONDS_MAX):
                await group.wait(lambda: bool(group.reports("step")))
                for member in (group[0], group[1]):
                    with pytest.raises(ConfigError, match="busy with run"):
                        await member.train(request(tmp_path))
        assert len(group.reports("step")) == 6


@pytest.mark.parametrize("prefix", ["zz", ""])
async def test_unknown_run_is_not_resumed(tmp_path: Path, prefix: str) -> None:
    async with memory_group(tmp_path, 1) as group:
        with trio.fail_after(SECONDS_MAX):
            await group[0].train(request(tmp_path, steps=1))
            with pytest.raises(NotFound, match="no run"):
                await group[0].train(request(tmp_path, resume=prefix))


async def test_loss_that_is_not_finite_stops_every_member(tmp_path: Path) -> None:
    wild = OptimizerChoice(warmup_steps=0, clip_norm=0.0, peak_learning_rate=1e38)
    async with memory_group(tmp_path, 3) as group:
        wanted = request(tmp_path, stages=3, optimizer=wild, checkpoint_every=1)
        with trio.fail_after(SECONDS_MAX):
            with pytest.raises(NumericsError, match="not finite") as caught:
                await group[0].train(wanted)
            await wait_idle(group)
        assert all("not finite" in (m.runs.last_failure or "") for m in group.members.values())
        assert not group.broken
        # The step that failed was applied nowhere: nobody went on, and no state of it was saved.
        failed = len(group.reports("step")) + 1
        assert f"step {failed}:" in caught.value.message
        saved = [m.step for m in group[0].received if isinstance(m, SegmentSaved)]
        assert max(saved, default=0) < failed
        updates = [m.step for m in group[0].received if isinstance(m, Usage)]
        assert max(updates) < failed
