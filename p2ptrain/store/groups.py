"""The groups of a home: keys, certificates, pending invites and remembered addresses.

`groups/<gid>/` holds name, group.crt, chain.pem (0644), device.key, issuer.key, issuer.crt,
addresses.json, invites/<id>.json, the files of store/trust_log.py and, until its owner takes it
away, recovery.pem.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from p2ptrain import limits
from p2ptrain.errors import ConfigError, NotFound, TrustError
from p2ptrain.ids import DeviceId, GroupId, is_base32
from p2ptrain.store.atomic import sync_directory, write_atomic
from p2ptrain.store.home import (
    DIRECTORY_MODE,
    KEY_MODE,
    Home,
    check_private,
    read_bounded,
    write_secret,
)
from p2ptrain.store.trust_log import (
    REVOKED_FILE,
    ROTATIONS_FILE,
    append_statements,
    read_revoked,
    read_roots,
    read_roster,
)
from p2ptrain.trust import certificates as certs
from p2ptrain.trust.chains import check_in_date, key_fingerprint, member_chain, root_of
from p2ptrain.trust.credentials import Credentials
from p2ptrain.trust.invite import (
    Invite,
    PendingInvite,
    read_pending,
    write_invite,
)
from p2ptrain.trust.recovery import seal_recovery
from p2ptrain.trust.revocation import Revocation
from p2ptrain.trust.rotation import Roots, Rotation

REMEMBERED_MAX: Final = 64
_FILE_BYTES_MAX: Final = 256 * 1024
_SECRET_FILES: Final = ("device.key", "issuer.key", REVOKED_FILE, ROTATIONS_FILE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One group as this device knows it."""

    id: GroupId
    name: str
    """Local alias."""
    device: DeviceId
    device_name: str
    folder: Path
    root: x509.Certificate
    """The one that the group began with: its id follows from it."""
    trusted: tuple[x509.Certificate, ...]
    """The roots that links trust now, the newest first; one, except while a root is rotated."""
    chain: tuple[x509.Certificate, ...]
    """Our leaf, then its issuers; without the root."""

    @property
    def credentials(self) -> Credentials:
        """What links of this group need."""
        return Credentials(
            group=self.id,
            device=self.device,
            root_pem=certs.to_pem(*self.trusted).decode(),
            chain_file=str(self.folder / "chain.pem"),
            key_file=str(self.folder / "device.key"),
        )

    @property
    def recovery_file(self) -> Path:
        """The sealed root key; only the founder has one, until it is taken to a safe place."""
        return self.folder / "recovery.pem"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewMember:
    """Keys and certificates of a device that becomes a member, before they are stored."""

    root: x509.Certificate
    """The one that the group began with."""
    device_key: Ed25519PrivateKey
    device_name: str
    issuer: certs.Issuer | None = None
    """Its right to admit others; it then signs its own leaf."""
    chain: tuple[x509.Certificate, ...] = ()
    """Without an issuer of its own: its leaf and the sponsor's issuers."""
    rotations: tuple[Rotation, ...] = ()
    revocations: tuple[Revocation, ...] = ()
    """Checked; in effect before the first link."""
    now_s: float | None = None
    """The time that a sponsor vouched for; None: this device's clock."""


def create_group(home: Home, name: str, passphrase: str, device_name: str) -> Group:
    """Found a group: this device is its first member.

    The root key is sealed under `passphrase` in `recovery_file`, for its owner to take to a safe
    place, and is nowhere else.

    Raises:
        ConfigError: a bad or taken name, or a short passphrase; nothing was made.
    """
    _check_names(name, device_name)
    if name in _aliases(home).values():
        raise ConfigError(f"there already is a group called {name!r}", hint="choose another name")
    now = time.time()
    made = certs.create_group(name, now=now)
    sealed = seal_recovery(made.root_key, passphrase, first=made.root)
    member = first_member(made, device_name, now=now)
    return store_member(home, name, member, recovery=sealed)


def first_member(made: certs.NewGroup, device_name: str, *, now: float) -> NewMember:
    """A member with fresh keys whose issuer the root itself signs."""
    device_key = Ed25519PrivateKey.generate()
    issuer = certs.issue_first_issuer(
        made,
        Ed25519PrivateKey.generate(),
        device=certs.device_id(device_key.public_key()),
        name=device_name,
        now=now,
    )
    return NewMember(root=made.root, issuer=issuer, device_key=device_key, device_name=device_name)


