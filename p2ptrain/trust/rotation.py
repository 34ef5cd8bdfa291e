"""Root rotation: the old root names the new one, and both are trusted until all have moved.

The group keeps the id that its first root gave it. PROTOCOL.md section 7 gives the bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from p2ptrain import limits
from p2ptrain.errors import RemoteProtocolError, TrustError
from p2ptrain.ids import GroupId, is_base32
from p2ptrain.trust import certificates as certs
from p2ptrain.trust.chains import key_fingerprint, root_of
from p2ptrain.wire.codec import from_plain, message, to_plain

ROTATION_VERSION: Final = 1
OLD_ROOT_TRUSTED_S: Final = certs.LEAF_LIFE_S
"""The longest that a root that was replaced is trusted: whoever is away for longer than its leaf
lives needs the renewal exchange anyway."""
_DOMAIN: Final = b"p2ptrain rotation 1\0"


@message("trust.rotation")
@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """A root's last word: which root comes after it."""

    group: GroupId
    number: int
    """1 for the first rotation, and so on without gaps."""
    root: str
    """Hex DER of the new root."""
    issuers: tuple[str, ...]
    """Hex DER of the issuers that stood directly below the old root, now below the new one."""
    at_s: int
    until_s: int
    """When the old root is no longer trusted, even if somebody still stands below it."""
    signature: str
    """Hex, by the old root's key."""
    version: int = ROTATION_VERSION

    def __post_init__(self) -> None:
        if self.version != ROTATION_VERSION:
            raise ValueError(f"rotation version {self.version} is unknown; update p2ptrain")
        if not is_base32(self.group, 16) or not 1 <= self.number <= limits.ROTATIONS_MAX:
            raise ValueError("the group id or the number is not one")
        if not 0 <= self.at_s < self.until_s <= self.at_s + OLD_ROOT_TRUSTED_S:
            raise ValueError("the times do not fit together")
        if len(self.issuers) > limits.KEPT_KEYS_MAX:
            raise ValueError("too many issuers")
        for der in (self.root, *self.issuers):
            if not 2 <= len(der) <= 2 * limits.CERTIFICATE_BYTES_MAX:
                raise ValueError("a certificate is damaged")
            bytes.fromhex(der)

    @property
    def id(self) -> str:
        """Hex sha256 of what is signed."""
        return hashlib.sha256(self.signed_bytes).hexdigest()

    @property
    def signed_bytes(self) -> bytes:
        """Everything but the signature, as canonical JSON behind a label."""
        fields = to_plain(self)
        del fields["signature"]
        return _DOMAIN + _canonical(fields)

    @property
    def new_root(self) -> x509.Certificate:
        """The root that this names."""
        return certs.certificate_from_der(bytes.fromhex(self.root))


@dataclass(frozen=True, slots=True, kw_only=True)
class OldRoot:
    """The root that gives way, opened from the recovery file."""

    key: Ed25519PrivateKey
    certificate: x509.Certificate


def rotate(
    old: OldRoot,
    new: certs.NewGroup,
    *,
    gid: GroupId,
    number: int,
    issuers: Sequence[x509.Certificate],
    now: float,
) -> Rotation:
    """Name the new root and move the issuers below the old one under it."""
    moved = [certs.reissue(new.root_key, new.root, former, gid=gid, now=now) for former in issuers]
    unsigned = Rotation(
        group=gid,
        number=number,
        root=certs.to_der(new.root).hex(),
        issuers=tuple(certs.to_der(certificate).hex() for certificate in moved),
        at_s=int(now),
        until_s=int(now) + OLD_ROOT_TRUSTED_S,
        signature="",
    )
    return replace(unsigned, signature=old.key.sign(unsigned.signed_bytes).hex())


class Roots:
    """The root that the group began with, and those that followed it."""

    def __init__(
        self, first: x509.Certificate, rotations: Iterable[Rotation] = (), *, gid: GroupId
    ) -> None:
        self._gid = gid
        self._roots = [first]
        self._rotations: list[Rotation] = []
        for rotation in rotations:
            self.add(rotation)

    def add(self, rotation: Rotation) -> bool:
        """Take the next rotation; False when it is known.

        Raises:
            TrustError: not signed by the present root, of another group, or one is missing.
        """
        known = next((r for r in self._rotations if r.number == rotation.number), None)
        if known is not None:
            if known.id != rotation.id:
                raise TrustError("the root named two different successors")
            return False
        self._check(rotation)
        self._rotations.append(rotation)
        self._roots.append(rotation.new_root)
        return True

    @property
    def rotations(self) -> tuple[Rotation, ...]:
        """In order."""
        return tuple(self._rotations)

    @property
    def ever(self) -> tuple[x509.Certificate, ...]:
        """All roots, the newest first."""
        return tuple(reversed(self._roots))

    @property
    def current(self) -> x509.Certificate:
        """The newest."""
        return self._roots[-1]

    def trusted(
        self, *, in_use: Iterable[x509.Certificate], now: float
    ) -> tuple[x509.Certificate, ...]:
        """What links trust: the newest, and older ones until nobody needs them or time is up.

        Args:
            in_use: The roots that the chains of the known members lead to.
        """
        needed = set(in_use)
        return tuple(
            root
            for number, root in reversed(list(enumerate(self._roots)))
            if root == self.current or (root in needed and now < self._rotations[number].until_s)
        )

    def mended(self, chain: Sequence[x509.Certificate]) -> tuple[x509.Certificate, ...]:
        """A chain whose topmost issuer is moved below the newest root that certified it."""
        for rotation in self._rotations:
            for der in rotation.issuers:
                moved = certs.certificate_from_der(bytes.fromhex(der))
                if key_fingerprint(moved) == key_fingerprint(chain[-1]):
                    chain = (*chain[:-1], moved)
        return tuple(chain)

    def _check(self, rotation: Rotation) -> None:
        if rotation.group != self._gid or rotation.number != len(self._roots):
            raise TrustError("a rotation of the root is of another group, or one before it misses")
        try:
            certs.as_ed25519(self.current).verify(
                bytes.fromhex(rotation.signature), rotation.signed_bytes
            )
        except (InvalidSignature, ValueError) as error:
            raise TrustError("a rotation of the root is not signed by the root") from error
        certs.check_root(rotation.new_root, now=rotation.at_s)
        for der in rotation.issuers:
            root_of((certs.certificate_from_der(bytes.fromhex(der)),), (rotation.new_root,))


def encode_rotation(rotation: Rotation) -> bytes:
    """One line of the log of rotations, with its newline."""
    return _canonical(to_plain(rotation)) + b"\n"


def decode_rotation(line: bytes) -> Rotation:
    """The inverse of `encode_rotation`; TrustError when the line is damaged."""
    try:
        return from_plain(Rotation, json.loads(line))
    except (ValueError, RemoteProtocolError, RecursionError) as error:
        raise TrustError(f"the log of root rotations is damaged: {error}") from error


def _canonical(fields: object) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
