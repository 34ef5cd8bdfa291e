"""Runs of tensor shards that lose members: the committed state comes back bit by bit."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import trio

from p2ptrain.agreement.run_machine import RunMachine
from p2ptrain.runtime.compute.replay import ShardReplayer
from p2ptrain.runtime.compute.shard_worker import ShardWorker
from p2ptrain.runtime.reports import PlanReport, StepReport, TrainRequest, TrainResult
from p2ptrain.runtime.runs.run_status import run_status_report
from p2ptrain.store.bundles import Bundle, load_bundle, shipped_bundles
from p2ptrain.training.contract import OptimizerChoice
from tests.bundles import write_bundle
from tests.disturbed_runs import Disturbed, copies, progress
from tests.memory_group import MemoryGroup, float_bits, memory_group, tiny_text, until
from tests.shipped_training import short_context

SGD = OptimizerChoice(name="sgd", peak_learning_rate=0.05, warmup_steps=2, clip_norm=0.5)
SECONDS_MAX = 60
STEPS = 10
SET_EVERY = 4
TOLERANCE = 1e-5
THREE, TWO = (1, 1, 1), (2, 1)


class Updates:
    """Every update that a shard has made, on a peer of its own or in a replay."""

    def __init__(self) -> None:
        self.states: dict[tuple[tuple[int, ...], int, int], set[str]] = {}
        """By shares, rank and step: digests of the slices that it led to."""
        self.replayed: list[int] = []
        """Steps, in their order."""
        self.replayed_by: set[tuple[int, ...]] = set()
        """The shares of those steps."""

    def note(self, worker: ShardWorker, step: int) -> None:
        digest = hashlib.sha256()
        for segment in worker.segments:
            digest.update(worker.state(segment, step).digest().encode())
        key = (worker.share.weights, worker.share.rank, step)
        self.states.setdefault(key, set()).add(digest.hexdigest())

    def assert_same(self, weights: Sequence[int]) -> None:
        """Each update of a run by these shards was the same, whoever made it, and however often."""
        assert self.replayed_by <= {THREE, TWO}, "not by the shares that had made the steps"
        found = {key: states for key, states in self.states.items() if key[0] == tuple(weights)}
        assert {(rank, step) for _, rank, step in found} == {
            (rank, step) for rank in range(len(weights)) for step in range(1, STEPS + 1)
        }
        assert all(len(states) == 1 for states in found.values())


@pytest.fixture(scope="module")
def updates() -> Iterator[Updates]:
    """Of all runs of this module: those with equal shares are one run until somebody is lost."""
    seen = Updates()
    update, run_step = ShardWorker.update, ShardReplayer.run_step

    def noted(worker: ShardWorker, *, step: int, learning_rate: float, clip_scale: float) -> None:
        update(worker, step=step, learning_rate=learning_rate, clip_scale=clip_scale)
        seen.note(worker, step)

    def replayed(replayer: ShardReplayer, inputs: object, record: object) -> None:
        run_step(replayer, inputs, record)  # type: ignore[arg-type]  # passed on as they are
        seen.replayed.append(record.step)  # type: ignore[attr-defined]  # a step's record
        seen.replayed_by.update(each.share.weights for each in replayer._group.workers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardWorker, "update", noted)
        patch.setattr(ShardReplayer, "run_step", replayed)
        yield seen


@functools.cache
def bundle() -> Bundle:
    return short_context(load_bundle(shipped_bundles()["gpt-nano"]))


def request_for(path: Path, group: MemoryGroup, weights: Sequence[int]) -> TrainRequest:
    """A run of the group's first members, by tensor shards if they are several."""
    folder, data = path / "bundle", path / "data.txt"
    if not folder.exists():
        write_bundle(folder, bundle())
        data.write_bytes(tiny_text())
    names = [group[rank].name for rank in range(len(weights))]
    plan = f"[[stage]]\ndevices = {names}\nsegments = {len(bundle().manifest.segments)}\n"
    if len(weights) > 1:
        plan += f'split = "tensor"\nweights = {list(weights)}\n'
    return TrainRequest(
        bundle=str(folder), data=str(data), steps=STEPS, microbatches=2, microbatch_size=2,
        threads=1, heldout_microbatches=1, checkpoint_every=0, replicate_every=SET_EVERY,
        optimizer=SGD, plan=plan,
    )  # fmt: skip


