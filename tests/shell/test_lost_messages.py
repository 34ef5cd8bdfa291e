"""What a link loses when it ends and is back at once: nothing waits for it for ever."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from p2ptrain.runtime.reports import TrainResult
from p2ptrain.training.messages import Done
from tests.disturbed_runs import SECONDS_MAX, Disturbed, assert_same, request, undisturbed
from tests.memory_group import memory_group


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The undisturbed run."""
    return undisturbed(tmp_path_factory.mktemp("alone"))


async def test_done_that_the_tie_breaker_missed_holds_nobody_up(
    tmp_path: Path, alone: TrainResult
) -> None:
    async with memory_group(tmp_path, 2) as group:
        run = Disturbed(group)
        group[1].drops = lambda message: isinstance(message, Done) and message.step == 5
        with trio.fail_after(SECONDS_MAX):
            await run.train(request(tmp_path, stages=2))
    assert run.result is not None
    assert_same(run.result, alone)
