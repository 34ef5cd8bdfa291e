"""Revocation: signed statements that only ever grow, and what they refuse.

A statement names the keys of one device and is signed by the issuer key of any member. Whoever
holds it refuses every chain in which one of these keys stands, unless a key further down that
chain is in the statement's `keep`: that is how members stay that the revoked one had admitted.
Nothing is ever un-revoked. PROTOCOL.md section 7 gives the bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from p2ptrain import limits
from p2ptrain.errors import RemoteProtocolError, TrustError
from p2ptrain.ids import DeviceId, GroupId, is_base32, is_digest
from p2ptrain.trust import certificates as certs
from p2ptrain.trust.chains import MemberChain, key_fingerprint, root_of
from p2ptrain.wire.codec import from_plain, message, to_plain

REVOCATION_VERSION: Final = 1
_DOMAIN: Final = b"p2ptrain revocation 1\0"
_SIGNATURE_BYTES: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A key that the revoked issuer had certified and that stays, certified anew."""

    key: str
    """Its fingerprint."""
    certificate: str
    """Hex DER: the same key, name and kind, signed by the revoker."""

    def __post_init__(self) -> None:
        if not is_digest(self.key) or not _is_certificate(self.certificate):
            raise ValueError("a kept key is damaged")


@message("trust.revocation")
@dataclass(frozen=True, slots=True, kw_only=True)
class Revocation:
    """One device is out of the group, for ever."""

    group: GroupId
    device: DeviceId
    name: str
    """What people called it."""
    keys: tuple[str, ...]
    """Fingerprints of the keys that it held: its leaf's, its issuer's."""
    keep: tuple[Kept, ...]
    by: DeviceId
    """The member that says so."""
    at_s: int
    """Its wall clock, seconds since 1970."""
    reason: str
    chain: tuple[str, ...]
    """Hex DER of the revoker's issuers, its own first, without the root."""
    signature: str
    """Hex, by the revoker's issuer key."""
    version: int = REVOCATION_VERSION

    def __post_init__(self) -> None:
        if self.version != REVOCATION_VERSION:
            raise ValueError(f"revocation version {self.version} is unknown; update p2ptrain")
        if not is_base32(self.group, 16) or not is_base32(self.device, 26):
            raise ValueError("the group or device id is not one")
        if not 1 <= len(self.keys) <= limits.REVOKED_KEYS_MAX or not all(map(is_digest, self.keys)):
            raise ValueError("the revoked keys are not fingerprints")
        if len(self.keep) > limits.KEPT_KEYS_MAX or not 0 <= self.at_s < 1 << 40:
            raise ValueError("too many kept keys, or no time")
        if not 1 <= len(self.chain) <= certs.ISSUERS_MAX or not all(
            map(_is_certificate, self.chain)
        ):
            raise ValueError("the revoker's chain is damaged")
        certs.check_name(self.name)
        check_reason(self.reason)

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

    def keeps(self, keys: Iterable[str]) -> bool:
        """Whether one of these keys is to stay."""
        kept = {each.key for each in self.keep}
        return any(key in kept for key in keys)


def check_reason(reason: str) -> str:
    """Return a reason if it is one short printable line; ValueError otherwise."""
    if not 1 <= len(reason) <= limits.REVOCATION_REASON_CHARACTERS_MAX or not reason.isprintable():
        raise ValueError("a reason is one line of at most 200 printable characters")
    return reason


def revoke(
    target: MemberChain,
    *,
    by: certs.Issuer,
    gid: GroupId,
    reason: str,
    keep: Sequence[MemberChain],
    now: float,
) -> Revocation:
    """Sign that a device is out, and certify anew what stays of what it had admitted.

    Args:
        keep: Chains of members below the target that stay; of each, the key that the member
            itself holds and that signs or shows its leaf is certified anew.

    Raises:
        TrustError: our issuer does not say whose it is, or the reason is not one.
    """
    revoker = certs.certified_device(by.certificate)
    if revoker is None:
        raise TrustError("our issuer certificate does not say whose it is")
    try:
        unsigned = Revocation(
            group=gid,
            device=target.device,
            name=target.name,
            keys=target.own_keys,
            keep=tuple(_keep(chain, by, gid, now) for chain in keep),
            by=revoker,
            at_s=int(now),
            reason=check_reason(reason),
            chain=tuple(certs.to_der(certificate).hex() for certificate in by.chain),
            signature="",
        )
    except ValueError as error:
        raise TrustError(f"cannot revoke: {error}") from error
    return replace(unsigned, signature=by.key.sign(unsigned.signed_bytes).hex())


def _keep(chain: MemberChain, by: certs.Issuer, gid: GroupId, now: float) -> Kept:
    """Certify the topmost key that a member itself holds: its issuer's, or else its leaf's."""
    former = chain.certificates[1 if chain.may_admit else 0]
    key = key_fingerprint(former)
    if key == key_fingerprint(by.certificate):
        # The revoker hangs below the revoked itself and cannot certify itself: only name it.
        return Kept(key=key, certificate=certs.to_der(by.certificate).hex())
    made = certs.reissue(by.key, by.certificate, former, gid=gid, now=now)
    return Kept(key=key, certificate=certs.to_der(made).hex())


