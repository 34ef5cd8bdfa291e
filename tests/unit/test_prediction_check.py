"""The prediction check's pure parts: what a case is called, what a miss is, the table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from p2ptrain.ids import RunId
from p2ptrain.runtime.reports import PlanReport, StageReport
from tests.planning_cases import device
from tools import prediction_check
from tools.prediction_check import CASES, Row, markdown, network_words, plan_words, report
from tools.throttle.cgroups import Limits
from tools.throttle.group import CORES_MAX, Cable, Place, checked
from tools.wifi_emulator.medium import Air


def row(predicted_s: float, measured_s: float) -> Row:
    return Row(
        case="two", words="0.5 + 0.5 cores, cables of 100 Mbit/s", plan="1f1b, 6 + 4 segments",
        predicted_s=predicted_s, measured_s=measured_s, least_s=0.9, greatest_s=1.2, steps=18,
    )  # fmt: skip


def plan(*counts: int) -> PlanReport:
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    stages = tuple(
        StageReport(
            device=device("abc"[i]), name=f"peer-{i}", stage=i, first_segment=end - count,
            last_segment=end - 1, segments=("x",) * count, parameters=1, memory_bytes=1, share=0.5,
        )
        for i, (end, count) in enumerate(zip(ends, counts, strict=True))
    )  # fmt: skip
    return PlanReport(
        run=RunId("r"), bundle="b", plan="p", view=1, schedule="zb-h1", stages=stages,
        predicted_step_s=1.25, exactness="exact", reasons=(),
    )  # fmt: skip


def test_cases_differ_and_can_be_kept() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 5
    for case in CASES:
        checked([Place(limits=Limits(cores=share)) for share in case.cores])
        assert sum(case.cores) <= CORES_MAX


def test_miss_is_a_share_of_what_was_measured() -> None:
    assert row(1.1, 1.0).miss == pytest.approx(0.1)
    assert row(0.8, 1.0).miss == pytest.approx(-0.2)


def test_table_says_how_many_are_within_the_tolerance() -> None:
    text = markdown([row(1.05, 1.0), row(0.8, 1.0)])
    assert "| 1.050 s | 1.000 s (0.900 to 1.200) | +5.0% |" in text
    assert text.endswith("1 of 2 within 10%; median 12.5%.")
    made = report([row(1.05, 1.0), row(0.8, 1.0)], {"cores": 2})
    assert made["worst"] == pytest.approx(0.2)


def test_words_name_plan_and_network() -> None:
    assert plan_words(plan(10)) == "10 segments"
    assert plan_words(plan(3, 3, 4)) == "zb-h1, 3 + 3 + 4 segments"
    assert network_words(Cable(rate_mbit=100)) == "cables of 100 Mbit/s"
    air = Air(rate_mbit=25, delay_ms=5, shared=False)
    assert network_words(air) == "emulated links of 25 Mbit/s, 5 ms"
    lossy = Air(rate_mbit=50, delay_ms=3, loss_percent=1)
    assert network_words(lossy) == "emulated one medium of 50 Mbit/s, 3 ms, 1 % loss"


def test_words_tell_each_part_of_a_stage_that_several_share() -> None:
    first, second, third = plan(6, 6, 4).stages
    shared = tuple(
        dataclasses.replace(line, stage=0, split="replicas", part=part)
        for line, part in ((first, 0.6), (second, 0.4))
    )
    both = dataclasses.replace(plan(10), stages=(*shared, dataclasses.replace(third, stage=1)))
    assert plan_words(both) == "zb-h1, 6 (replicas, 60 to 40 %) + 4 segments"
    assert plan_words(dataclasses.replace(both, stages=shared)) == (
        "6 (replicas, 60 to 40 %) segments"
    )


def test_requests_ask_for_stages_or_for_a_plan() -> None:
    for case in CASES:
        asked = prediction_check.request(case, Path("text"), 10)
        assert (asked.plan is None) == (case.kind == "pipeline")
        assert asked.stages == (len(case.cores) if asked.plan is None else None)


def test_prediction_is_written_down_with_its_plan_and_the_time(tmp_path: Path) -> None:
    prediction_check.write_down(tmp_path / "p.json", CASES[0], plan(10))
    said = json.loads((tmp_path / "p.json").read_text())
    assert said["predicted_step_s"] == said["plan"]["predicted_step_s"] == 1.25
    assert said["case"] == CASES[0].name
    assert said["written_at"].endswith("+00:00")
