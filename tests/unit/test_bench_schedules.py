"""The benchmark of schedules: its stages' plan file, ratios round by round, the table."""

from __future__ import annotations

import pytest

from p2ptrain.ids import RunId
from p2ptrain.planner.plan_file import read_plan
from p2ptrain.runtime.reports import PlanReport, StageReport
from tests.planning_cases import device
from tools.bench_schedules import Turns, markdown, plan_of, rows_of


def test_every_schedule_is_asked_for_on_the_same_stages() -> None:
    stages = tuple(
        StageReport(
            device=device(letter), name=f"peer-{letter}", stage=index, first_segment=first,
            last_segment=first, segments=("x",) * count, parameters=1, memory_bytes=1, share=0.5,
        )
        for index, (letter, first, count) in enumerate((("b", 0, 6), ("a", 6, 4)))
    )  # fmt: skip
    plan = PlanReport(
        run=RunId("r"), bundle="b", plan="p", view=1, schedule="1f1b", stages=stages,
        predicted_step_s=1.25, exactness="exact", reasons=(),
    )  # fmt: skip
    asked = read_plan(plan_of(plan), file="plan")
    assert asked.schedule is None, "the request has it"
    assert [(stage.devices, stage.segments) for stage in asked.stages] == [
        (("peer-b",), 6),
        (("peer-a",), 4),
    ]


def test_ratios_are_taken_within_a_round() -> None:
    first = Turns(schedule="1f1b", predicted_s=[2.0, 2.2, 2.1], measured_s=[2.0, 4.0, 2.1])
    other = Turns(schedule="zb-h1", predicted_s=[1.5, 1.5, 1.7], measured_s=[1.6, 3.2, 2.1])
    plain, delayed = rows_of([first, other])
    assert (plain.ratio, plain.measured_s) == (1.0, 2.1)
    assert delayed.ratio == pytest.approx(1.25), "a slow moment falls on both"
    assert (delayed.ratio_least, delayed.predicted_s) == (1.0, 1.5)
    table = markdown([plain, delayed], [6, 4])
    assert table.startswith("| schedule, 6 + 4 segments |")
    assert table.endswith("| zb-h1 | 1.500 s | 2.100 s | 1.250 (1.000 to 1.250) |")
