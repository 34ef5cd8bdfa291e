"""Bring a device back with the root's key, rotate the root, or leave a group for good."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from cryptography import x509

from p2ptrain.errors import NotFound, TrustError
from p2ptrain.store.atomic import sync_directory
from p2ptrain.store.groups import (
    Group,
    NewMember,
    first_member,
    load_group,
    store_member,
)
from p2ptrain.store.home import Home, lock_group
from p2ptrain.store.trust_log import (
    REVOKED_FILE,
    ROSTER_FILE,
    read_revoked,
    read_roots,
    read_roster,
)
from p2ptrain.trust import certificates as certs
from p2ptrain.trust.chains import member_chain
from p2ptrain.trust.recovery import Recovery, check_newest, open_recovery, seal_recovery
from p2ptrain.trust.rotation import OldRoot, Roots, Rotation, rotate

_CARRIED_OVER: Final = (REVOKED_FILE, ROSTER_FILE, "addresses.json", "recovery.pem")


def recover(home: Home, name: str, content: bytes, passphrase: str, device_name: str) -> Group:
    """Make this device a member with fresh keys that the root itself certifies.

    What it was before in this group, if anything, is replaced: a revoked key never comes back.

    Raises:
        TrustError: the file does not open, or is not of this group's newest root.
        PeerAlreadyRunning: stop the peer first.
    """
    former = _find(home, name)
    known = None if former is None else former.root
    recovery = open_recovery(content, passphrase, known=known)
    if former is not None and former.id != recovery.group:
        raise TrustError(f"the recovery file is of another group than {name!r}")
    former = former or _find(home, recovery.group)
    roots = recovery.roots if former is None else _newest(former, recovery)
    check_newest(recovery, roots)
    made = certs.NewGroup(id=recovery.group, root_key=recovery.key, root=roots.current)
    fresh = first_member(made, device_name, now=time.time())
    member = replace(fresh, root=recovery.first, rotations=roots.rotations)
    if former is None:
        return store_member(home, name, member)
    with lock_group(home, former.id):
        return _replace(home, former, member)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRoot:
    """A rotation that is signed, and the recovery file of the root that it names."""

    rotation: Rotation
    recovery: bytes
    moved: tuple[str, ...]
    """Names of the members whose issuers hang directly below the new root."""


def sign_rotation(group: Group, content: bytes, passphrase: str, new_passphrase: str) -> NewRoot:
    """Let the old root name a new one; nothing is stored or sent yet.

    Raises:
        TrustError: the recovery file does not open, or is not of this group's newest root.
        ConfigError: the new passphrase is too short.
    """
    recovery = open_recovery(content, passphrase, known=group.root)
    if recovery.group != group.id:
        raise TrustError(f"the recovery file is of another group than {group.name!r}")
    roots = _newest(group, recovery)
    check_newest(recovery, roots)
    number = len(roots.rotations) + 1
    new = certs.create_group(f"{group.name[:24]} root {number + 1}", now=time.time())
    issuers = _directly_below(group, roots)
    rotation = rotate(
        OldRoot(key=recovery.key, certificate=roots.current),
        new,
        gid=group.id,
        number=number,
        issuers=issuers,
        now=time.time(),
    )
    sealed = seal_recovery(
        new.root_key,
        new_passphrase,
        first=group.root,
        rotations=(*roots.rotations, rotation),
    )
    names = tuple(certs.common_name(each).partition(" issuer ")[0] for each in issuers)
    return NewRoot(rotation=rotation, recovery=sealed, moved=names)


def forget(home: Home, group: Group) -> None:
    """Remove this device's membership: keys, certificates, everything about the group.

    Raises:
        PeerAlreadyRunning: stop the peer first.
    """
    with lock_group(home, group.id):
        gone = home.groups / f".gone-{secrets.token_hex(8)}"
        os.rename(group.folder, gone)
        sync_directory(home.groups)
        shutil.rmtree(gone)


def _find(home: Home, name: str) -> Group | None:
    try:
        return load_group(home, name)
    except NotFound:
        return None


def _newest(group: Group, recovery: Recovery) -> Roots:
    """The roots by what this device and the recovery file know together."""
    roots = read_roots(group.folder, group.root, group.id)
    for rotation in recovery.roots.rotations:
        roots.add(rotation)
    return roots


def _directly_below(group: Group, roots: Roots) -> list[x509.Certificate]:
    """The topmost issuers that members who are not refused stand on."""
    revoked = read_revoked(group.folder, roots, group.id)
    roster = read_roster(group.folder, roots, group.id)
    roster.add(member_chain(group.chain, gid=group.id, roots=roots.ever))
    tops = {
        chain.issuers[-1]: None
        for chain in roster.chains
        if chain.root == roots.current and revoked.against(chain.keys) is None
    }
    return list(tops)


def _replace(home: Home, former: Group, member: NewMember) -> Group:
    """Put a new membership where the old one was; a crash leaves one of them to be found."""
    with _aside(home, former.folder) as old:
        group = store_member(home, former.name, member)
        for name in _CARRIED_OVER:
            with contextlib.suppress(FileNotFoundError):
                shutil.copy2(old / name, group.folder / name)
        sync_directory(group.folder)
    return load_group(home, group.id)


@contextlib.contextmanager
def _aside(home: Home, folder: Path) -> Iterator[Path]:
    """Move a folder away for the block; it comes back when the block fails, else it is gone."""
    old = home.groups / f".old-{folder.name}-{secrets.token_hex(4)}"
    os.rename(folder, old)
    try:
        yield old
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(old, folder)
        raise
    shutil.rmtree(old)
