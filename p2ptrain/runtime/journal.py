"""Journals on disk: what this peer accepted or recorded, fsynced before it says so."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import trio

from p2ptrain import limits
from p2ptrain.agreement.journal import (
    AcceptedRecord,
    JournalRecord,
    decode_record,
    encode_record,
)
from p2ptrain.agreement.run_journal import (
    RunJournalRecord,
    StepsRecord,
    decode_run_record,
    encode_run_record,
)
from p2ptrain.errors import CheckpointError
from p2ptrain.runtime.config import StepSetting
from p2ptrain.store.atomic import write_atomic
from p2ptrain.store.disk_speed import fsync_s
from p2ptrain.units import NS_PER_S

KEPT_RECORDS = 256
"""On opening, older records are dropped: their runs' views are long over."""


class Journal:
    """Appends records; reads them back after a restart."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> list[JournalRecord]:
        """The newest records, oldest first; a last line that a crash cut short is dropped.

        What is dropped leaves the file too: a cut line would spoil the next record.

        Raises:
            CheckpointError: a whole line is damaged, or the file cannot be read.
        """
        lines, was_cut = _whole_lines(self._path)
        records = [decode_record(line) for line in lines]
        kept = _newest(records)
        if was_cut or len(kept) < len(records):
            write_atomic(self._path, [encode_record(record) for record in kept], 0o600)
        return kept

    async def append(self, records: Sequence[object]) -> None:
        """Make records durable; a cancellation leaves them written or not, never half read."""
        content = b"".join(encode_record(cast(JournalRecord, record)) for record in records)
        await trio.to_thread.run_sync(_append_durably, self._path, content)


def steps_in_memory(setting: StepSetting, folder: Path) -> bool:
    """Whether records of steps stay in memory: as set, or because this disk is slow. Blocking."""
    if setting != "auto":
        return setting == "memory"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return fsync_s(folder) > limits.FSYNC_SLOW_S
    except OSError:
        return False


def record_ns(folder: Path) -> int:
    """What it takes to make the record of a step durable; 0 where the disk refuses. Blocking."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return round(fsync_s(folder) * NS_PER_S)
    except OSError:
        return 0


class RunJournal:
    """The journal of one run's machine; replaced by what the machine remembers when it is long.

    Args:
        path: Of the file.
        snapshot: What the machine remembers.
        volatile: Records of steps are not written: the machine must be told the same.
    """

    def __init__(
        self,
        path: Path,
        snapshot: Callable[[], Sequence[RunJournalRecord]],
        *,
        volatile: bool = False,
    ) -> None:
        self._path, self._snapshot, self._volatile = path, snapshot, volatile
        self._bytes = 0

    def read(self) -> list[RunJournalRecord]:
        """All records, oldest first; a last line that a crash cut short is dropped.

        Raises:
            CheckpointError: a whole line is damaged, or the file cannot be read.
        """
        lines, was_cut = _whole_lines(self._path)
        records = [decode_run_record(line) for line in lines]
        if was_cut:
            write_atomic(self._path, [encode_run_record(record) for record in records], 0o600)
        self._bytes = sum(map(len, lines))
        return records

    async def append(self, records: Sequence[object]) -> None:
        """Make records durable; a cancellation leaves them written or not, never half read.

        Raises:
            CheckpointError: the disk refuses; this peer must not answer for what it cannot keep.
        """
        content = self._encoded(cast(Sequence[RunJournalRecord], records))
        if not content:
            await trio.lowlevel.checkpoint()
            return
        self._bytes += sum(map(len, content))
        is_long = self._bytes > limits.RUN_JOURNAL_BYTES_MAX
        if is_long:
            content = self._encoded(self._snapshot())
            self._bytes = sum(map(len, content))
        try:
            await trio.to_thread.run_sync(self._write, content, is_long)
        except OSError as error:
            raise CheckpointError(
                f"the run's journal cannot be written: {error.strerror or error}",
                hint="make room on the disk, then join the run again",
            ) from error

    def _encoded(self, records: Sequence[RunJournalRecord]) -> list[bytes]:
        kept = (r for r in records if not (self._volatile and isinstance(r, StepsRecord)))
        return [encode_run_record(record) for record in kept]

    def _write(self, content: list[bytes], replace: bool) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if replace:
            write_atomic(self._path, content, 0o600)
        else:
            _append_durably(self._path, b"".join(content))


def _whole_lines(path: Path) -> tuple[list[bytes], bool]:
    """A journal's lines, and whether a crash had cut the last one short."""
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from error
    whole, _, cut = content.rpartition(b"\n")
    return [line for line in whole.split(b"\n") if line], bool(cut)


def _append_durably(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        left = memoryview(content)
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _newest(records: Sequence[JournalRecord]) -> list[JournalRecord]:
    """The last records; a decision whose acceptance is dropped goes with it."""
    dropped = {
        record.plan.digest
        for record in records[:-KEPT_RECORDS]
        if isinstance(record, AcceptedRecord)
    }
    return [
        record
        for record in records[-KEPT_RECORDS:]
        if isinstance(record, AcceptedRecord) or record.plan not in dropped
    ]
