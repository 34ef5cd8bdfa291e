"""Runs whose stages several peers share by microbatches: data parallelism and hybrids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trio

from p2ptrain.planner.plan_file import read_plan
from p2ptrain.runtime.reports import PlanReport
from p2ptrain.schedule.replicated import owners_by_weight
from p2ptrain.store.bundles import Bundle
from p2ptrain.training.collectives import even_lengths
from p2ptrain.training.contract import OptimizerChoice
from p2ptrain.training.layout import flat_layout
from tests.bundles import tiny_bundle
from tests.memory_group import memory_group, request_for
from tests.replicated import (
    TOLERANCE,
    Layout,
    Run,
    assert_near,
    deviation,
    parameters,
    plan_text,
)
from tests.shell.test_runs_tied import tied_bundle

BUNDLE = tiny_bundle()
SEGMENTS = len(BUNDLE.manifest.segments)
CLIPPING = OptimizerChoice(warmup_steps=2, clip_norm=0.05, peak_learning_rate=0.02)
SECONDS_MAX = 60
STEPS = 20
ALONE: Layout = [([0], SEGMENTS, [1])]
LAYOUTS: dict[str, Layout] = {
    "data 2": [([0, 1], SEGMENTS, [1, 1])],
    "data 2, uneven": [([1, 0], SEGMENTS, [3, 1])],
    "data 3": [([0, 1, 2], SEGMENTS, [1, 1, 1])],
    "hybrid 2x2": [([0, 1], 2, [1, 1]), ([2, 3], SEGMENTS - 2, [2, 1])],
    "mixed 2, 1": [([0, 1], SEGMENTS - 1, [2, 1]), ([2], 1, [1])],
    "mixed 1, 2": [([2], 1, [1]), ([1, 0], SEGMENTS - 1, [1, 3])],
}


async def train(path: Path, layout: Layout, bundle: Bundle = BUNDLE, **changes: object) -> Run:
    tensors = path / "trained.safetensors"
    async with memory_group(path, 4) as group:
        asked = {
            "optimizer": CLIPPING, "steps": STEPS, "microbatches": 6, "heldout_microbatches": 3,
            "plan": plan_text(layout, str(changes.pop("schedule", "1f1b"))),
            "safetensors": str(tensors), **changes,
        }  # fmt: skip
        with trio.fail_after(SECONDS_MAX):
            result = await group[0].train(request_for(path, bundle, **asked))
        assert not group.broken, "a peer did what another one refuses, and the run went on without"
    return Run(result, parameters(tensors), group)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One peer's run."""
    return trio.run(train, tmp_path_factory.mktemp("one"), ALONE)


@pytest.mark.parametrize("name", LAYOUTS)
async def test_replicas_agree_with_one_peer_and_with_themselves(
    tmp_path: Path, name: str, one: Run
) -> None:
    shared = await train(tmp_path, LAYOUTS[name])
    assert_near(shared.result, one.result)
    assert deviation(shared.trained, one.trained) < TOLERANCE
    assert shared.result.losses[-1] < shared.result.losses[0]
    again = await train(tmp_path, LAYOUTS[name])
    assert again.bits == shared.bits
    (plan,) = shared.group.reports("plan")
    assert isinstance(plan, PlanReport)
    assert [stage.name for stage in plan.stages] == [
        f"peer-{peer}" for peers, *_ in LAYOUTS[name] for peer in peers
    ]


