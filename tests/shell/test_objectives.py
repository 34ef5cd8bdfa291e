"""Runs that minimise energy, and what they say of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import trio

from p2ptrain.errors import PlanInfeasible
from p2ptrain.planner.profile import Battery
from p2ptrain.runtime.reports import PlanReport
from tests.bundles import tiny_bundle
from tests.memory_group import memory_group, request_for

BUNDLE = tiny_bundle()


async def test_a_frugal_run_shows_predicted_joules_beside_those_it_spent(tmp_path: Path) -> None:
    async with memory_group(tmp_path, 2) as group:
        with trio.fail_after(60):
            result = await group[0].train(request_for(tmp_path, BUNDLE, objective="energy"))
        (plan,) = group.reports("plan")
    assert isinstance(plan, PlanReport)
    assert len(plan.stages) == 1, "a second machine would idle, too"
    assert "for least energy" in plan.reasons[0]
    prediction = result.prediction
    assert prediction is not None
    assert prediction.predicted_step_joules == plan.predicted_step_joules
    assert (plan.predicted_step_joules or 0) > 0
    assert prediction.measured_step_joules == pytest.approx(
        result.energy.total_joules / len(result.losses)
    )
    assert result.energy.predicted_joules_per_sample is not None


async def test_joules_that_do_not_suffice_are_refused_with_what_would(tmp_path: Path) -> None:
    async with memory_group(tmp_path, 2) as group:
        with pytest.raises(PlanInfeasible, match="nothing is done with") as refused:
            with trio.fail_after(60):
                await group[0].train(request_for(tmp_path, BUNDLE, joules=1e-6))
    assert "--joules" in refused.value.hint


async def test_a_run_spends_no_battery_beyond_its_reserve(tmp_path: Path) -> None:
    """The home peer has 1 uJ to spend, the other one is plugged in; then both have."""
    low = Battery(charge_uj=200_001, capacity_uj=1_000_000, reserve_percent=20)
    async with memory_group(tmp_path, 2) as group:
        group[0].battery = low
        with trio.fail_after(60):
            await group[0].train(request_for(tmp_path, BUNDLE, steps=2))
            (plan,) = group.reports("plan")
            group[1].battery = low
            with pytest.raises(PlanInfeasible, match="do not last for 2 steps") as refused:
                await group[0].train(request_for(tmp_path, BUNDLE, steps=2))
    assert isinstance(plan, PlanReport)
    assert [stage.device for stage in plan.stages] == [group[1].device]
    assert any("that its battery has above its reserve" in reason for reason in plan.reasons)
    assert re.fullmatch("plug .{8}, .{8} in", refused.value.hint)


async def test_a_run_leaves_its_contract_to_the_planner(tmp_path: Path) -> None:
    async with memory_group(tmp_path, 2) as group:
        asked = request_for(
            tmp_path, BUNDLE, microbatch_size=None, codec="auto", rematerialise=None,
            schedule="auto", stages=2, steps=2,
        )  # fmt: skip
        with trio.fail_after(60):
            result = await group[0].train(asked)
        (plan,) = group.reports("plan")
    assert isinstance(plan, PlanReport)
    assert len(result.losses) == 2
    assert any(reason.startswith("chosen of 24 ways: ") for reason in plan.reasons)
