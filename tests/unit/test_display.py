"""What a person sees: tables of reports, sparse lines without a terminal."""

from __future__ import annotations

from dataclasses import replace

import pytest

from p2ptrain.cli.display import DemoDisplay, RunDisplay
from p2ptrain.cli.speech import say_error
from p2ptrain.cli.tables import (
    energy_lines,
    plan_lines,
    result_table,
    run_lines,
    status_lines,
    step_line,
)
from p2ptrain.demo.baselines import Baselines
from p2ptrain.errors import P2PTrainError
from p2ptrain.ids import DeviceId, RunId
from p2ptrain.runtime.reports import (
    EnergyReport,
    PeerStatus,
    PlanReport,
    PredictionReport,
    RunStatusReport,
    StepReport,
    TrainResult,
)
from p2ptrain.wire.codec import to_plain

STEP = StepReport(
    step=1, steps=100, loss=5.0, learning_rate=0.0, gradient_norm=1.0, seconds=1.0,
    samples_per_s=32.0, joules_per_sample=None, activities={},
)  # fmt: skip
PLAN = PlanReport(
    run=RunId("r" * 26), bundle="b", plan="c" * 64, view=1, schedule="1f1b", stages=(),
    predicted_step_s=0.5, exactness="exact", reasons=(),
)  # fmt: skip
RESULT = TrainResult(
    run=RunId("r" * 26), bundle="b", peers=1, stages=1, first_step=10, steps=90, losses=(3.0, 2.0),
    heldout_first=5.5, heldout_last=2.0, seconds=60.0, samples_per_s=1.0, tokens_per_s=128.0,
    bytes_sent=0, traffic=(), state_digest="", model_path=None, stopped=True,
    energy=EnergyReport(
        peers=(), marginal_joules=0.0, total_joules=0.0, joules_per_sample=None
    ),
)  # fmt: skip
STATUS = PeerStatus(
    group="g" * 16, group_name="home", device=DeviceId("a" * 26), name="attic", address="h:1",
    discovery="off", alone_because="nobody answers", members=(), run=RunId("r" * 26),
    run_state="paused", plan=None, runs=(),
)  # fmt: skip


def test_unknown_energy_is_a_dash_and_not_zero() -> None:
    assert step_line(STEP) == "step 1/100  loss 5.0000  32.0 samples/s  -/sample"
    assert step_line(replace(STEP, joules_per_sample=0.5)).endswith("500 mJ/sample")


def test_plan_without_reasons_still_says_why() -> None:
    assert plan_lines(PLAN)[0] == "why: the only placement that was possible"
    assert plan_lines(PLAN)[1] == "schedule 1f1b, 500.0 ms per step expected; exact"


def test_stopped_run_says_how_far_it_got() -> None:
    cells = list(result_table(RESULT).columns[1].cells)
    assert str(cells[0]) == "12 of 100"


def test_status_says_why_a_peer_is_alone() -> None:
    assert status_lines(STATUS)[2:] == [
        "alone, because nobody answers",
        "run rrrrrrrr: paused",
    ]


def test_progress_without_a_terminal_is_about_twenty_lines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with RunDisplay(as_json=False) as display:
        for step in range(1, 101):
            display.event("step", to_plain(replace(STEP, step=step)))
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert len(lines) == 21
    assert lines[0].startswith("p2ptrain: step 1/100")
    assert lines[-1].startswith("p2ptrain: step 100/100")


def test_json_keeps_tables_off_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with RunDisplay(as_json=True) as display:
        display.event("plan", to_plain(PLAN))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "why: " in printed.err


def test_event_that_cannot_be_read_is_an_error_with_a_hint() -> None:
    with RunDisplay(as_json=True) as display, pytest.raises(P2PTrainError, match="step event"):
        display.event("step", {"step": "one"})


def test_markup_in_a_name_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with RunDisplay(as_json=False) as display:
        display.event("note", {"text": "peer [red]x[/red] left"})
    assert capsys.readouterr().err == "p2ptrain: peer [red]x[/red] left\n"


