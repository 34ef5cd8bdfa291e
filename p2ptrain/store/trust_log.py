"""What a device knows about trust in its group, on disk: two logs that only grow, and a roster.

`revoked.jsonl` and `rotations.jsonl` (0600) take one statement a line, fsynced before it takes
effect. `roster.json` holds the newest certificates of every member; losing it loses nothing that
other members do not tell again.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cryptography import x509

from p2ptrain.errors import ConfigError, TrustError
from p2ptrain.ids import GroupId
from p2ptrain.store.atomic import sync_directory, write_atomic
from p2ptrain.store.home import KEY_MODE, read_bounded
from p2ptrain.trust.chains import read_chain
from p2ptrain.trust.revocation import (
    Revocation,
    RevokedKeys,
    check_revocation,
    decode_revocation,
    encode_revocation,
)
from p2ptrain.trust.roster import Roster
from p2ptrain.trust.rotation import Roots, Rotation, decode_rotation, encode_rotation

REVOKED_FILE: Final = "revoked.jsonl"
ROTATIONS_FILE: Final = "rotations.jsonl"
ROSTER_FILE: Final = "roster.json"
ROSTER_VERSION: Final = 1
_LOG_BYTES_MAX: Final = 256 * 1024 * 1024
_ROSTER_BYTES_MAX: Final = 32 * 1024 * 1024


def read_roots(folder: Path, first: x509.Certificate, gid: GroupId) -> Roots:
    """The group's roots so far; TrustError when the log is damaged."""
    lines = _whole_lines(folder / ROTATIONS_FILE)
    return Roots(first, map(decode_rotation, lines), gid=gid)


def read_revoked(folder: Path, roots: Roots, gid: GroupId) -> RevokedKeys:
    """The statements that are in effect; TrustError when the log is damaged.

    A damaged log stops the peer: without it a revoked device would be let in.
    """
    statements = [decode_revocation(line) for line in _whole_lines(folder / REVOKED_FILE)]
    for statement in statements:
        check_revocation(statement, gid=gid, roots=roots.ever)
    return RevokedKeys(statements)


def append_statements(folder: Path, statements: Sequence[Revocation | Rotation]) -> None:
    """Make statements durable; OSError when the disk does not take them."""
    for statement in statements:
        if isinstance(statement, Revocation):
            _append(folder / REVOKED_FILE, encode_revocation(statement))
        else:
            _append(folder / ROTATIONS_FILE, encode_rotation(statement))


def read_roster(folder: Path, roots: Roots, gid: GroupId) -> Roster:
    """The members that are known; what cannot be read is left out, and heard of again."""
    roster = Roster()
    try:
        found = json.loads(read_bounded(folder / ROSTER_FILE, _ROSTER_BYTES_MAX))
        shown = found["chains"] if found.get("version") == ROSTER_VERSION else []
    except (OSError, ValueError, KeyError, AttributeError, ConfigError):
        return roster
    for chain in shown if isinstance(shown, list) else []:
        with contextlib.suppress(TrustError, ValueError, TypeError):
            roster.add(read_chain([bytes.fromhex(der) for der in chain], gid=gid, roots=roots.ever))
    return roster


def save_roster(folder: Path, roster: Roster) -> None:
    """Remember the members' certificates."""
    chains = [[der.hex() for der in chain.to_der()] for chain in roster.chains]
    document = json.dumps({"version": ROSTER_VERSION, "chains": chains}, indent=0)
    write_atomic(folder / ROSTER_FILE, [document.encode()], mode=KEY_MODE)


def _whole_lines(path: Path) -> list[bytes]:
    """Lines of a log; a last one that a crash cut short never took effect and is cut off."""
    try:
        content = read_bounded(path, _LOG_BYTES_MAX)
    except FileNotFoundError:
        return []
    whole, newline, cut = content.rpartition(b"\n")
    if cut:
        write_atomic(path, [whole + newline], mode=KEY_MODE)
    return [line for line in whole.split(b"\n") if line]


def _append(path: Path, line: bytes) -> None:
    is_new = not path.exists()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, KEY_MODE)
    try:
        left = memoryview(line)
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if is_new:
        sync_directory(path.parent)
