"""What an acceptor must remember across a crash, and its form on disk.

The driver fsyncs these records before the message that depends on them is sent. After a restart
all of them go to `Agreement.restore`, oldest first. One record is one line of JSON.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

from p2ptrain.errors import CheckpointError, RemoteProtocolError
from p2ptrain.ids import DeviceId, Digest, Lineage, RunId, ViewNumber
from p2ptrain.planner.plan import Plan
from p2ptrain.training.contract import Contract
from p2ptrain.wire.codec import from_plain, to_plain

JOURNAL_VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptedRecord:
    """This member accepted this plan for its view, and no other ever."""

    plan: Plan
    contract: Contract
    proposer: DeviceId


@dataclass(frozen=True, slots=True, kw_only=True)
class DecidedRecord:
    """The accepted plan of this view is decided."""

    run: RunId
    lineage: Lineage
    view: ViewNumber
    plan: Digest


JournalRecord = AcceptedRecord | DecidedRecord
_KINDS: Final[dict[str, type[AcceptedRecord] | type[DecidedRecord]]] = {
    "accepted": AcceptedRecord,
    "decided": DecidedRecord,
}


def encode_record(record: JournalRecord) -> bytes:
    """One journal line, with its newline."""
    kind = "accepted" if isinstance(record, AcceptedRecord) else "decided"
    document = {"version": JOURNAL_VERSION, "kind": kind, "record": to_plain(record)}
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def decode_record(line: bytes) -> JournalRecord:
    """The inverse of `encode_record`.

    Raises:
        CheckpointError: damaged or of another version. A damaged *last* line is a write that a
            crash cut short: nothing was sent on its account, so the caller may drop that one.
    """
    try:
        document = json.loads(line)
        if document["version"] != JOURNAL_VERSION:
            raise CheckpointError(f"agreement journal version {document['version']} is unknown")
        return from_plain(_KINDS[document["kind"]], document["record"])
    except (ValueError, KeyError, TypeError, RemoteProtocolError) as error:
        raise CheckpointError(f"the agreement journal is damaged: {error}") from error
