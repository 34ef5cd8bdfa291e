"""The agreement journal on disk: what this peer accepted, fsynced before it says so."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import trio

from p2ptrain.agreement.journal import (
    AcceptedRecord,
    JournalRecord,
    decode_record,
    encode_record,
)
from p2ptrain.errors import CheckpointError
from p2ptrain.store.atomic import write_atomic

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
        try:
            content = self._path.read_bytes() if self._path.exists() else b""
        except OSError as error:
            raise CheckpointError(f"{self._path.name} cannot be read: {error.strerror}") from error
        whole, _, cut = content.rpartition(b"\n")
        records = [decode_record(line) for line in whole.split(b"\n") if line]
        kept = _newest(records)
        if cut or len(kept) < len(records):
            write_atomic(self._path, [encode_record(record) for record in kept], 0o600)
        return kept

    async def append(self, records: Sequence[object]) -> None:
        """Make records durable; a cancellation leaves them written or not, never half read."""
        content = b"".join(encode_record(cast(JournalRecord, record)) for record in records)
        await trio.to_thread.run_sync(self._append, content)

    def _append(self, content: bytes) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
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
