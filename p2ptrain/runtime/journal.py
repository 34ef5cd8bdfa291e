"""The agreement journal on disk: what this peer accepted, fsynced before it says so."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import trio

from p2ptrain.agreement.journal import JournalRecord, decode_record, encode_record
from p2ptrain.errors import CheckpointError

KEPT_RECORDS = 256
"""On opening, older records are dropped: their runs' views are long over."""


class Journal:
    """Appends records; reads them back after a restart."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> list[JournalRecord]:
        """All records, oldest first; a last line that a crash cut short is dropped.

        Raises:
            CheckpointError: a line before the last is damaged.
        """
        if not self._path.exists():
            return []
        lines = self._path.read_bytes().split(b"\n")
        records: list[JournalRecord] = []
        for index, line in enumerate(lines):
            if not line:
                continue
            try:
                records.append(decode_record(line))
            except CheckpointError:
                if index < len(lines) - 1:
                    raise
        return records[-KEPT_RECORDS:]

    async def append(self, records: Sequence[object]) -> None:
        """Make records durable; a cancellation leaves them written or not, never half read."""
        content = b"".join(encode_record(cast(JournalRecord, record)) for record in records)
        await trio.to_thread.run_sync(self._append, content)

    def _append(self, content: bytes) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(descriptor, content)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