def undisturbed(path: Path, weights: Sequence[int]) -> tuple[TrainResult, PlanReport]:
    async def train() -> tuple[TrainResult, PlanReport]:
        async with memory_group(path, len(weights)) as group:
            result = await group[0].train(request_for(path, group, weights))
            (plan,) = [r for r in group.reports("plan") if isinstance(r, PlanReport)]
            return result, plan

    return trio.run(train)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, PlanReport]:
    """One peer's run, and its plan."""
    return undisturbed(tmp_path_factory.mktemp("one"), (1,))


@pytest.fixture(scope="module")
def one(alone: tuple[TrainResult, PlanReport]) -> TrainResult:
    """One peer's run."""
    return alone[0]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, updates: Updates) -> TrainResult:
    """The undisturbed run of three shards."""
    return undisturbed(tmp_path_factory.mktemp("three"), THREE)[0]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, updates: Updates) -> TrainResult:
    """The undisturbed run of two uneven shards."""
    return undisturbed(tmp_path_factory.mktemp("two"), TWO)[0]


def assert_recovered(
    losses: Sequence[float], whole: TrainResult, one: TrainResult, *, resumed: int
) -> None:
    """No step is missing; those that were committed have the bits of the undisturbed run, and the
    later curve is one peer's within the tolerance."""
    assert len(losses) == STEPS
    assert float_bits(losses[:resumed]) == float_bits(whole.losses[:resumed])
    np.testing.assert_allclose(losses, one.losses, rtol=TOLERANCE)


async def lose(
    path: Path, weights: Sequence[int], victims: Sequence[int], updates: Updates, *, at: int
) -> tuple[TrainResult, int]:
    """A run that loses members once step `at` is committed; and the newest step that is known to
    have been committed by then."""
    async with memory_group(path, len(weights)) as group:
        run, replayed = Disturbed(group), len(updates.replayed)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, request_for(path, group, weights))
                await run.wait_step(at)
                for victim in victims:
                    group.kill(group[victim])
        steps = [r.step for r in group.reports("step") if isinstance(r, StepReport)]
    assert run.result is not None
    assert steps == list(range(1, STEPS + 1)), "no step was made twice"
    return run.result, max([at, *updates.replayed[replayed:]])


@pytest.mark.parametrize(("victim", "at"), [(1, 1), (2, 4)])
async def test_a_lost_shard_is_recovered(
    victim: int, at: int, tmp_path: Path, one: TrainResult, three: TrainResult, updates: Updates
) -> None:
    """Where nothing is kept yet, so that the beginning is drawn again, and when a set is due."""
    result, resumed = await lose(tmp_path, THREE, [victim], updates, at=at)
    assert_recovered(result.losses, three, one, resumed=resumed)
    updates.assert_same(THREE)


async def test_one_of_two_shards_goes_on_alone(
    tmp_path: Path, one: TrainResult, two: TrainResult, updates: Updates
) -> None:
    before = len(updates.replayed)
    result, resumed = await lose(tmp_path, TWO, [1], updates, at=5)
    assert_recovered(result.losses, two, one, resumed=resumed)
    assert result.peers == 1
    assert len(updates.replayed) > before, "step 5 is after the set of step 4"
    updates.assert_same(TWO)


@pytest.mark.parametrize("kind", ["part", "total"])
async def test_a_shard_lost_in_the_middle_of_a_step(
    kind: str, tmp_path: Path, one: TrainResult, three: TrainResult, updates: Updates
) -> None:
    async with memory_group(tmp_path, 3) as group:
        run = Disturbed(group)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, request_for(tmp_path, group, THREE))
                await run.wait_step(4)
                count, own = len(group.tensors), group[2].device
                await group.wait(
                    lambda: any(
                        h.kind == kind and sender == own for sender, _, h in group.tensors[count:]
                    )
                )
                group.kill(group[2])
    assert run.result is not None
    assert_recovered(run.result.losses, three, one, resumed=4)
    updates.assert_same(THREE)


