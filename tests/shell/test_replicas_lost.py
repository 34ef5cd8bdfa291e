"""Runs whose stages several peers share lose one of them and go on from the committed state."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from p2ptrain.agreement.run_messages import DecidedView
from p2ptrain.agreement.view import View
from p2ptrain.runtime.compute.stage import StageWorker
from p2ptrain.runtime.reports import TrainResult
from tests.bundles import tiny_bundle
from tests.disturbed_runs import CLIPPING, SECONDS_MAX, Disturbed
from tests.memory_group import MemoryGroup, float_bits, memory_group, request_for
from tests.replicated import TOLERANCE, Layout, plan_text

BUNDLE = tiny_bundle()
SEGMENTS = len(BUNDLE.manifest.segments)
STEPS, AT = 16, 6
LAYOUTS: dict[str, Layout] = {
    "data": [([0, 1, 2], SEGMENTS, [1, 2, 1])],
    "hybrid": [([0, 1], 2, [1, 1]), ([2, 3], SEGMENTS - 2, [2, 1])],
    "mixed": [([0, 1], 3, [2, 1]), ([2], SEGMENTS - 3, [1])],
    "mixed around": [([0, 1], 2, [1, 1]), ([2], 2, [1]), ([3, 4], SEGMENTS - 4, [1, 2])],
}
CASES = [
    ("data", 1), ("data", 2), ("hybrid", 1), ("hybrid", 2), ("hybrid", 3), ("mixed", 1),
    ("mixed", 2), ("mixed around", 2), ("mixed around", 3),
]  # fmt: skip


@dataclass
class Updates:
    """What every segment was after every update, wherever it was made."""

    states: dict[tuple[int, int], set[str]] = field(default_factory=lambda: defaultdict(set))
    replayed: set[int] = field(default_factory=set)

    def note(self, worker: StageWorker, step: int) -> None:
        for segment in worker.segments:
            state, hashed = worker.state(segment, step), hashlib.sha256()
            for array in (
                *state.tensors.values(),
                *(v for s in state.state.values() for v in s.values()),
            ):
                hashed.update(array.tobytes())
            self.states[step, segment].add(hashed.hexdigest())


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> Iterator[Updates]:
    """Of whatever runs in this process, until somebody takes a fresh one."""
    noted, update = Updates(), StageWorker.update

    def watched(worker: StageWorker, *, step: int, **scalars: Any) -> None:  # Any: floats
        update(worker, step=step, **scalars)
        noted.note(worker, step)

    monkeypatch.setattr(StageWorker, "update", watched)
    return noted


async def train(
    path: Path, layout: Layout, victim: int | None = None, *, reserves: int = 0, at: int = AT
) -> tuple[TrainResult, MemoryGroup]:
    """To the end; with a victim that is killed after a step."""
    count = 1 + max(peer for peers, *_ in layout for peer in peers) + reserves
    asked = request_for(
        path, BUNDLE, optimizer=CLIPPING, steps=STEPS, microbatches=6, replicate_every=2,
        plan=plan_text(layout),
    )  # fmt: skip
    async with memory_group(path, count) as group:
        run = Disturbed(group)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, asked)
                if victim is not None:
                    await run.wait_step(at)
                    group.kill(group[victim])
        assert run.result is not None
        return run.result, group


def views(group: MemoryGroup) -> list[View]:
    """Those that followed the first one, as members told each other."""
    received = [message for member in group.members.values() for message in member.received]
    told = [message.value for message in received if isinstance(message, DecidedView)]
    later = {view.digest: view for view in told if view.restoration is not None}
    return sorted(later.values(), key=lambda view: view.number)


@dataclass(frozen=True)
class Whole:
    """An undisturbed run, with the state of every segment after every update."""

    result: TrainResult
    states: dict[tuple[int, int], set[str]]


@pytest.fixture(scope="module")
def whole_runs() -> dict[str, Whole]:
    """Those that there have been, by layout."""
    return {}


async def undisturbed(known: dict[str, Whole], path: Path, name: str, updates: Updates) -> Whole:
    """The run of a layout, whoever is lost in another one; its updates are taken."""
    if name not in known:
        result, _ = await train(path, LAYOUTS[name])
        known[name] = Whole(result, dict(updates.states))
        updates.states.clear()
    return known[name]


@pytest.mark.parametrize(("name", "victim"), CASES)
async def test_committed_state_is_exact_and_the_curve_stays_near(
    tmp_path: Path, updates: Updates, name: str, victim: int, whole_runs: dict[str, Whole]
) -> None:
    layout = LAYOUTS[name]
    known = await undisturbed(whole_runs, tmp_path, name, updates)
    whole, wanted = known.result, known.states
    assert all(len(states) == 1 for states in wanted.values()), "replicas differ"
    struck, group = await train(tmp_path, layout, victim)
    (view,) = views(group)
    resumed = view.resume_step
    assert resumed >= AT
    assert view.restoration is not None
    alone = [peers for peers, *_ in layout if peers == [victim]]
    assert len(view.restoration.replays) == len(alone), "a sibling has what a replica had"
    if not alone:
        left = [tuple(group[p].device for p in peers if p != victim) for peers, *_ in layout]
        assert [stage.devices for stage in view.plan.stages] == left, "siblings go on together"
    for replay in view.restoration.replays:
        assert 0 < replay.step < resumed, "nothing was kept, or nothing was to be made again"
        assert len({part.device for part in replay.parts}) > 1
    assert float_bits(struck.losses[:resumed]) == float_bits(whole.losses[:resumed])
    for (step, segment), states in updates.states.items():
        assert len(states) == 1, f"step {step} of segment {segment} was made in two ways"
        if step <= resumed:
            assert states == wanted[step, segment], f"step {step}, segment {segment}"
    np.testing.assert_allclose(struck.losses, whole.losses, rtol=TOLERANCE)
    assert struck.heldout_last == pytest.approx(whole.heldout_last, rel=TOLERANCE)