def test_escape_sequences_of_another_device_do_not_reach_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with RunDisplay(as_json=False) as display:
        display.event("note", {"text": "\x1b[2Jgone\r"})
        display.event("plan", to_plain(replace(PLAN, reasons=("\x1b]0;x\x07",))))
    say_error(P2PTrainError("bad\x1b[2J\nline"))
    printed = capsys.readouterr()
    assert not any(c in printed.out + printed.err for c in "\x1b\r\x07")


def test_demo_shows_baselines_and_written_text(capsys: pytest.CaptureFixture[str]) -> None:
    with DemoDisplay(as_json=False) as display:
        display.baselines(Baselines(unigram=3.3, bigram=2.6), RESULT)
        display.written("one [b]\ntwo")
    printed = capsys.readouterr().out
    assert all(figure in printed for figure in ("5.5000", "3.3000", "2.6000", "2.0000"))
    assert "    one [b]\n    two\n" in printed


RUN = RunStatusReport(
    run=RunId("r" * 26), lineage=0, view=3,
    members=("attic: stage 1 of 2, feeds the data", "pi: stage 2 of 2"),
    step=41, steps=100, safety="protected: any one device may vanish (replicas of step 40)",
    waits_for=None, replica_step=40, replica_every=10, log_steps=1, log_bytes=3 << 20,
    log_bytes_max=256 << 20, replica_bytes=1 << 20, data_holders=("attic", "pi"),
)  # fmt: skip


def test_run_says_where_it_stands_and_what_it_waits_for() -> None:
    lines = run_lines(RUN)
    assert lines[0] == "run rrrrrrrr, view 3: step 41 of 100"
    assert "  pi: stage 2 of 2" in lines
    assert "  protected: any one device may vanish (replicas of step 40)" in lines
    assert lines[-1] == (
        "  whole replica set: step 40, one every 10 steps; logs here: 1 steps, "
        "3.0 MiB of 256.0 MiB; replicas kept here: 1.0 MiB"
    )
    paused = replace(RUN, lineage=1, replica_step=None, waits_for="paused: no quorum (1 of 3)")
    assert run_lines(paused)[0] == "run rrrrrrrr, view 3, lineage 1: step 41 of 100"
    assert "none yet" in "".join(run_lines(paused))
    assert run_lines(paused)[-1] == "  paused: no quorum (1 of 3)"


PREDICTION = PredictionReport(
    predicted_step_s=0.25, measured_step_s=0.3, predicted_boundary_bytes=3 << 20,
    measured_boundary_bytes=1.01 * (3 << 20), timed_steps=12,
)  # fmt: skip


def test_predicted_stands_beside_measured() -> None:
    table = result_table(replace(RESULT, prediction=PREDICTION))
    rows = {
        str(a): str(b) for a, b in zip(*(column.cells for column in table.columns), strict=True)
    }
    assert rows["a step, predicted and measured"] == "250.0 ms, 300.0 ms (+20 %)"
    assert rows["  between stages"] == "3.0 MiB, 3.0 MiB (+1 %)"
    lines = run_lines(replace(RUN, prediction=PREDICTION))
    assert "  a step, predicted and measured: 250.0 ms, 300.0 ms (+20 %)" in lines


def test_predicted_joules_stand_beside_those_that_were_spent() -> None:
    joules = replace(PREDICTION, predicted_step_joules=2.0, measured_step_joules=2.5)
    lines = run_lines(replace(RUN, prediction=joules))
    assert "    joules of all peers: 2 J, 2.5 J (+25 %)" in lines
    energy = replace(RESULT.energy, joules_per_sample=0.5, predicted_joules_per_sample=0.4)
    assert energy_lines(energy) == ["a sample, predicted and spent: 400 mJ, 500 mJ (+25 %)"]
    assert energy_lines(RESULT.energy) == []


def test_what_was_not_measured_is_not_compared() -> None:
    unknown = replace(PREDICTION, measured_step_s=None, measured_boundary_bytes=None)
    assert run_lines(replace(RUN, prediction=unknown)) == run_lines(RUN)
