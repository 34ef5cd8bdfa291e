"""What members have measured of their links reaches whoever plans."""

from __future__ import annotations

from pathlib import Path

from p2ptrain.planner.links import LinkFigure
from p2ptrain.runtime.reports import PlanReport
from tests.bundles import tiny_bundle
from tests.memory_group import memory_group, request_for
from tests.sim.plans import device

BUNDLE = tiny_bundle()


async def test_first_plan_uses_and_names_measured_links(tmp_path: Path) -> None:
    figure = LinkFigure(peer=device(1), round_trip_ns=3_000_000, bytes_per_s=8_000_000)
    async with memory_group(tmp_path, 3) as group:
        group[0].link_figures = (figure,)
        await group[0].train(request_for(tmp_path, BUNDLE, stages=3, steps=1))
        (plan,) = group.reports("plan")
    assert isinstance(plan, PlanReport)
    order = [stage.device for stage in plan.stages]
    beside = abs(order.index(device(0)) - order.index(device(1))) == 1
    assert any("round trip 3.0 ms, measured" in reason for reason in plan.reasons) == beside
    assert any("links between hosts are assumed" in reason for reason in plan.reasons)
