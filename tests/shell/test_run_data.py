"""Runs over records: equal on any number of stages; data that changes ends a run."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import trio

from p2ptrain.errors import DataError
from p2ptrain.runtime.reports import TrainRequest, TrainResult
from tests.bundles import CONTEXT, VOCABULARY, tiny_bundle
from tests.memory_group import MemoryGroup, float_bits, memory_group, request_for

BUNDLE = tiny_bundle()
RECORDS = 21
"""Not a multiple of the minibatch: data epochs begin within a step."""
SECONDS_MAX = 60


@pytest.fixture
def request_of(tmp_path: Path) -> TrainRequest:
    rng = np.random.Generator(np.random.Philox(4))
    tokens = rng.integers(0, VOCABULARY, (RECORDS, CONTEXT + 1))
    np.savez(tmp_path / "data.npz", tokens=tokens[:, :-1], labels=tokens[:, 1:])
    return request_for(tmp_path, BUNDLE, data=str(tmp_path / "data.npz"))


async def train(group: MemoryGroup, request: TrainRequest) -> TrainResult:
    with trio.fail_after(SECONDS_MAX):
        return await group[0].train(request)


async def test_records_give_equal_curves_on_one_and_three_stages(
    tmp_path: Path, request_of: TrainRequest
) -> None:
    results = []
    for members in (1, 3):
        async with memory_group(tmp_path, members) as group:
            wanted = dataclasses.replace(request_of, stages=members)
            results.append(await train(group, wanted))
            texts = [getattr(report, "text", "") for report in group.reports("note")]
            assert texts[0] == "the data: 21 records; 1 held out"
    assert [result.stages for result in results] == [1, 3]
    assert float_bits(results[0].losses) == float_bits(results[1].losses)
    assert results[0].heldout_last == results[1].heldout_last


async def test_data_that_changes_during_a_run_ends_it_with_a_sentence(
    tmp_path: Path, request_of: TrainRequest
) -> None:
    async with memory_group(tmp_path, 2) as group:
        data = Path(request_of.data)

        def shrink(_: object) -> bool:
            os.truncate(data, 100)
            return False

        group[0].drops = shrink
        with pytest.raises(DataError, match=r"data\.npz has changed while it is in use"):
            await train(group, request_of)
