"""Tied tensors in runs of a whole group: one gradient, wherever the copies live."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import trio

from p2ptrain.runtime.reports import TrainResult
from p2ptrain.store.bundles import Bundle, bundle_from_parts
from p2ptrain.store.runs import RunDirectory
from p2ptrain.training.contract import OptimizerChoice
from p2ptrain.training.random import parameters_digest
from p2ptrain.training.safetensors import decode_tensors
from tests.bundles import graph_files, tiny_bundle
from tests.memory_group import MemoryGroup, float_bits, memory_group, request_for, until

CLIPPING = OptimizerChoice(warmup_steps=2, clip_norm=0.05, peak_learning_rate=0.02)
TIED = ("block0.w", "block2.w", "block3.w")
SECONDS_MAX = 60


def tied_bundle() -> Bundle:
    """Blocks 0, 2 and 3 share their matrix."""
    tiny = tiny_bundle()
    tensors = tuple(
        dataclasses.replace(tensor, tied_to=TIED[0]) if tensor.name in TIED[1:] else tensor
        for tensor in tiny.manifest.tensors
    )
    manifest = dataclasses.replace(tiny.manifest, tensors=tensors)
    manifest = dataclasses.replace(manifest, golden_parameters=parameters_digest(manifest, 0))
    return bundle_from_parts(manifest.to_bytes(), graph_files(tiny))


BUNDLE = tied_bundle()


async def train(path: Path, *, members: int, **changes: object) -> tuple[TrainResult, MemoryGroup]:
    wanted = request_for(path, BUNDLE, **{"optimizer": CLIPPING, **changes})
    async with memory_group(path, members) as group:
        with trio.fail_after(SECONDS_MAX):
            result = await group[0].train(wanted)
            await until(lambda: all(m.runs.current_run is None for m in group.members.values()))
    return result, group


async def test_tied_copies_have_one_gradient_on_one_to_five_stages(tmp_path: Path) -> None:
    results = {n: (await train(tmp_path, members=n, stages=n))[0] for n in (1, 2, 3, 5)}
    one = results[1]
    for stages, result in results.items():
        assert result.stages == stages
        assert float_bits(result.losses) == float_bits(one.losses)
        assert result.state_digest == one.state_digest
        assert result.heldout_last == one.heldout_last
    assert one.losses[-1] < one.losses[0]


async def test_copies_stay_equal_and_travel_once_per_step(tmp_path: Path) -> None:
    result, group = await train(tmp_path, members=5, stages=5, steps=4, evaluate_every=1)
    (plan,) = group.reports("plan")
    tied = [(a, b, h) for a, b, h in group.tensors if h.kind == "tied"]
    stage_of = {}
    for stage in plan.stages:  # type: ignore[attr-defined]  # a PlanReport
        for segment in range(stage.first_segment, stage.last_segment + 1):
            stage_of[segment] = stage.device
    holders = {1: stage_of[1], 3: stage_of[3], 4: stage_of[4]}
    expected = {
        (holders[segment], other, segment, step)
        for segment in holders
        for other in set(holders.values()) - {holders[segment]}
        for step in range(1, 5)
    }
    assert expected
    assert {(a, b, h.segment, h.step) for a, b, h in tied} == expected
    assert len(tied) == len(expected)
    directory = RunDirectory(group[0].runs_path / result.run)
    folder = directory.path / "checkpoints" / "step-00000004"
    copies = []
    for segment, name in zip(holders, TIED, strict=True):
        stored = decode_tensors((folder / f"segment-{segment:04d}.safetensors").read_bytes())
        copies.append(stored.tensors[f"parameter/{name}"])
    np.testing.assert_array_equal(copies[0], copies[1])
    np.testing.assert_array_equal(copies[0], copies[2])


async def test_tied_run_stops_and_resumes_on_other_stages(tmp_path: Path) -> None:
    whole, _ = await train(tmp_path, members=2, stages=2, steps=6)
    async with memory_group(tmp_path, 3) as group:
        wanted = request_for(tmp_path, BUNDLE, optimizer=CLIPPING, steps=6, stages=3)
        results: list[TrainResult] = []

        async def conduct() -> None:
            results.append(await group[0].train(wanted))

        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(conduct)
                await group.wait(lambda: len(group.reports("step")) >= 2)
                group[0].runs.stop()
            first = results[0]
            second = await group[0].train(request_for(tmp_path, BUNDLE, resume=first.run, stages=2))
    assert first.steps < 6
    assert float_bits(first.losses + second.losses) == float_bits(whole.losses)
    assert second.state_digest == whole.state_digest


@pytest.mark.parametrize("victim", [1, 2])
async def test_member_that_dies_among_tied_gradients_is_replayed(
    tmp_path: Path, victim: int
) -> None:
    whole, _ = await train(tmp_path, members=2, stages=2, steps=9)
    async with memory_group(tmp_path, 5) as group:
        wanted = request_for(
            tmp_path, BUNDLE, optimizer=CLIPPING, steps=9, stages=5, replicate_every=3
        )
        results: list[TrainResult] = []

        async def conduct() -> None:
            results.append(await group[0].train(wanted))

        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(conduct)
                await group.wait(lambda: len(group.reports("step")) >= 5)
                count = len(group.tensors)
                await group.wait(lambda: any(h.kind == "tied" for _, _, h in group.tensors[count:]))
                group.kill(group[victim])
            left = [m for m in group.members.values() if m.lives]
            await until(lambda: all(m.runs.current_run is None for m in left))
        assert all(group[victim].device in pair for pair in group.broken)
    assert float_bits(results[0].losses) == float_bits(whole.losses)
    assert results[0].state_digest == whole.state_digest
