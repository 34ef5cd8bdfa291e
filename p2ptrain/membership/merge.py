"""Which of two records of one device wins: a total order, so that everybody ends with the same."""

from __future__ import annotations

import json

from p2ptrain import limits
from p2ptrain.ids import is_base32
from p2ptrain.membership.record import MemberRecord
from p2ptrain.wire.codec import to_plain

DEVICE_ID_CHARACTERS = 26


def _document(record: MemberRecord) -> str:
    return json.dumps(to_plain(record), sort_keys=True, separators=(",", ":"))


def is_newer(candidate: MemberRecord, held: MemberRecord | None) -> bool:
    """Whether `candidate` replaces `held`: higher (incarnation, version), then content.

    Content decides only between two lives of a device that began in the same second.
    """
    if held is None:
        return True
    ours = (held.incarnation, held.version)
    theirs = (candidate.incarnation, candidate.version)
    if theirs != ours:
        return theirs > ours
    return candidate != held and _document(candidate) > _document(held)


def problem_of(record: MemberRecord) -> str | None:
    """Why a record from another peer cannot be kept, or None."""
    if not is_base32(record.device, DEVICE_ID_CHARACTERS):
        return "the device id of a record is malformed"
    if not 0 <= record.incarnation <= limits.INCARNATION_MAX or record.version < 0:
        return "the incarnation or version of a record is out of range"
    if len(_document(record).encode()) > limits.RECORD_BYTES_MAX:
        return f"a record is larger than {limits.RECORD_BYTES_MAX} bytes"
    return None
