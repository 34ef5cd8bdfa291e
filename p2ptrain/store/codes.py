"""The one open code of a group on this device: at most one, ten minutes, three tries, one use.

`code.json` (0600) in the group's folder. Every change is durable before it is acted on, so a
crash gives nobody another guess.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import replace
from pathlib import Path
from typing import Final

from p2ptrain import limits
from p2ptrain.errors import ConfigError, TrustError
from p2ptrain.store.atomic import sync_directory, write_atomic
from p2ptrain.store.groups import Group, load_issuer
from p2ptrain.store.home import KEY_MODE, read_bounded
from p2ptrain.trust.code import (
    CODE_LIFE_S,
    CODE_TRIES,
    PendingCode,
    code_password,
    make_code,
    read_pending_code,
    write_pending_code,
)

CODE_FILE: Final = "code.json"


def create_code(group: Group, *, admits: bool = True) -> str:
    """Open a code for one new device, and close the one that was open before.

    Args:
        admits: Whether the new member may admit others in turn.

    Raises:
        TrustError: this member may not admit others.
    """
    load_issuer(group)
    code = make_code(secrets.token_bytes(16))
    pending = PendingCode(
        password=code_password(code).hex(),
        expires_at_s=time.time() + CODE_LIFE_S,
        tries_left=CODE_TRIES,
        admits=admits,
    )
    write_atomic(_file(group), [write_pending_code(pending)], mode=KEY_MODE)
    return code


def open_code(group: Group) -> PendingCode | None:
    """The code that may be used now, or None; one that is too old or damaged is removed."""
    try:
        pending = read_pending_code(read_bounded(_file(group), limits.INVITE_BYTES_MAX))
    except FileNotFoundError:
        return None
    except (TrustError, ConfigError):
        _close(group)
        return None
    if not time.time() < pending.expires_at_s <= time.time() + CODE_LIFE_S:
        _close(group)
        return None
    return pending


def code_ends_s(group: Group) -> float | None:
    """When the open code ends, seconds since 1970; None while none is open."""
    pending = open_code(group)
    return None if pending is None else pending.expires_at_s


def claim_code(group: Group, pending: PendingCode) -> bool:
    """Use a code up; False when it is not the open one any more. Durable when it returns."""
    current = open_code(group)
    if current is None or current.password != pending.password:
        return False
    _close(group)
    return True


def spend_try(group: Group, pending: PendingCode) -> int:
    """Note a wrong guess; how many are left, durably. 0: the code is void."""
    current = open_code(group)
    if current is None or current.password != pending.password:
        return 0
    left = current.tries_left - 1
    if left == 0:
        _close(group)
    else:
        content = write_pending_code(replace(current, tries_left=left))
        write_atomic(_file(group), [content], mode=KEY_MODE)
    return left


def _close(group: Group) -> None:
    _file(group).unlink(missing_ok=True)
    sync_directory(group.folder)


def _file(group: Group) -> Path:
    return group.folder / CODE_FILE
