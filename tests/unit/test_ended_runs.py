"""Which ends of runs are remembered, and who is told."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from p2ptrain import limits
from p2ptrain.agreement.run_memory import Memory
from p2ptrain.agreement.run_messages import ViewHead
from p2ptrain.errors import CheckpointError
from p2ptrain.ids import Digest, Lineage, RunId, ViewNumber
from p2ptrain.runtime.runs.ended_runs import EndedRuns
from p2ptrain.store.runs import RunDirectory, RunRecord
from p2ptrain.training.messages import Ended
from tests.sim.plans import make_contract

RUN = RunId("r" * 26)


def ended(lineage: int = 1, run: RunId = RUN) -> Ended:
    return Ended(run=run, lineage=Lineage(lineage), outcome="complete")


def head(lineage: int, run: RunId = RUN) -> ViewHead:
    return ViewHead(
        run=run, lineage=Lineage(lineage), view=ViewNumber(1), plan=Digest("0" * 64),
        newest_step=0, memory=Memory(journal=1, start=1, count=0), votes=True,
    )  # fmt: skip


@pytest.mark.parametrize(("asked", "told"), [(0, True), (1, True), (2, False)])
def test_only_who_is_not_ahead_is_told(asked: int, told: bool) -> None:
    runs = EndedRuns()
    runs.note(ended(1))
    assert (runs.answer_to(head(asked)) == ended(1)) is told
    assert runs.answer_to(head(asked, RunId("s" * 26))) is None


def test_newest_lineage_counts_whenever_it_was_noted() -> None:
    runs = EndedRuns()
    runs.note(ended(3))
    runs.note(ended(2))
    assert runs.answer_to(head(3)) == ended(3)


def test_run_that_is_offered_again_has_not_ended() -> None:
    runs = EndedRuns()
    runs.note(ended())
    runs.goes_on(RUN)
    assert runs.answer_to(head(0)) is None


def test_oldest_ends_are_forgotten() -> None:
    runs = EndedRuns()
    names = [RunId(f"{index:026d}") for index in range(limits.ENDED_RUNS_MAX + 1)]
    for name in names:
        runs.note(ended(run=name))
    told = [name for name in names if runs.answer_to(head(1, name)) is not None]
    assert told == names[1:]


def record(run: RunId) -> RunRecord:
    return RunRecord(
        run=run, lineage=Lineage(1), view=ViewNumber(1), bundle_name="tiny",
        contract=make_contract(), data="d", heldout=None, checkpoint_every=0,
    )  # fmt: skip


def test_end_is_read_back_until_the_run_is_written_down_anew(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / RUN)
    assert directory.read_ended() is None
    directory.write_record(record(RUN))
    directory.write_ended(ended())
    assert directory.read_ended() == ended()
    runs = EndedRuns()
    runs.load(tmp_path)
    assert runs.answer_to(head(1)) == ended()
    directory.write_record(record(RUN))
    assert directory.read_ended() is None


def test_end_of_another_run_or_a_damaged_one_is_none(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / RUN)
    directory.write_record(record(RUN))
    directory.write_ended(dataclasses.replace(ended(), run=RunId("s" * 26)))
    assert directory.read_ended() is None
    (directory.path / "ended.json").write_text("{")
    assert directory.read_ended() is None


def test_end_that_the_disk_refuses_says_so(tmp_path: Path) -> None:
    (tmp_path / RUN).write_text("a file where a directory should be")
    with pytest.raises(CheckpointError, match="the run's end cannot be stored"):
        RunDirectory(tmp_path / RUN).write_ended(ended())
