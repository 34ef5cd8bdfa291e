"""A device that joins a running run gets its stage's state while the others train."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from p2ptrain import limits
from p2ptrain.agreement.view import View
from p2ptrain.ids import DeviceId
from p2ptrain.planner.profile import KindCost
from p2ptrain.recovery.advance import receivers
from p2ptrain.runtime.compute.stage import StageWorker
from p2ptrain.runtime.keeping.run_state import WEIGHTS_FOLDER
from p2ptrain.runtime.reports import StepReport, TrainRequest, TrainResult
from p2ptrain.training.messages import SegmentSaved, Wanted
from tests.bundles import CONTEXT, VOCABULARY, tiny_bundle
from tests.memory_group import Member, MemoryGroup, float_bits, memory_group, request_for, until
from tests.varied_bundle import varied_bundle
from tests.weights import some_weights, write_weighted

BUNDLE = tiny_bundle(blocks=4)
STEPS = 40
SECONDS_MAX = 60
EVERY = 1000
"""Steps between replica sets: there is one at the beginning of each view, and no other."""


@pytest.fixture(autouse=True)
def equal_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured, so that more peers are always faster."""
    cost = KindCost(forward_ns=20_000_000, backward_ns=40_000_000)
    costs = dict.fromkeys(BUNDLE.manifest.kinds, cost)
    monkeypatch.setattr(
        "p2ptrain.runtime.compute.known_profiles.profile_kinds", lambda *_, **__: costs
    )


def request(path: Path, **changes: object) -> TrainRequest:
    fields = {"steps": STEPS, "microbatches": 8, "replicate_every": EVERY, **changes}
    return request_for(path, BUNDLE, **fields)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    path = tmp_path_factory.mktemp("alone")

    async def train() -> TrainResult:
        async with memory_group(path, 1) as group:
            return await group[0].train(request(path))

    return trio.run(train)


