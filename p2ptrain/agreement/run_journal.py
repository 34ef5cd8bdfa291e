"""What a member of a run must remember across a crash, and its form on disk.

The driver fsyncs these records before the message that depends on them is sent. After a restart
all of them go to `RunMachine.restore`, oldest first. One record is one line of JSON. A journal
may at any time be replaced by `RunMachine.snapshot()`; records told twice change nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

from p2ptrain.agreement.ballot import Ballot
from p2ptrain.agreement.run_memory import PastStart
from p2ptrain.agreement.view import View
from p2ptrain.errors import CheckpointError, RemoteProtocolError
from p2ptrain.ids import Lineage, ViewNumber
from p2ptrain.training.step_record import StepRecord
from p2ptrain.wire.codec import from_plain, to_plain

RUN_JOURNAL_VERSION: Final = 2
READABLE_VERSIONS: Final = (1, 2)
"""Version 1 did not tell one start of a process from another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentityRecord:
    """Names this journal, so that a view can say whose votes count in it, and tells its past."""

    journal: int
    start: int = 0
    """The process start that wrote it; 0: not told."""
    count: int = 0
    """Records up to here since the journal was named, whether they are still there or not."""
    past: tuple[PastStart, ...] = ()
    """Process starts before that one."""
    volatile: bool = False
    """Its steps are only in memory: after this process nothing may be voted from it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartRecord:
    """A process began with what the journal had; the rest is this start's."""

    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewRecord:
    """This view is decided."""

    view: View
    abstains: bool
    """This peer has no vote in it, since it may have voted in a life it does not remember."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromiseRecord:
    """This peer promised a ballot for the view after this one."""

    lineage: Lineage
    view: ViewNumber
    ballot: Ballot


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptanceRecord:
    """This peer accepted a value for the view after the present one."""

    ballot: Ballot
    value: View


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsRecord:
    """This peer holds the records of these steps, recorded under this view or before it."""

    lineage: Lineage
    view: ViewNumber
    records: tuple[StepRecord, ...]


RunJournalRecord = (
    IdentityRecord | StartRecord | ViewRecord | PromiseRecord | AcceptanceRecord | StepsRecord
)
_KINDS: Final[dict[str, type[RunJournalRecord]]] = {
    "identity": IdentityRecord,
    "start": StartRecord,
    "view": ViewRecord,
    "promise": PromiseRecord,
    "acceptance": AcceptanceRecord,
    "steps": StepsRecord,
}
_NAMES: Final = {cls: name for name, cls in _KINDS.items()}


def encode_run_record(record: RunJournalRecord) -> bytes:
    """One journal line, with its newline."""
    kind = _NAMES[type(record)]
    document = {"version": RUN_JOURNAL_VERSION, "kind": kind, "record": to_plain(record)}
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def decode_run_record(line: bytes) -> RunJournalRecord:
    """The inverse of `encode_run_record`.

    Raises:
        CheckpointError: damaged or of another version. A damaged *last* line is a write that a
            crash cut short: nothing was sent on its account, so the caller may drop that one.
    """
    try:
        document = json.loads(line)
        if document["version"] not in READABLE_VERSIONS:
            raise CheckpointError(f"run journal version {document['version']} is unknown")
        return from_plain(_KINDS[document["kind"]], document["record"])
    except (ValueError, KeyError, TypeError, RemoteProtocolError) as error:
        raise CheckpointError(f"the run's journal is damaged: {error}") from error