async def test_the_owner_of_the_data_is_lost(
    tmp_path: Path, one: TrainResult, three: TrainResult, updates: Updates
) -> None:
    """It keeps replicas, too, and has given a copy of the data away."""
    async with memory_group(tmp_path, 3) as group:
        run = Disturbed(group)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, request_for(tmp_path, group, THREE))
                await until(lambda: all(len(copies(m)) == 2 for m in group.members.values()))
                await run.wait_step(5)
                group.kill(group[0])
                nursery.cancel_scope.cancel()
            left = [group[1], group[2]]
            await until(lambda: all(member.runs.current_run is None for member in left))
        folders = [folder for member in left for folder in member.runs_path.iterdir()]
        (folder,) = [path for path in folders if (path / "trained.onnx").exists()]
        losses = progress(folder)
    assert_recovered(losses, three, one, resumed=5)
    updates.assert_same(THREE)


async def test_a_further_loss_while_shards_are_replayed(
    tmp_path: Path, one: TrainResult, three: TrainResult, updates: Updates
) -> None:
    """The replay begins again elsewhere, by the shares that had made the steps."""
    async with memory_group(tmp_path, 3) as group:
        run, replayed = Disturbed(group), len(updates.replayed)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, request_for(tmp_path, group, THREE))
                await run.wait_step(5)
                group.kill(group[2])
                await until(lambda: len(updates.replayed) > replayed)
                group.kill(group[1])
    assert run.result is not None
    assert_recovered(run.result.losses, three, one, resumed=5)
    assert run.result.peers == 1
    updates.assert_same(THREE)


async def test_two_lost_at_once_leave_no_quorum(tmp_path: Path, updates: Updates) -> None:
    async with memory_group(tmp_path, 3) as group:
        run = Disturbed(group)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, request_for(tmp_path, group, THREE))
                await run.wait_step(2)
                group.kill(group[1])
                group.kill(group[2])
                home = group[0].runs.member
                assert home is not None
                await home.state.signal.wait_until(lambda: home.paused is not None)
                assert "no quorum (1 of 3: " in (run_status_report(home).waits_for or "")
                nursery.cancel_scope.cancel()


async def test_a_replay_that_memory_does_not_hold_is_not_begun(
    tmp_path: Path, alone: tuple[TrainResult, PlanReport], updates: Updates
) -> None:
    """The model would fit the peer that is left, but not the shards beside each other."""
    whole, replayed = alone[1].stages[0].memory_bytes, len(updates.replayed)
    async with memory_group(tmp_path, 2) as group:
        group[0].memory_bytes = lambda: whole
        run = Disturbed(group)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, request_for(tmp_path, group, TWO))
                await run.wait_step(5)
                group.kill(group[1])
                home = group[0].runs.member
                assert home is not None
                await home.state.signal.wait_until(lambda: home.paused is not None)
                reason = run_status_report(home).waits_for or ""
                assert "all shards on" in reason
                assert "--force-view to go back to step" in reason
                nursery.cancel_scope.cancel()
    assert len(updates.replayed) == replayed


async def test_a_view_that_changes_nothing_changes_no_bit(
    tmp_path: Path, three: TrainResult, updates: Updates
) -> None:
    async with memory_group(tmp_path, 3) as group:
        run, replayed = Disturbed(group), len(updates.replayed)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, request_for(tmp_path, group, THREE))
                await run.wait_step(4)
                member = group[0].runs.member
                assert member is not None
                member.driver.call(RunMachine.want, "a test", member.driver.now(), after_s=0.0)
    assert run.result is not None
    assert len(updates.replayed) == replayed, "every shard was where it should be"
    assert float_bits(run.result.losses) == float_bits(three.losses)
    assert run.result.state_digest == three.state_digest
    updates.assert_same(THREE)


async def test_a_shard_that_leaves_hands_over(
    tmp_path: Path, one: TrainResult, three: TrainResult, updates: Updates
) -> None:
    async with memory_group(tmp_path, 3) as group:
        run, said = Disturbed(group), list[str | None]()

        async def leave() -> None:
            group[2].leaves = True
            said.append(await group[2].runs.leave())

        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, request_for(tmp_path, group, THREE))
                await run.wait_step(4)
                nursery.start_soon(leave)
    assert said == [None]
    assert run.result is not None
    assert_recovered(run.result.losses, three, one, resumed=4)
    updates.assert_same(THREE)
