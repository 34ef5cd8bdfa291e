"""A peer that becomes slow loses segments to others, and no bit changes: a group in one process.

What work takes is counted, not waited for: clocks that only work moves on.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from p2ptrain import limits
from p2ptrain.agreement.run_messages import ViewPrepare
from p2ptrain.planner.plan import Plan
from p2ptrain.runtime.reports import StepReport, TrainResult
from p2ptrain.training.messages import Done
from tests.bundles import tiny_bundle
from tests.memory_group import MemoryGroup, float_bits, memory_group, request_for, until

BUNDLE = tiny_bundle(blocks=7)
STEPS = 90
SECONDS_MAX = 60


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps take no time here: judge as soon as there are enough of them."""
    monkeypatch.setattr(limits, "DRIFT_FOR_S", 0.0)
    monkeypatch.setattr(limits, "DRIFT_SAMPLE_S", 0.0)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    path = tmp_path_factory.mktemp("alone")

    async def train() -> TrainResult:
        async with memory_group(path, 1) as group:
            return await group[0].train(request_for(path, BUNDLE, steps=STEPS))

    return trio.run(train)


async def wait_step(group: MemoryGroup, step: int) -> None:
    await group.wait(
        lambda: any(isinstance(r, StepReport) and r.step >= step for _, r in group.events)
    )


def plan_of(group: MemoryGroup) -> Plan:
    member = group[0].runs.member
    assert member is not None
    assert member.plan is not None
    return member.plan


async def test_peer_that_becomes_slow_loses_segments_and_no_bit_changes(
    tmp_path: Path, alone: TrainResult
) -> None:
    results: list[TrainResult] = []
    async with memory_group(tmp_path, 3) as group:

        async def train() -> None:
            results.append(await group[0].train(request_for(tmp_path, BUNDLE, steps=STEPS)))

        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(train)
                await wait_step(group, 5)
                before = plan_of(group)
                slow = max(stage.device for stage in before.stages)
                group.members[slow].work.slowness = 4
                await until(lambda: plan_of(group).view > before.view)
                after = plan_of(group)
    held, kept = (
        {stage.device: stage.segment_count for stage in plan.stages} for plan in (before, after)
    )
    assert len(held) == 3
    assert kept.get(slow, 0) < held[slow]
    assert "times the planned time" in after.reasons[0]
    (result,) = results
    assert float_bits(result.losses) == float_bits(alone.losses)
    assert result.state_digest == alone.state_digest


async def test_peers_that_become_slow_together_change_nothing(tmp_path: Path) -> None:
    async with memory_group(tmp_path, 2) as group:
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(group[0].train, request_for(tmp_path, BUNDLE, steps=60))
                await wait_step(group, 5)
                for member in group.members.values():
                    member.work.slowness = 3
        told = [message for member in group.members.values() for message in member.received]
    slow = [m for m in told if isinstance(m, Done) and m.step > 5 and m.compute_ns > 0]
    assert len(slow) > 100
    assert not any(isinstance(message, ViewPrepare) for message in told)
