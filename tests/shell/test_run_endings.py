"""After a run: whoever missed its end is told, and every peer is free for the next one."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TypeVar

import pytest
import trio
from trio.testing import MockClock

from p2ptrain import limits
from p2ptrain.errors import ConfigError, P2PTrainError
from p2ptrain.ids import DeviceId, RunId
from p2ptrain.runtime.compute.stage import StageWorker
from p2ptrain.runtime.keeping.run_state import JOURNAL_FILE, RunState
from p2ptrain.runtime.planning.placement import Placement, place
from p2ptrain.runtime.reports import NoteReport, StepReport, TrainRequest, TrainResult
from p2ptrain.training.contract import OptimizerChoice
from p2ptrain.training.messages import Abort, Done, Ended, Finish, Offer
from tests.bundles import tiny_bundle
from tests.memory_group import (
    SECONDS_MAX,
    Member,
    MemoryGroup,
    float_bits,
    memory_group,
    request_for,
    until,
)

BUNDLE = tiny_bundle()
CLIPPING = OptimizerChoice(warmup_steps=2, clip_norm=0.05, peak_learning_rate=0.02)
T = TypeVar("T")


def request(path: Path, **changes: object) -> TrainRequest:
    return request_for(path, BUNDLE, **{"steps": 2, "optimizer": CLIPPING, **changes})


def heard(member: Member, kind: type[T]) -> list[T]:
    return [message for message in member.received if isinstance(message, kind)]


def stepped(group: MemoryGroup, step: int) -> bool:
    return any(isinstance(r, StepReport) and r.step >= step for _, r in group.events)


async def until_idle(*members: Member) -> None:
    await until(lambda: all(m.runs.current_run is None for m in members))


def journals(*members: Member) -> list[Path]:
    """What a restart would take up."""
    return [path for m in members for path in m.runs_path.glob(f"*/{JOURNAL_FILE}")]


class Under:
    """A `train` that runs beside the test, and how it ends."""

    def __init__(self, nursery: trio.Nursery, member: Member, wanted: TrainRequest) -> None:
        self.scope = trio.CancelScope()
        self.result: TrainResult | None = None
        self.error: P2PTrainError | None = None
        nursery.start_soon(self._run, member, wanted)

    async def _run(self, member: Member, wanted: TrainRequest) -> None:
        with self.scope:
            try:
                self.result = await member.train(wanted)
            except P2PTrainError as error:
                self.error = error

    @property
    def ended(self) -> bool:
        return self.result is not None or self.error is not None


async def test_runs_follow_each_other_at_once_wherever_they_are_asked_for(tmp_path: Path) -> None:
    async with memory_group(tmp_path, 3) as group:
        with trio.fail_after(3 * SECONDS_MAX):
            for index in (0, 0, 1, 2, 0):
                result = await group[index].train(request(tmp_path, stages=3))
                assert (result.stages, result.peers) == (3, 3)


class Stuck:
    """Holds one peer's first forward of a step in its thread until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        made, make_worker, forward = set[int](), RunState.make_worker, StageWorker.forward

        def tagged(state: RunState, *args: object, **named: object) -> StageWorker:
            worker = make_worker(state, *args, **named)  # type: ignore[arg-type]  # as given
            if state.services.host == host:
                made.add(id(worker))
            return worker

        def held(worker: StageWorker, **named: object) -> float | None:
            if id(worker) in made and named["training"] and not self.reached.is_set():
                self.reached.set()
                self.go.wait(SECONDS_MAX)
            return forward(worker, **named)  # type: ignore[arg-type]  # as given

        monkeypatch.setattr(RunState, "make_worker", tagged)
        monkeypatch.setattr(StageWorker, "forward", held)


def all_is_fed(group: MemoryGroup) -> bool:
    """The last of what the other peer is fed has arrived; which stage it has, times decide."""
    ends = (group[0].device, group[1].device)
    last = {("input", "evaluate", 1, 0), ("labels", "evaluate", 1, 1)}
    sent = {(t.kind, t.phase, t.step, t.index) for *way, t in group.tensors if (*way,) == ends}
    return not last.isdisjoint(sent) and not group.is_sending(*ends)


