"""The agreement journal: what a crash or a full file may leave, and what restore can take."""

from __future__ import annotations

import random
import stat
from pathlib import Path

import pytest

from p2ptrain.agreement.journal import AcceptedRecord, DecidedRecord, JournalRecord, encode_record
from p2ptrain.agreement.machine import Agreement
from p2ptrain.errors import CheckpointError
from p2ptrain.runtime import journal as journals
from p2ptrain.runtime.journal import Journal
from tests.sim.plans import device, make_contract, make_plan


def accepted(view: int) -> AcceptedRecord:
    plan = make_plan(device(0), device(1), view=view)
    return AcceptedRecord(plan=plan, contract=make_contract(), proposer=device(0))


def decided(view: int) -> DecidedRecord:
    plan = accepted(view).plan
    return DecidedRecord(run=plan.run, lineage=plan.lineage, view=plan.view, plan=plan.digest)


def write(path: Path, records: list[JournalRecord], tail: bytes = b"") -> None:
    path.write_bytes(b"".join(encode_record(record) for record in records) + tail)


async def test_records_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "agreement.jsonl"
    journal = Journal(path)
    assert journal.read() == []
    await journal.append([accepted(1)])
    await journal.append([decided(1), accepted(2)])
    assert Journal(path).read() == [accepted(1), decided(1), accepted(2)]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("kept", [1, 10, -1])
async def test_cut_last_line_is_dropped_and_does_not_spoil_the_next(
    tmp_path: Path, kept: int
) -> None:
    path = tmp_path / "agreement.jsonl"
    write(path, [accepted(1)], tail=encode_record(accepted(2))[:-1][:kept])
    journal = Journal(path)
    assert journal.read() == [accepted(1)]
    await journal.append([accepted(3)])
    assert Journal(path).read() == [accepted(1), accepted(3)]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_damaged_line_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "agreement.jsonl"
    line = encode_record(accepted(1))
    path.write_bytes(line[:20] + b"\n" + encode_record(accepted(2)))
    with pytest.raises(CheckpointError, match="damaged"):
        Journal(path).read()
    path.write_bytes(encode_record(accepted(2)) + line[:20] + b"\n")
    with pytest.raises(CheckpointError, match="damaged"):
        Journal(path).read()


def test_unknown_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "agreement.jsonl"
    path.write_bytes(encode_record(accepted(1)).replace(b'"version":1}', b'"version":9}'))
    with pytest.raises(CheckpointError, match="version 9"):
        Journal(path).read()


def test_unreadable_journal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        Journal(tmp_path).read()


@pytest.mark.parametrize("odd", [0, 1])
def test_old_records_go_but_never_an_acceptance_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, odd: int
) -> None:
    monkeypatch.setattr(journals, "KEPT_RECORDS", 4)
    path = tmp_path / "agreement.jsonl"
    records: list[JournalRecord] = []
    for view in range(1, 6):
        records += [accepted(view), decided(view)]
    write(path, records + [accepted(6)] * odd)
    kept = Journal(path).read()
    assert kept[-1] == (accepted(6) if odd else decided(5))
    assert decided(4) not in kept or accepted(4) in kept
    machine = Agreement(device=device(1), rng=random.Random(0))
    machine.restore(kept, now=0.0)
    assert Journal(path).read() == kept


def test_decision_that_was_never_accepted_is_left_for_restore_to_refuse(tmp_path: Path) -> None:
    path = tmp_path / "agreement.jsonl"
    write(path, [decided(1)])
    machine = Agreement(device=device(1), rng=random.Random(0))
    with pytest.raises(CheckpointError, match="never accepted"):
        machine.restore(Journal(path).read(), now=0.0)
