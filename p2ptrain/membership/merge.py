"""Which of two records of one device wins: a total order, so that everybody ends with the same."""

from __future__ import annotations

import functools
import json
import zlib

from p2ptrain import limits
from p2ptrain.ids import is_base32
from p2ptrain.membership.record import MemberRecord
from p2ptrain.wire.codec import to_plain

DEVICE_ID_CHARACTERS = 26


@functools.lru_cache(maxsize=limits.MEMBERS_KNOWN_MAX)
def _document(record: MemberRecord) -> str:
    return json.dumps(to_plain(record), sort_keys=True, separators=(",", ":"))


def content_of(record: MemberRecord) -> int:
    """A CRC-32 that tells two records of one rank apart; equal on every machine."""
    return zlib.crc32(_document(record).encode())


def is_newer(candidate: MemberRecord, held: MemberRecord | None) -> bool:
    """Whether `candidate` replaces `held`: higher (incarnation, version), then content.

    Content decides only between two lives of a device that began in the same second.
    """
    if held is None:
        return True
    if candidate.rank != held.rank:
        return candidate.rank > held.rank
    same = candidate is held or candidate == held
    return not same and _document(candidate) > _document(held)


def problem_of(record: MemberRecord) -> str | None:
    """Why a record from another peer cannot be kept, or None."""
    if not is_base32(record.device, DEVICE_ID_CHARACTERS):
        return "the device id of a record is malformed"
    if not 0 <= record.incarnation <= limits.INCARNATION_MAX or record.version < 0:
        return "the incarnation or version of a record is out of range"
    if record.refutations > limits.INCARNATION_MAX:
        return "nobody may use up the refutations"
    if len(_document(record).encode()) > limits.RECORD_BYTES_MAX:
        return f"a record is larger than {limits.RECORD_BYTES_MAX} bytes"
    return None