@pytest.mark.parametrize("how", ["left", "stopped"])
async def test_next_run_waits_for_one_that_ends_while_it_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Ctrl-C while the home peer plans, once or twice: its thread has to end first."""
    reached, go = threading.Event(), threading.Event()

    def held(*given: object) -> Placement:
        if not reached.is_set():
            reached.set()
            go.wait(SECONDS_MAX)
        return place(*given)  # type: ignore[arg-type]  # as given

    monkeypatch.setattr("p2ptrain.runtime.runs.founding.place", held)
    async with memory_group(tmp_path, 2) as group:
        with trio.fail_after(2 * SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                first = Under(nursery, group[0], request(tmp_path, stages=2))
                await until(reached.is_set)
                if how == "left":
                    first.scope.cancel()
                else:
                    group[0].runs.stop()
                second = Under(nursery, group[0], request(tmp_path, stages=2))
                for _ in range(10):
                    await trio.lowlevel.checkpoint()
                assert not second.ended
                go.set()
                await until(lambda: second.ended)
            assert second.result is not None, second.error
            assert first.result is None


@pytest.mark.parametrize("who", [0, 1])
async def test_next_run_waits_for_who_has_yet_to_let_go_of_a_cancelled_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: int
) -> None:
    stuck = Stuck(monkeypatch, f"peer-{who}")
    async with memory_group(tmp_path, 2) as group:
        try:
            with trio.fail_after(2 * SECONDS_MAX):
                async with trio.open_nursery() as nursery:
                    # Nothing is on its way to who is stuck: a frame that is cut breaks a link.
                    wanted = request(
                        tmp_path, stages=2, steps=1, microbatches=1, heldout_microbatches=1
                    )
                    first = Under(nursery, group[0], wanted)
                    await until(lambda: stuck.reached.is_set() and all_is_fed(group))
                    first.scope.cancel()
                    await until(lambda: not group[0].runs.statistics().conducting)
                    assert group[who].runs.current_run is not None
                    second = Under(nursery, group[0], request(tmp_path, stages=2))
                    if who == 1:
                        await until(lambda: len(heard(group[1], Offer)) == 2)
                    for _ in range(10):
                        await trio.lowlevel.checkpoint()
                    assert second.error is None
                    stuck.go.set()
        finally:
            stuck.go.set()
        assert second.result is not None
        assert second.result.stages == 2
        await until_idle(group[0], group[1])
        assert not journals(group[0], group[1])


@pytest.mark.parametrize("lost", [Finish, Abort])
async def test_member_that_missed_the_end_is_told_when_it_asks(
    tmp_path: Path, mock_clock: MockClock, lost: type
) -> None:
    async with memory_group(tmp_path, 3) as group:
        group[0].drops = lambda message: isinstance(message, lost)
        async with trio.open_nursery() as nursery:
            steps = 3 if lost is Finish else 500
            run = Under(nursery, group[0], request(tmp_path, stages=3, steps=steps))
            await until(lambda: stepped(group, 2))
            if lost is Abort:
                run.scope.cancel()
        await until_idle(group[0])
        others = [group[1], group[2]]
        assert any(member.runs.current_run is not None for member in others)
        mock_clock.jump(2 * limits.HEAD_INTERVAL_S)
        await until_idle(*others)
        told = [message for member in others for message in heard(member, Ended)]
        assert {message.outcome for message in told} == {"complete" if lost is Finish else "failed"}
        assert not journals(*others)
        result = await group[0].train(request(tmp_path, stages=3))
        assert result.stages == 3


async def killed_before_the_end(path: Path, group: MemoryGroup) -> RunId:
    """A run that went on to its end without peer-2, which has it in its journal."""
    async with trio.open_nursery() as nursery:
        run = Under(nursery, group[0], request(path, stages=3, steps=12, replicate_every=3))
        await group.wait(lambda: stepped(group, 5))
        group.kill(group[2])
    assert run.result is not None
    await until_idle(group[0], group[1])
    assert journals(group[2])
    return run.result.run


@pytest.mark.parametrize("teller", ["home", "member", "home that restarted"])
async def test_peer_that_returns_after_the_end_lets_go(tmp_path: Path, teller: str) -> None:
    async with memory_group(tmp_path, 3) as group:
        with trio.fail_after(2 * SECONDS_MAX):
            await killed_before_the_end(tmp_path, group)
            group.kill(group[0 if teller == "member" else 1])
            if teller == "home that restarted":
                group.kill(group[0])
                await group.restart(group[0])
            fresh = await group.restart(group[2])
            await until(lambda: bool(heard(fresh, Ended)))
            await until_idle(fresh)
            assert not journals(fresh)
            here = group[1 if teller == "member" else 0]
            result = await here.train(request(tmp_path, stages=2))
    assert result.stages == 2


async def test_home_peer_that_dies_between_result_and_journal_knows_that_it_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget, go = RunState.forget, threading.Event()

    def held(state: RunState, ended: Ended) -> None:
        if state.services.host == "peer-0":
            go.wait(SECONDS_MAX)
        else:
            forget(state, ended)

    monkeypatch.setattr(RunState, "forget", held)
    async with memory_group(tmp_path, 2) as group:
        with trio.fail_after(2 * SECONDS_MAX):
            try:
                async with trio.open_nursery() as nursery:
                    Under(nursery, group[0], request(tmp_path, stages=2))
                    await until(lambda: bool(heard(group[1], Finish)))
                    await until_idle(group[1])
                    group.kill(group[0])
                    nursery.cancel_scope.cancel()
                    go.set()
            finally:
                go.set()
            assert journals(group[0])
            home = await group.restart(group[0])
            await until(lambda: not journals(home))
            result = await home.train(request(tmp_path, stages=2))
            assert result.stages == 2


async def restarted_alone(path: Path, group: MemoryGroup) -> tuple[Member, RunId]:
    """Both peers of a run died; the one that cannot go on alone is there again."""
    async with trio.open_nursery() as nursery:
        Under(nursery, group[0], request(path, stages=2, steps=12, replicate_every=3))
        await group.wait(lambda: stepped(group, 5))
        run = group[1].runs.current_run
        group.kill(group[0])
        group.kill(group[1])
        nursery.cancel_scope.cancel()
    assert run is not None
    fresh = await group.restart(group[1])
    group.break_link(group[0].device, group[1].device)
    await until(lambda: fresh.runs.current_run == run)
    return fresh, run


async def test_interrupted_run_that_lacks_members_lets_another_one_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "RESTORED_WAIT_S", 0.0)
    async with memory_group(tmp_path, 2) as group:
        with trio.fail_after(3 * SECONDS_MAX):
            fresh, run = await restarted_alone(tmp_path, group)
            result = await fresh.train(request(tmp_path, stages=1))
            assert result.run != run
            notes = [r.text for r in group.reports("note") if isinstance(r, NoteReport)]
            assert any(f"run {run[:8]} was interrupted" in note for note in notes)
            # It is taken up again, and ends when its other peer returns.
            await until(lambda: fresh.runs.current_run == run)
            home = await group.restart(group[0])
            await until(lambda: home.runs.member is not None)
            await until_idle(fresh, home)
            models = [*group[0].runs_path.glob(f"{run}/*.onnx")]
            models += group[1].runs_path.glob(f"{run}/*.onnx")
            assert models


async def test_interrupted_run_that_others_go_on_with_keeps_its_peer(tmp_path: Path) -> None:
    async with memory_group(tmp_path, 3) as group:
        with trio.fail_after(3 * SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                Under(nursery, group[0], request(tmp_path, stages=3, steps=500))
                await group.wait(lambda: stepped(group, 5))
                group.kill(group[2])
                fresh = await group.restart(group[2])
                await until(lambda: fresh.runs.current_run is not None)
                with pytest.raises(ConfigError, match="busy with run"):
                    await fresh.train(request(tmp_path, stages=1))
                nursery.cancel_scope.cancel()
            await until_idle(*group.members.values())


async def test_failure_elsewhere_does_not_end_work_that_goes_well(tmp_path: Path) -> None:
    async with memory_group(tmp_path, 3) as group:
        with trio.fail_after(2 * SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                run = Under(nursery, group[0], request(tmp_path, stages=2, steps=30))
                await until(lambda: stepped(group, 2))
                plan = group[0].runs.member.plan
                assert plan is not None
                wrong = Ended(run=plan.run, lineage=plan.lineage, outcome="failed", reason="mine")
                for index in (0, 1):
                    group[2].send(group[index].device, wrong)
            assert run.result is not None
            assert len(run.result.losses) == 30


async def test_messages_to_a_part_that_is_closing_change_nothing(tmp_path: Path) -> None:
    results = []
    for members in (1, 2):
        path = tmp_path / str(members)
        path.mkdir()
        async with memory_group(path, members) as group:
            with trio.fail_after(2 * SECONDS_MAX):
                wanted = request(path, stages=members, steps=9, replicate_every=1)
                results.append(await group[0].train(wanted))
                await until_idle(*group.members.values())
    assert float_bits(results[0].losses) == float_bits(results[1].losses)


async def test_slow_way_between_two_members_does_not_end_the_run(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    """The others are a quorum; whoever hears one stage late learns the steps from their records."""
    async with memory_group(tmp_path, 3) as group:
        send = group[1].send

        def mostly(to: DeviceId, message: object) -> None:
            if not (to == group[2].device and isinstance(message, Done) and 3 <= message.step < 9):
                send(to, message)

        group[1].send = mostly  # type: ignore[method-assign]  # a way with a gap
        result = await group[0].train(request(tmp_path, stages=3, steps=12))
        assert len(result.losses) == 12
        await until_idle(*group.members.values())
