"""Runs whose boundary tensors travel as bf16 or int8: the same bits again, whatever happens."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from p2ptrain.errors import NumericsError
from p2ptrain.planner.plan import Plan
from p2ptrain.planner.profile import KindCost
from p2ptrain.recovery.successor import Place, Succession, successor_plans
from p2ptrain.runtime.reports import PlanReport, StepReport, TrainRequest, TrainResult
from p2ptrain.training.contract import OptimizerChoice
from tests.bundles import tiny_bundle
from tests.memory_group import MemoryGroup, float_bits, memory_group, request_for, until

CLIPPING = OptimizerChoice(warmup_steps=2, clip_norm=0.05, peak_learning_rate=0.02)
BUNDLE = tiny_bundle()
CODECS = ["bf16", "int8"]
SECONDS_MAX = 60


@pytest.fixture(autouse=True)
def equal_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured times vary, and with them the cuts; other cuts round other values."""
    cost = KindCost(forward_ns=1_000_000, backward_ns=2_000_000)
    costs = dict.fromkeys(BUNDLE.manifest.kinds, cost)
    monkeypatch.setattr(
        "p2ptrain.runtime.compute.known_profiles.profile_kinds", lambda *_, **__: costs
    )


@pytest.fixture
def same_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A member in reserve takes over, and nobody gets another part of the model."""

    def kept(succession: Succession, place: Place) -> tuple[Plan, ...]:
        cuts = [stage.segments for stage in succession.base.stages]
        plans = successor_plans(succession, place)
        return tuple(p for p in plans if [stage.segments for stage in p.stages] == cuts)

    monkeypatch.setattr("p2ptrain.runtime.planning.replanning.successor_plans", kept)


def request(path: Path, **changes: object) -> TrainRequest:
    wanted = {"optimizer": CLIPPING, "steps": 12, "stages": 3, "replicate_every": 3, **changes}
    return request_for(path, BUNDLE, **wanted)


async def train(path: Path, members: int = 3, **changes: object) -> TrainResult:
    async with memory_group(path, members) as group:
        with trio.fail_after(SECONDS_MAX):
            return await group[0].train(request(path, **changes))


@pytest.fixture(scope="module")
def whole_runs() -> dict[str, TrainResult]:
    """What has been trained on three stages without anything going wrong, by codec."""
    return {}


async def undisturbed(known: dict[str, TrainResult], path: Path, codec: str) -> TrainResult:
    """The run of a codec: every test's is the same."""
    if codec not in known:
        known[codec] = await train(path, codec=codec)
    return known[codec]


async def wait_step(group: MemoryGroup, step: int) -> None:
    await group.wait(
        lambda: any(isinstance(r, StepReport) and r.step >= step for _, r in group.events)
    )


def assert_same(result: TrainResult, other: TrainResult) -> None:
    assert float_bits(result.losses) == float_bits(other.losses)
    assert result.state_digest == other.state_digest
    assert result.heldout_last == other.heldout_last


@pytest.mark.parametrize("codec", CODECS)
async def test_rounded_runs_repeat_their_bits_and_stay_near_the_exact_one(
    tmp_path: Path, codec: str
) -> None:
    one, other = [await train(tmp_path, codec=codec, evaluate_every=4) for _ in range(2)]
    assert_same(one, other)
    exact = await train(tmp_path, evaluate_every=4)
    assert float_bits(one.losses) != float_bits(exact.losses)
    assert one.losses == pytest.approx(exact.losses, rel=0.05)
    assert one.losses[-1] < one.losses[0]


@pytest.mark.parametrize("codec", CODECS)
async def test_codec_changes_nothing_on_one_peer(tmp_path: Path, codec: str) -> None:
    exact, rounded = [await train(tmp_path, 1, stages=1, codec=c) for c in ("fp32", codec)]
    assert float_bits(rounded.losses) == float_bits(exact.losses)
    assert rounded.heldout_last == exact.heldout_last


@pytest.mark.parametrize("codec", CODECS)
async def test_stop_and_resume_on_the_same_stages_gives_the_same_curve(
    tmp_path: Path, codec: str, whole_runs: dict[str, TrainResult]
) -> None:
    whole = await undisturbed(whole_runs, tmp_path, codec)
    results: list[TrainResult] = []
    async with memory_group(tmp_path, 3) as group:

        async def conduct() -> None:
            results.append(await group[0].train(request(tmp_path, codec=codec)))

        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(conduct)
                await wait_step(group, 4)
                group[0].runs.stop()
            (first,) = results
            assert first.stopped
            again = request(tmp_path, resume=first.run)
            second = await group[0].train(again)
    assert float_bits(first.losses + second.losses) == float_bits(whole.losses)
    assert second.state_digest == whole.state_digest


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("at", [2, 7])
@pytest.mark.usefixtures("same_cuts")
async def test_lost_stage_is_replayed_to_the_same_bits(
    tmp_path: Path, codec: str, at: int, whole_runs: dict[str, TrainResult]
) -> None:
    whole = await undisturbed(whole_runs, tmp_path, codec)
    results: list[TrainResult] = []
    async with memory_group(tmp_path, 4) as group:

        async def conduct() -> None:
            results.append(await group[0].train(request(tmp_path, codec=codec)))

        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(conduct)
                await wait_step(group, at)
                plan = next(r for _, r in group.events if isinstance(r, PlanReport))
                others = [s.device for s in plan.stages if s.device != group[0].device]
                group.kill(group.members[others[at % len(others)]])
    assert results[0].stages == 3
    assert_same(results[0], whole)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("at", [2, 7])
@pytest.mark.usefixtures("same_cuts")
async def test_neighbouring_stages_lost_at_once_are_replayed_to_the_same_bits(
    tmp_path: Path, codec: str, at: int, whole_runs: dict[str, TrainResult]
) -> None:
    """As one range, which rounds where the link between them was; then each goes to a reserve."""
    whole = await undisturbed(whole_runs, tmp_path, codec)
    results: list[TrainResult] = []
    async with memory_group(tmp_path, 5) as group:

        async def conduct() -> None:
            results.append(await group[0].train(request(tmp_path, codec=codec)))

        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(conduct)
                await wait_step(group, at)
                plan = next(r for _, r in group.events if isinstance(r, PlanReport))
                lost = [s.device for s in plan.stages if s.device != group[0].device]
                assert lost == [s.device for s in plan.stages][1:]
                for device in lost:
                    group.kill(group.members[device])
    assert results[0].stages == 3
    assert_same(results[0], whole)


@pytest.mark.parametrize("codec", CODECS)
async def test_value_that_is_not_finite_stops_every_member(tmp_path: Path, codec: str) -> None:
    """bf16 carries it to the loss; int8 cannot, and its sender stops the run."""
    wild = OptimizerChoice(warmup_steps=0, clip_norm=0.0, peak_learning_rate=1e38)
    async with memory_group(tmp_path, 3) as group:
        with trio.fail_after(SECONDS_MAX):
            with pytest.raises(NumericsError, match="not finite"):
                await group[0].train(request(tmp_path, codec=codec, optimizer=wild))
            await until(lambda: all(m.runs.current_run is None for m in group.members.values()))
        assert not group.broken
