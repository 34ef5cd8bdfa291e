"""A device whose disk is slow keeps records of steps in memory, and returns as a new member."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from p2ptrain.agreement.run_messages import ViewHead
from p2ptrain.runtime.keeping.run_state import JOURNAL_FILE
from p2ptrain.runtime.reports import TrainResult
from tests.disturbed_runs import SECONDS_MAX, Disturbed, assert_same, request, undisturbed
from tests.memory_group import Member, memory_group, until


def steps_on_disk(member: Member) -> int:
    (journal,) = member.runs_path.glob(f"*/{JOURNAL_FILE}")
    return journal.read_text().count('"kind":"steps"')


@pytest.fixture
def alone(tmp_path: Path) -> TrainResult:
    return undisturbed(tmp_path / "alone")


async def test_device_that_kept_its_records_in_memory_returns_without_a_vote(
    tmp_path: Path, alone: TrainResult
) -> None:
    async with memory_group(tmp_path, 3) as group:
        run = Disturbed(group)
        group[2].steps_in_memory = True
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, request(tmp_path, stages=3))
                await run.wait_step(6)
                assert steps_on_disk(group[2]) == 0
                assert steps_on_disk(group[1]) > 0
                group.kill(group[2])
                fresh = await group.restart(group[2])
                told = group[1].received
                await until(
                    lambda: any(
                        isinstance(each, ViewHead) and sender == fresh.device and not each.votes
                        for each, sender in zip(told, group[1].senders, strict=True)
                    )
                )
    assert run.result is not None
    assert_same(run.result, alone)