def store_member(
    home: Home, name: str, member: NewMember, *, recovery: bytes | None = None
) -> Group:
    """Write a new membership, whole or not at all; gives the loaded group.

    A name that another group of this home has gets the beginning of the id behind it.

    Raises:
        ConfigError: this device already is a member.
    """
    gid = certs.group_id(member.root)
    folder = home.groups / gid
    if folder.exists():
        raise ConfigError(f"this device already is a member of group {name!r}")
    alias = f"{name}-{gid[:4]}" if name in _aliases(home).values() else name
    fresh = home.groups / f".new-{secrets.token_hex(8)}"
    fresh.mkdir(mode=DIRECTORY_MODE)
    try:
        _write_member(fresh, alias, member)
        if recovery is not None:
            write_secret(fresh / "recovery.pem", recovery)
        os.rename(fresh, folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    sync_directory(home.groups)
    return load_group(home, gid)


def load_group(home: Home, name_or_gid: str) -> Group:
    """Load a group by alias or id, with our certificates brought up to date; see `refresh`.

    Raises:
        NotFound: lists the groups that this home has.
        TrustError: a file is damaged, readable by others, or does not belong to the rest.
    """
    gid = _find(home, name_or_gid)
    folder = home.groups / gid
    _check_modes(folder)
    try:
        group = _read_group(folder, gid)
        return refresh(group, now=time.time())
    except FileNotFoundError as error:
        raise TrustError(f"{error.filename} is missing", hint="join the group again") from error


def refresh(group: Group, *, now: float) -> Group:
    """Bring our certificates up to date with what is known and can be done here alone.

    They are led around revoked issuers that somebody kept us below, moved below the newest root,
    and the leaf is renewed when two thirds of its life are over. One that is out of date already
    is left alone: either this device was away or its clock is wrong, which others can tell.
    """
    roots = read_roots(group.folder, group.root, group.id)
    revoked = read_revoked(group.folder, roots, group.id)
    chain = roots.mended(revoked.mended(group.chain))
    if chain != group.chain:
        install_chain(group, chain)
    leaf = chain[0]
    if certs.needs_renewal(leaf, now=now) and now < leaf.not_valid_after_utc.timestamp():
        renew_leaf(group, now=now)
    trusted = _trusted(group.folder, roots, chain, group.id)
    if chain == group.chain and trusted == group.trusted and _chain(group.folder) == chain:
        return group
    return _read_group(group.folder, group.id)


def install_chain(group: Group, chain: Sequence[x509.Certificate]) -> None:
    """Replace the certificates that this device shows; keys stay as they are.

    Raises:
        TrustError: they are not for this device's keys; nothing was changed.
    """
    roots = read_roots(group.folder, group.root, group.id)
    read = member_chain(chain, gid=group.id, roots=roots.ever)
    if read.device != group.device:
        raise TrustError("what was certified is another device's key")
    issuer = find_issuer(group)
    if issuer is not None and read.may_admit:
        if key_fingerprint(chain[1]) != key_fingerprint(issuer.certificate):
            raise TrustError("what was certified is another issuer's key")
        write_atomic(group.folder / "issuer.crt", [certs.to_pem(*chain[1:])])
    write_atomic(group.folder / "chain.pem", [certs.to_pem(*chain)])


def install_issuer(group: Group, issuers: Sequence[x509.Certificate], *, now: float) -> None:
    """Take a fresh certificate of our issuer key, and sign a leaf below it.

    Raises:
        TrustError: it is for another key, or not valid at `now`; nothing was changed.
    """
    issuer = load_issuer(group)
    fresh = certs.Issuer(key=issuer.key, certificate=issuers[0], above=tuple(issuers[1:]))
    key = load_device_key(group)
    request = certs.request_certificate(key, name=group.device_name)
    leaf = certs.issue_leaf(fresh, request, gid=group.id, name=group.device_name, now=now)
    install_chain(group, (leaf, *issuers))


def load_device_key(group: Group) -> Ed25519PrivateKey:
    """The key that this device is known by."""
    return certs.key_from_pem(read_bounded(group.folder / "device.key", _FILE_BYTES_MAX))


def renew_leaf(group: Group, *, now: float) -> bool:
    """Sign a fresh leaf for ourselves; False when we may not, or our issuer is out of date."""
    issuer = find_issuer(group)
    if issuer is None:
        return False
    request = certs.request_certificate(load_device_key(group), name=group.device_name)
    try:
        check_in_date(issuer.chain, now=now)
    except TrustError:
        return False
    leaf = certs.issue_leaf(issuer, request, gid=group.id, name=group.device_name, now=now)
    write_atomic(group.folder / "chain.pem", [certs.to_pem(leaf, *issuer.chain)])
    return True


def reload(group: Group) -> Group:
    """The group as it is on disk now."""
    return _read_group(group.folder, group.id)


def known_groups(home: Home) -> tuple[str, ...]:
    """Aliases of the groups of this home, sorted."""
    return tuple(sorted(_aliases(home).values()))


def load_issuer(group: Group) -> certs.Issuer:
    """Our right to admit others; TrustError when this member has none."""
    issuer = find_issuer(group)
    if issuer is None:
        raise TrustError(
            "this member may not admit others", hint="run the command on another member"
        )
    return issuer


def find_issuer(group: Group) -> certs.Issuer | None:
    """Our right to admit others, or None."""
    key_file = group.folder / "issuer.key"
    if not key_file.exists():
        return None
    key = certs.key_from_pem(read_bounded(key_file, _FILE_BYTES_MAX))
    own, *above = certs.certificates_from_pem(
        read_bounded(group.folder / "issuer.crt", _FILE_BYTES_MAX)
    )
    return certs.Issuer(key=key, certificate=own, above=tuple(above))


def create_invite(
    group: Group, addresses: Sequence[str], ttl_s: float, *, admits: bool = True
) -> bytes:
    """Make a single-use invite that this device sponsors; gives the invite file's content.

    Args:
        admits: Whether the new member may admit others in turn.

    Raises:
        TrustError: this member may not admit others.
        ConfigError: too many invites wait, or an address is not one.
    """
    load_issuer(group)
    try:
        invite = Invite(
            group_name=group.name,
            addresses=tuple(addresses),
            root_hash=certs.root_hash(group.root),
            secret=secrets.token_bytes(16).hex(),
            expires_at_s=time.time() + ttl_s,
        )
    except ValueError as error:
        raise ConfigError(f"cannot invite: {error}") from error
    folder = _invites(group)
    _drop_expired_invites(folder)
    if sum(1 for _ in folder.iterdir()) >= limits.INVITES_PENDING_MAX:
        raise ConfigError("too many unused invites wait", hint="wait until some expire")
    pending = PendingInvite(
        shared_key=invite.shared_key.hex(), expires_at_s=invite.expires_at_s, admits=admits
    )
    write_secret(folder / f"{invite.id}.json", write_invite(pending))
    return write_invite(invite)


def find_invite(group: Group, invite_id: str) -> PendingInvite | None:
    """A pending invite of this device, expired or not; None when it does not know it."""
    try:
        return read_pending(read_bounded(_invite_file(group, invite_id), limits.INVITE_BYTES_MAX))
    except FileNotFoundError:
        return None


def claim_invite(group: Group, invite_id: str) -> bool:
    """Use an invite up; False when somebody else was faster. Durable when it returns."""
    try:
        _invite_file(group, invite_id).unlink()
    except FileNotFoundError:
        return False
    sync_directory(_invites(group))
    return True


def load_addresses(group: Group) -> dict[str, str]:
    """Remembered addresses (host:port) and the device last met there; {} when unreadable."""
    try:
        found = json.loads(read_bounded(group.folder / "addresses.json", _FILE_BYTES_MAX))
    except (OSError, ValueError, ConfigError):
        return {}  # a hint only: discovery and --peer still work
    if not isinstance(found, dict) or not isinstance(found.get("addresses"), dict):
        return {}
    pairs = found["addresses"].items()
    return {str(address): str(device) for address, device in pairs}


def save_addresses(group: Group, addresses: dict[str, str]) -> None:
    """Remember where devices were met, at most REMEMBERED_MAX, the last ones given."""
    kept = dict(list(addresses.items())[-REMEMBERED_MAX:])
    document = json.dumps({"version": 1, "addresses": kept}, indent=1)
    write_atomic(group.folder / "addresses.json", [document.encode()], mode=KEY_MODE)


def _write_member(folder: Path, alias: str, member: NewMember) -> None:
    write_secret(folder / "device.key", certs.key_to_pem(member.device_key))
    if member.issuer is not None:
        write_secret(folder / "issuer.key", certs.key_to_pem(member.issuer.key))
        write_atomic(folder / "issuer.crt", [certs.to_pem(*member.issuer.chain)])
    write_atomic(folder / "group.crt", [certs.to_pem(member.root)])
    write_atomic(folder / "chain.pem", [certs.to_pem(*_first_chain(member))])
    write_atomic(folder / "name", [f"{alias}\n".encode()])
    append_statements(folder, (*member.rotations, *member.revocations))
    (folder / "invites").mkdir(mode=DIRECTORY_MODE)


def _first_chain(member: NewMember) -> tuple[x509.Certificate, ...]:
    if member.issuer is None:
        return member.chain
    now = time.time() if member.now_s is None else member.now_s
    request = certs.request_certificate(member.device_key, name=member.device_name)
    gid = certs.group_id(member.root)
    leaf = certs.issue_leaf(member.issuer, request, gid=gid, name=member.device_name, now=now)
    return (leaf, *member.issuer.chain)


def _read_group(folder: Path, gid: GroupId) -> Group:
    found = certs.certificates_from_pem(read_bounded(folder / "group.crt", _FILE_BYTES_MAX))
    chain = _chain(folder)
    key = certs.key_from_pem(read_bounded(folder / "device.key", _FILE_BYTES_MAX))
    device = certs.device_id(key.public_key())
    if len(found) != 1 or certs.group_id(found[0]) != gid:
        raise TrustError(f"{folder / 'group.crt'} is not the root of group {gid}")
    if certs.peer_identity(certs.to_der(chain[0]), gid=gid) != device:
        raise TrustError(f"{folder / 'chain.pem'} does not belong to {folder / 'device.key'}")
    roots = read_roots(folder, found[0], gid)
    return Group(
        id=gid,
        name=_alias(folder),
        device=device,
        device_name=certs.common_name(chain[0]),
        folder=folder,
        root=found[0],
        trusted=_trusted(folder, roots, chain, gid),
        chain=chain,
    )


def _chain(folder: Path) -> tuple[x509.Certificate, ...]:
    return certs.certificates_from_pem(read_bounded(folder / "chain.pem", _FILE_BYTES_MAX))


def _trusted(
    folder: Path, roots: Roots, chain: Sequence[x509.Certificate], gid: GroupId
) -> tuple[x509.Certificate, ...]:
    if not roots.rotations:
        return roots.ever
    own = root_of(chain[1:], roots.ever)
    roster = read_roster(folder, roots, gid)
    revoked = read_revoked(folder, roots, gid)
    now = time.time()
    others = [c.root for c in roster.chains if c.ends_s > now and revoked.against(c.keys) is None]
    return roots.trusted(in_use=[own, *others], now=now)


def _check_modes(folder: Path) -> None:
    for directory in (folder, folder / "invites"):
        check_private(directory, DIRECTORY_MODE)
    for name in _SECRET_FILES:
        with contextlib.suppress(FileNotFoundError):
            check_private(folder / name, KEY_MODE)


def _check_names(name: str, device_name: str) -> None:
    for what, given in (("group", name), ("device", device_name)):
        try:
            certs.check_name(given)
        except ValueError as error:
            raise ConfigError(f"{given!r} cannot be the name of a {what}: {error}") from error


def _find(home: Home, name_or_gid: str) -> GroupId:
    aliases = _aliases(home)
    for gid, alias in aliases.items():
        if name_or_gid in (gid, alias):
            return gid
    known = ", ".join(sorted(aliases.values())) or "none"
    raise NotFound(
        f"this device is in no group called {name_or_gid!r}; it knows: {known}",
        hint="make one with: p2ptrain group create NAME, or join one with an invite",
    )


def _aliases(home: Home) -> dict[GroupId, str]:
    return {GroupId(folder.name): _alias(folder) for folder in _group_folders(home)}


def _group_folders(home: Home) -> Iterator[Path]:
    for folder in sorted(home.groups.iterdir()):
        if is_base32(folder.name, 16) and folder.is_dir():
            yield folder


def _alias(folder: Path) -> str:
    try:
        return certs.check_name(read_bounded(folder / "name", 1024).decode().strip())
    except (OSError, ValueError, ConfigError):
        return folder.name  # the alias is a convenience; the id always works


def _invites(group: Group) -> Path:
    return group.folder / "invites"


def _invite_file(group: Group, invite_id: str) -> Path:
    if len(bytes.fromhex(invite_id)) != 16:
        raise TrustError("an invite id is not one")
    return _invites(group) / f"{invite_id}.json"


def _drop_expired_invites(folder: Path) -> None:
    for path in folder.iterdir():
        try:
            pending = read_pending(read_bounded(path, limits.INVITE_BYTES_MAX))
            usable = pending.expires_at_s >= time.time()
        except (TrustError, ConfigError):
            usable = False  # half written when the device went down
        if not usable:
            path.unlink(missing_ok=True)