def check_revocation(
    statement: Revocation, *, gid: GroupId, roots: Sequence[x509.Certificate]
) -> None:
    """Check who says it and that nobody changed it.

    Dates are those of the statement: it outlives the certificate that signed it.

    Raises:
        TrustError: not a statement of a member of this group; drop it.
    """
    chain = tuple(certs.certificate_from_der(bytes.fromhex(der)) for der in statement.chain)
    root_of(chain, roots)
    if statement.group != gid or certs.certified_device(chain[0]) != statement.by:
        raise TrustError("a revocation is of another group, or its revoker is not who it says")
    try:
        certs.as_ed25519(chain[0]).verify(
            bytes.fromhex(statement.signature), statement.signed_bytes
        )
    except (InvalidSignature, ValueError) as error:
        raise TrustError("a revocation's signature does not hold") from error
    for kept in statement.keep:
        _check_kept(kept, chain[0])


def _check_kept(kept: Kept, revoker: x509.Certificate) -> None:
    certificate = certs.certificate_from_der(bytes.fromhex(kept.certificate))
    if key_fingerprint(certificate) != kept.key:
        raise TrustError("a revocation keeps another key than it certifies")
    if certificate == revoker:
        return
    try:
        certificate.verify_directly_issued_by(revoker)
    except (InvalidSignature, ValueError, TypeError) as error:
        raise TrustError("a revocation keeps a key that its revoker did not certify") from error


class RevokedKeys:
    """The statements that are in effect here, and what they refuse."""

    def __init__(self, statements: Iterable[Revocation] = ()) -> None:
        self._by_id: dict[str, Revocation] = {}
        self._by_key: dict[str, list[Revocation]] = {}
        for statement in statements:
            self.add(statement)

    def add(self, statement: Revocation) -> bool:
        """Take a checked statement; False when it is known."""
        if statement.id in self._by_id:
            return False
        self._by_id[statement.id] = statement
        for key in statement.keys:
            self._by_key.setdefault(key, []).append(statement)
        return True

    def __contains__(self, statement_id: str) -> bool:
        return statement_id in self._by_id

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def statements(self) -> tuple[Revocation, ...]:
        """All of them, in the order in which they came."""
        return tuple(self._by_id.values())

    def against(self, keys: Sequence[str]) -> Revocation | None:
        """The statement that refuses a chain with these keys, the leaf's first; None: none does.

        A chain passes a revoked key only if every statement against that key keeps one of the
        keys before it: two revokers that disagree refuse.
        """
        for index, key in enumerate(keys):
            for statement in self._by_key.get(key, ()):
                if not statement.keeps(keys[:index]):
                    return statement
        return None

    def of_device(self, device: DeviceId) -> Revocation | None:
        """The first statement that revokes this device."""
        return next((s for s in self._by_id.values() if s.device == device), None)

    def mended(self, chain: Sequence[x509.Certificate]) -> tuple[x509.Certificate, ...]:
        """A chain led around revoked issuers where a revoker certified one of its keys anew.

        Gives it as it is when there is nothing to mend or no way around.
        """
        for statement in self._by_id.values():
            chain = _led_around(tuple(chain), statement)
        return tuple(chain)


def _led_around(
    chain: tuple[x509.Certificate, ...], statement: Revocation
) -> tuple[x509.Certificate, ...]:
    keys = [key_fingerprint(certificate) for certificate in chain]
    revoked_at = max((i for i, key in enumerate(keys) if key in statement.keys), default=0)
    revoker = certs.certificate_from_der(bytes.fromhex(statement.chain[0]))
    if revoked_at == 0 or keys[revoked_at - 1] == key_fingerprint(revoker):
        return chain  # nothing revoked above, or already below the revoker
    kept = {each.key: each for each in statement.keep}
    for index, key in enumerate(keys[:revoked_at]):
        if key in kept:
            made = certs.certificate_from_der(bytes.fromhex(kept[key].certificate))
            above = [certs.certificate_from_der(bytes.fromhex(der)) for der in statement.chain]
            around = (*chain[:index], made, *above)
            return chain if made == revoker or len(around) > certs.ISSUERS_MAX + 1 else around
    return chain


def encode_revocation(statement: Revocation) -> bytes:
    """One line of the log of revocations, with its newline."""
    return _canonical(to_plain(statement)) + b"\n"


def decode_revocation(line: bytes) -> Revocation:
    """The inverse of `encode_revocation`; TrustError when the line is damaged."""
    try:
        return from_plain(Revocation, json.loads(line))
    except (ValueError, RemoteProtocolError, RecursionError) as error:
        raise TrustError(
            f"the log of revocations is damaged: {error}",
            hint="copy revoked.jsonl from another member, or join the group again",
        ) from error


def _canonical(fields: object) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def _is_certificate(text: str) -> bool:
    """Whether this may be the hex of a DER certificate; its content is read when it is used."""
    if not 2 <= len(text) <= 2 * limits.CERTIFICATE_BYTES_MAX:
        return False
    try:
        return bytes.fromhex(text).hex() == text
    except ValueError:
        return False
