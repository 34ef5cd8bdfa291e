"""An invite: where the sponsor is, which root to expect, and a one-time secret. No key."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qs, urlencode

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from p2ptrain import limits
from p2ptrain.errors import RemoteProtocolError, TrustError
from p2ptrain.ids import is_digest
from p2ptrain.trust.certificates import check_name
from p2ptrain.wire.codec import from_plain, to_plain

INVITE_VERSION: Final = 1
SECRET_BYTES: Final = 16
INVITE_ID_BYTES: Final = 16
URL_PREFIX: Final = "p2ptrain://join/1?"


@dataclass(frozen=True, slots=True, kw_only=True)
class Invite:
    """What an invite file says; valid by construction."""

    group_name: str
    addresses: tuple[str, ...]
    """host:port of the sponsor, most useful first."""
    root_hash: str
    secret: str
    """128 random bits, hex. Whoever holds it may join once."""
    expires_at_s: float
    version: int = INVITE_VERSION

    def __post_init__(self) -> None:
        if self.version != INVITE_VERSION:
            raise ValueError(f"invite version {self.version} is unknown; update p2ptrain")
        check_name(self.group_name)
        if not is_digest(self.root_hash) or len(bytes.fromhex(self.secret)) != SECRET_BYTES:
            raise ValueError("the root hash or the secret is damaged")
        if len(self.addresses) > 16 or any(len(address) > 260 for address in self.addresses):
            raise ValueError("too many or too long addresses")

    @property
    def id(self) -> str:
        """Names the invite without giving the secret away; hex."""
        return _derive(self.secret, b"p2ptrain invite id", INVITE_ID_BYTES).hex()

    @property
    def shared_key(self) -> bytes:
        """What both sides mix into the enrolment's key exchange, 32 bytes."""
        return _derive(self.secret, b"p2ptrain invite key", 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingInvite:
    """What the sponsor keeps of an invite until it is used; not enough to join with."""

    shared_key: str
    """Hex of Invite.shared_key."""
    expires_at_s: float
    admits: bool = True
    """Whether the new member may admit others."""
    version: int = INVITE_VERSION

    def __post_init__(self) -> None:
        if self.version != INVITE_VERSION or len(bytes.fromhex(self.shared_key)) != 32:
            raise ValueError("damaged")


def write_invite(invite: Invite | PendingInvite) -> bytes:
    """As the content of a file."""
    return (json.dumps(to_plain(invite), indent=1) + "\n").encode()


def read_invite(content: bytes) -> Invite:
    """Read an invite file.

    Raises:
        TrustError: not an invite, damaged, or of an unknown version.
    """
    try:
        return from_plain(Invite, _json_map(content))
    except (RemoteProtocolError, ValueError) as error:
        raise TrustError(f"this is not a usable invite file: {error}") from error


def invite_url(invite: Invite) -> str:
    """An invite as one line, for a QR code or a terminal."""
    fields = [
        ("g", invite.group_name),
        ("r", invite.root_hash),
        ("s", invite.secret),
        ("x", str(math.ceil(invite.expires_at_s))),
        *(("a", address) for address in invite.addresses),
    ]
    return URL_PREFIX + urlencode(fields, safe=":[]")


def read_invite_url(url: str) -> Invite:
    """The inverse of `invite_url`; TrustError when it is none, or of another version."""
    try:
        if not url.startswith(URL_PREFIX) or len(url) > limits.INVITE_BYTES_MAX:
            raise ValueError("it does not begin with " + URL_PREFIX)
        fields = parse_qs(url.removeprefix(URL_PREFIX), strict_parsing=True, max_num_fields=32)
        (name,), (root,), (secret,), (expires,) = (fields[key] for key in "grsx")
        return Invite(
            group_name=name,
            addresses=tuple(fields.get("a", ())),
            root_hash=root,
            secret=secret,
            expires_at_s=float(expires),
        )
    except (ValueError, KeyError) as error:
        raise TrustError(f"this is not a usable invite: {error}") from error


def read_pending(content: bytes) -> PendingInvite:
    """Read the sponsor's half of an invite; TrustError when it is damaged."""
    try:
        return from_plain(PendingInvite, _json_map(content))
    except (RemoteProtocolError, ValueError) as error:
        raise TrustError("a pending invite of this device is damaged") from error


def _json_map(content: bytes) -> object:
    if len(content) > limits.INVITE_BYTES_MAX:
        raise ValueError("too large")
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _derive(secret: str, info: bytes, length: int) -> bytes:
    material = bytes.fromhex(secret)
    derived: bytes = HKDF(hashes.SHA256(), length, salt=None, info=info).derive(material)
    return derived


def same_root(invite: Invite, root_der: bytes) -> bool:
    """Whether a root certificate is the one that the invite promised."""
    return hashlib.sha256(root_der).hexdigest() == invite.root_hash
