"""How long a disk takes, and what follows from it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from p2ptrain import limits
from p2ptrain.runtime import journal
from p2ptrain.runtime.journal import record_ns, steps_in_memory
from p2ptrain.store.disk_speed import TRIALS, fsync_s


def test_speed_is_measured_by_syncs_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    assert 0.0 < fsync_s(tmp_path) < 10.0
    assert len(synced) == TRIALS
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "fsync", "in_memory"),
    [
        ("disk", 9.0, False),
        ("memory", 0.0, True),
        ("auto", limits.FSYNC_SLOW_S / 2, False),
        ("auto", limits.FSYNC_SLOW_S * 2, True),
    ],
)
def test_where_records_are_kept(
    setting: str, fsync: float, in_memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "fsync_s", lambda folder: fsync)
    assert steps_in_memory(setting, tmp_path / "runs") is in_memory  # type: ignore[arg-type]


def test_time_of_a_record_is_known_where_the_disk_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "fsync_s", lambda folder: 0.0015)
    assert record_ns(tmp_path / "runs") == 1_500_000
    (tmp_path / "file").write_bytes(b"")
    assert record_ns(tmp_path / "file") == 0, "no folder"


def test_disk_that_refuses_is_not_called_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(folder: Path) -> float:
        raise OSError("no room")

    monkeypatch.setattr(journal, "fsync_s", refuses)
    assert not steps_in_memory("auto", tmp_path)
