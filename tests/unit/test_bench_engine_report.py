"""What the engine's benchmark makes of its turns."""

import io

import pytest
from rich.console import Console

from tools.bench.engine_report import Case, Reading, markdown, print_cases, to_json
from tools.bench.ratios import Turn

HEADING = {
    "date": "2026-01-02",
    "command": "python tools/bench_engine.py",
    "machine": {"processor": "a processor", "cores": 2, "system": "Linux"},
}


def reading(*medians: float, loss: float = 2.0, peak: int = 100) -> Reading:
    """One turn per median, after a slow step that warms up."""
    turns = [Turn(seconds=(9.0, m, m), losses=(loss, 1.0, 1.0)) for m in medians]
    return Reading(turns=turns, peak_bytes=peak << 20)


def case(*, ours: Reading, threads: int = 1) -> Case:
    readings = {"p2ptrain": ours, "torch eager": reading(2.0, 4.0, 2.0, peak=200)}
    return Case(workload="gpt", threads=threads, rounds=3, warm_up=1, readings=readings)


def test_speed_is_the_median_of_the_ratios_of_each_round() -> None:
    speed = case(ours=reading(1.0, 1.0, 2.0)).speed("p2ptrain")
    assert (speed.least, speed.median, speed.greatest) == (1.0, 2.0, 4.0)


def test_memory_is_a_share_of_eager_torchs() -> None:
    assert case(ours=reading(1.0, 1.0, 1.0, peak=100)).memory("p2ptrain") == 0.5


@pytest.mark.parametrize(("loss", "agrees"), [(2.0001, True), (2.001, False)])
def test_agreement_is_of_the_first_losses(loss: float, agrees: bool) -> None:
    assert case(ours=reading(1.0, 1.0, 1.0, loss=loss)).agrees is agrees


@pytest.mark.parametrize(
    ("seconds", "threads", "verdict"),
    [(1.0, 1, "1.7 met"), (1.9, 1, "1.7 MISSED"), (1.0, 2, "1.4 met")],
)
def test_a_row_says_whether_its_target_was_met(seconds: float, threads: int, verdict: str) -> None:
    entry = markdown(HEADING, [case(ours=reading(seconds, seconds, seconds), threads=threads)])
    (row,) = [line for line in entry.splitlines() if line.startswith("| p2ptrain")]
    assert verdict in row


def test_a_case_without_target_has_no_verdict() -> None:
    entry = markdown(HEADING, [case(ours=reading(1.0, 1.0, 1.0), threads=4)])
    assert "met" not in entry.replace("contender", "")


def test_tables_and_json_hold_every_contender() -> None:
    one = case(ours=reading(1.0, 1.0, 1.0))
    shown = io.StringIO()
    print_cases(Console(file=shown, width=120), [one])
    for name in ("p2ptrain", "torch eager"):
        assert name in shown.getvalue()
        assert to_json(one)["contenders"][name]["seconds_per_step"]