class Gate:
    """Holds back every step after the allowed one, so that no run ends before its time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._allowed, self._changed = 3, threading.Condition()
        forward = StageWorker.forward

        def held(worker: StageWorker, **given: Any) -> object:  # Any: the method's own arguments
            if given["training"]:
                with self._changed:
                    self._changed.wait_for(lambda: given["step"] <= self._allowed, SECONDS_MAX)
            return forward(worker, **given)

        monkeypatch.setattr(StageWorker, "forward", held)

    def allow(self, step: int) -> None:
        with self._changed:
            self._allowed = step
            self._changed.notify_all()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


class Joined:
    """A run that somebody joins, and what became of it."""

    def __init__(self, group: MemoryGroup, gate: Gate) -> None:
        self.group, self.gate, self.results = group, gate, list[TrainResult]()
        self.scope = trio.CancelScope()

    @property
    def step(self) -> int:
        reports = [report for _, report in self.group.events if isinstance(report, StepReport)]
        return max((report.step for report in reports), default=0)

    async def train(self, asked: TrainRequest) -> None:
        with self.scope:
            self.results.append(await self.group[0].train(asked))

    async def wait_step(self, step: int) -> None:
        await self.group.wait(lambda: self.step >= step)

    def view(self) -> View:
        member = self.group[0].runs.member
        assert member is not None
        assert member.view is not None
        return member.view

    async def wait_view(self, condition: Callable[[View], bool]) -> View:
        await until(lambda: condition(self.view()))
        return self.view()


def layout(view: View) -> list[tuple[DeviceId, range]]:
    return [(stage.device, stage.segments) for stage in view.plan.stages]


def asked_for(group: MemoryGroup, what: str) -> list[tuple[DeviceId, Wanted]]:
    """What was asked for while views began, and by whom."""
    return [
        (sender, message)
        for member in group.members.values()
        for sender, message in zip(member.senders, member.received, strict=True)
        if isinstance(message, Wanted) and message.what == what
    ]


@contextlib.asynccontextmanager
async def joining(
    path: Path, members: int, asked: TrainRequest, gate: Gate
) -> contextlib.AsyncIterator[tuple[Joined, Member]]:
    """A run of all members but the last, which is taken in after three steps, until its end."""
    async with memory_group(path, members) as group:
        joiner = group[members - 1]
        group.leave_out(joiner)
        run = Joined(group, gate)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, asked)
                await run.wait_step(3)
                group.let_in(joiner)
                view = await run.wait_view(lambda view: joiner.device in view.members)
                gate.allow(view.resume_step + 5)
                yield run, joiner
                gate.allow(STEPS)


@contextlib.asynccontextmanager
async def nothing_sent_to(run: Joined, joiner: Member) -> contextlib.AsyncIterator[None]:
    """No state can reach the joiner meanwhile."""
    async with contextlib.AsyncExitStack() as held:
        for device in run.group.members:
            if device != joiner.device:
                await held.enter_async_context(run.group.held_link(device, joiner.device))
        yield


def assert_same(run: Joined, alone: TrainResult) -> None:
    (result,) = run.results
    assert float_bits(result.losses) == float_bits(alone.losses)
    assert result.state_digest == alone.state_digest


@pytest.mark.parametrize("members", [2, 3])
async def test_state_comes_while_the_others_train_and_nothing_moves_at_the_change(
    tmp_path: Path, alone: TrainResult, gate: Gate, members: int
) -> None:
    async with joining(tmp_path, members, request(tmp_path), gate) as (run, joiner):
        before = run.view()
        waiting = await run.wait_view(lambda view: bool(view.aim))
        assert layout(waiting) == layout(before)
        assert joiner.device in waiting.members
        assert joiner.device in receivers(waiting).values()
        assert any("once the states" in reason for reason in waiting.plan.reasons)
        async with nothing_sent_to(run, joiner):
            await run.wait_step(waiting.resume_step + 4)
            assert run.view() == waiting
        after = await run.wait_view(lambda view: view.number > waiting.number)
        gate.allow(STEPS)
        assert not asked_for(run.group, "state")
        await until(lambda: len(asked_for(run.group, "activation")) > 0)
    assert layout(after) == [(at.device, at.span.segments) for at in waiting.aim]
    assert after.aim == ()
    assert after.resume_step >= waiting.resume_step + 4
    assert after.restoration is not None
    moved = {s for replay in after.restoration.replays for s in replay.span.segments}
    assert moved == set(receivers(waiting))
    assert {replay.step for replay in after.restoration.replays} == {waiting.resume_step}
    assert run.results[0].stages == members
    assert not asked_for(run.group, "state")
    assert_same(run, alone)


async def test_sets_wait_for_the_joiner_and_training_does_not(
    tmp_path: Path, alone: TrainResult, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "REPLICA_WAIT_S", math.inf)
    async with joining(tmp_path, 2, request(tmp_path, replicate_every=1), gate) as (run, joiner):
        waiting = await run.wait_view(lambda view: bool(view.aim))
        async with nothing_sent_to(run, joiner):
            await run.wait_step(waiting.resume_step + 4)
            assert run.view() == waiting
        after = await run.wait_view(lambda view: view.number > waiting.number)
    assert layout(after) == [(at.device, at.span.segments) for at in waiting.aim]
    assert_same(run, alone)


async def test_joiner_takes_a_stage_that_is_lost_while_states_come_at_once(
    tmp_path: Path, alone: TrainResult, gate: Gate
) -> None:
    async with joining(tmp_path, 3, request(tmp_path), gate) as (run, joiner):
        waiting = await run.wait_view(lambda view: bool(view.aim))
        async with nothing_sent_to(run, joiner):
            await run.wait_step(waiting.resume_step + 2)
            run.group.kill(run.group[1])
        after = await run.wait_view(lambda view: view.number > waiting.number)
    assert [stage.device for stage in after.plan.stages] == [run.group[0].device, joiner.device]
    assert after.aim == ()
    assert_same(run, alone)


async def test_segments_move_at_once_where_new_cuts_round_other_values(
    tmp_path: Path, gate: Gate
) -> None:
    async with joining(tmp_path, 3, request(tmp_path, codec="bf16"), gate) as (run, joiner):
        after = await run.wait_view(lambda view: joiner.device in view.members)
        assert after.aim == ()
        assert after.plan.stage_of(joiner.device) is not None
    assert {sender for sender, _ in asked_for(run.group, "state")} >= {joiner.device}


async def test_weights_that_are_frozen_come_in_advance_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    rng = np.random.Generator(np.random.Philox(4))
    tokens = rng.integers(0, VOCABULARY, (60, CONTEXT + 1))
    keep = np.ones((60, CONTEXT), bool)
    np.savez(tmp_path / "data.npz", tokens=tokens[:, :-1], keep=keep, labels=tokens[:, 1:])
    made = varied_bundle()
    bundle = write_weighted(tmp_path / "bundle", made, some_weights(made, ("fixed.w",)))
    cost = KindCost(forward_ns=20_000_000, backward_ns=40_000_000)
    costs = dict.fromkeys(bundle.manifest.kinds, cost)
    slowest = KindCost(forward_ns=60_000_000, backward_ns=120_000_000)
    costs[bundle.manifest.segments[0].kind] = slowest  # so that `fixed` is in the second half
    monkeypatch.setattr(
        "p2ptrain.runtime.compute.known_profiles.profile_kinds", lambda *_, **__: costs
    )
    data = str(tmp_path / "data.npz")
    asked = request_for(tmp_path, bundle, data=data, steps=STEPS, replicate_every=EVERY)
    async with joining(tmp_path, 2, asked, gate) as (run, joiner):
        run.group[0].drops = lambda message: isinstance(message, SegmentSaved)
        waiting = await run.wait_view(lambda view: bool(view.aim))
        names = {s: bundle.manifest.segments[s].name for s in receivers(waiting)}
        (segment,) = [s for s, name in names.items() if name == "fixed"]
        weights = joiner.runs_path / waiting.run / WEIGHTS_FOLDER
        await until((weights / f"segment-{segment:04d}.safetensors").exists)
        assert run.view() == waiting
        run.scope.cancel()
