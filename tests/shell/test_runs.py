"""Runs of a whole group in one process: equal curves on any number of stages."""

from __future__ import annotations

from pathlib import Path

import trio

from p2ptrain.runtime.reports import TrainResult
from p2ptrain.training.contract import OptimizerChoice
from tests.bundles import tiny_bundle
from tests.memory_group import float_bits, memory_group, request_for

CLIPPING = OptimizerChoice(warmup_steps=2, clip_norm=0.05, peak_learning_rate=0.02)
BUNDLE = tiny_bundle()
SECONDS_MAX = 60


async def train(path: Path, *, members: int, **changes: object) -> TrainResult:
    async with memory_group(path, members) as group:
        with trio.fail_after(SECONDS_MAX):
            return await group[0].train(request_for(path, BUNDLE, optimizer=CLIPPING, **changes))


async def test_losses_and_state_are_equal_on_one_to_four_stages(tmp_path: Path) -> None:
    results = [await train(tmp_path, members=n, stages=n) for n in (1, 2, 3, 4)]
    assert [result.stages for result in results] == [1, 2, 3, 4]
    assert len({float_bits(result.losses) for result in results}) == 1
    assert len({result.state_digest for result in results}) == 1
    assert len({result.heldout_last for result in results}) == 1
    assert len(results[0].losses) == 6