async def test_every_microbatch_goes_to_its_owners_and_gradients_between_them(
    tmp_path: Path,
) -> None:
    run = await train(tmp_path, LAYOUTS["hybrid 2x2"], steps=2)
    members = [run.group[index].device for index in range(4)]
    first, second = owners_by_weight((1, 1), 6), owners_by_weight((2, 1), 6)
    boundary = {
        (members.index(a), members.index(b), h.microbatch)
        for a, b, h in run.group.tensors if h.kind == "activation" and h.phase == "train"
    }  # fmt: skip
    assert boundary == {(first[m], 2 + second[m], m) for m in range(6)}
    fed = {
        (h.kind, members.index(b), h.microbatch)
        for _, b, h in run.group.tensors if h.kind in ("input", "labels") and h.phase == "train"
    }  # fmt: skip
    own_input = {("input", 0, m) for m in range(6) if first[m] == 0}  # the home peer's own
    assert fed | own_input == {
        *(("input", first[m], m) for m in range(6)),
        *(("labels", 2 + second[m], m) for m in range(6)),
    }
    pieces = [(members.index(a), members.index(b), h) for a, b, h in run.group.tensors]
    reduced = [(a, b, h.kind, h.segment) for a, b, h in pieces if h.kind in ("part", "total")]
    lengths = [flat_layout(BUNDLE.manifest, index).length for index in range(SEGMENTS)]
    assert all(min(even_lengths(length, 2)) > 0 for length in lengths)
    assert sorted(reduced) == sorted(
        (a, b, kind, segment)
        for kind in ("part", "total")
        for stage, segments in (((0, 1), range(2)), ((2, 3), range(2, SEGMENTS)))
        for a, b in (stage, stage[::-1])
        for segment in segments
        for _ in range(2)  # steps
    )


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("data 2", {"schedule": "gpipe"}),
        ("hybrid 2x2", {"schedule": "gpipe", "evaluate_every": 2}),
        ("hybrid 2x2", {"schedule": "eager-1f1b", "evaluate_every": 2}),
        ("hybrid 2x2", {"heldout_microbatches": 1, "evaluate_every": 1, "checkpoint_every": 2}),
        ("mixed 1, 2", {"heldout_microbatches": 8, "evaluate_every": 3}),
        ("data 3", {"rematerialise": True}),
        ("data 2, uneven", {"optimizer": OptimizerChoice(name="sgd", peak_learning_rate=0.05)}),
    ],
)
async def test_what_else_a_run_may_be_asked_for(
    tmp_path: Path, name: str, changes: dict[str, object]
) -> None:
    asked = {"steps": 6, **changes}
    one, shared = (
        await train(tmp_path, ALONE, **asked),
        await train(tmp_path, LAYOUTS[name], **asked),
    )
    assert_near(shared.result, one.result)


@pytest.mark.parametrize(
    ("codec", "layout"),
    [
        ("bf16", LAYOUTS["hybrid 2x2"]),
        ("int8", [([0, 1], 2, [2, 1]), ([2], SEGMENTS - 2, [1])]),
    ],
)
async def test_boundaries_of_replicas_are_rounded_alike_every_time(
    tmp_path: Path, codec: str, layout: Layout
) -> None:
    runs = [await train(tmp_path, layout, codec=codec, steps=6) for _ in range(2)]
    assert runs[0].bits == runs[1].bits
    one = await train(tmp_path, ALONE, steps=6)
    np.testing.assert_allclose(runs[0].result.losses, one.result.losses, rtol=0.02)


@pytest.mark.parametrize(
    "layout",
    [
        [([0, 1], SEGMENTS, [1, 1])],
        [([0, 1], 2, [2, 1]), ([2, 3], SEGMENTS - 2, [1, 1])],
        [([0], 2, [1]), ([2, 3], 2, [1, 1]), ([1], SEGMENTS - 4, [1])],
    ],
)
async def test_tied_copies_have_one_gradient_on_replicas(tmp_path: Path, layout: Layout) -> None:
    bundle = tied_bundle()
    one = await train(tmp_path, ALONE, bundle, steps=6)
    shared = await train(tmp_path, layout, bundle, steps=6)
    assert_near(shared.result, one.result)
    assert deviation(shared.trained, one.trained) < TOLERANCE


async def test_plan_text_is_a_plan_file() -> None:
    asked = read_plan(plan_text(LAYOUTS["mixed 1, 2"]), file="a layout")
    assert [stage.weights for stage in asked.stages] == [None, (1, 3)]
