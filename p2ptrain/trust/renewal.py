"""Renew certificates that are out of date: the two sides of an exchange outside mutual TLS.

The issuer shows who it is and signs the time; the member shows its old chain and proves that it
holds the key. Dates are what may be wrong here, so they are the last thing to be looked at.
PROTOCOL.md section 5.3 gives the bytes.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgpack
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from p2ptrain import limits
from p2ptrain.errors import LocalProtocolError, RemoteProtocolError, TrustError
from p2ptrain.ids import GroupId
from p2ptrain.trust import certificates as certs
from p2ptrain.trust.chains import (
    MemberChain,
    check_in_date,
    key_fingerprint,
    read_chain,
    root_of,
)
from p2ptrain.trust.enrolment import (
    RENEW_ANSWER,
    RENEW_GRANT,
    RENEW_OFFER,
    RENEW_REQUEST,
    EnrolFrame,
    body_of,
    check_clock,
    derive,
    exchange,
    open_map,
    seal_map,
)
from p2ptrain.trust.revocation import RevokedKeys
from p2ptrain.trust.rotation import Roots, Rotation
from p2ptrain.wire.codec import from_plain, to_plain, unpack_map

RENEW_LATE_MAX_S: Final = 365 * 86_400
"""How long after its certificate ended a device is still recognised by its key."""
_KEY_BYTES: Final = 32
_GROUP_BYTES: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuerShown:
    """Who answers a renewal, and the time by its clock."""

    issuers: tuple[bytes, ...]
    """DER, its own issuer first, without the root."""
    rotations: tuple[Rotation, ...]
    clock_s: float
    signature: bytes
    """By its issuer key, over everything that was said and the time."""

    def __post_init__(self) -> None:
        check_clock(self.clock_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class RenewalAsked:
    """What a member wants certified; empty requests: nothing, the time was enough."""

    chain: tuple[bytes, ...]
    """DER of the chain that it has, leaf first, without the root."""
    device_csr: bytes
    issuer_csr: bytes
    """Empty where its issuer is in date, or it has none."""
    signature: bytes
    """By the leaf's key, over everything that was said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RenewalGranted:
    """Fresh certificates (DER): a leaf below `issuers`, or an issuer as the first of them."""

    issuers: tuple[bytes, ...]
    leaf: bytes = b""


class RenewalClient:
    """The member that was away. Call offer, met, ask, granted, in this order."""

    def __init__(self, gid: GroupId, key: X25519PrivateKey) -> None:
        self._gid = gid
        self._key = key
        self._keys: _Keys | None = None

    def offer(self) -> EnrolFrame:
        """Name the group and show our fresh public key."""
        body = self._gid.encode() + self._key.public_key().public_bytes_raw()
        return EnrolFrame(kind=RENEW_OFFER, body=body)

    def met(self, answer: EnrolFrame, *, roots: Roots, revoked: RevokedKeys) -> IssuerShown:
        """Check that an issuer of our group answered, and that it says so now.

        Rotations that it knows and we do not are added to `roots`.

        Raises:
            TrustError: it refused, is nobody who may vouch here, or an old answer came again.
            RemoteProtocolError: not an answer.
        """
        body = body_of(answer, RENEW_ANSWER)
        theirs, packed = body[:_KEY_BYTES], body[_KEY_BYTES:]
        shown = from_plain(IssuerShown, unpack_map(packed, bytes_max=limits.ENROL_BODY_BYTES_MAX))
        for rotation in shown.rotations:
            roots.add(rotation)
        issuers = [certs.certificate_from_der(der) for der in shown.issuers]
        root_of(issuers, roots.ever)
        check_in_date(issuers, now=shown.clock_s)
        if revoked.against([key_fingerprint(each) for each in issuers]) is not None:
            raise TrustError("whoever answers was revoked")
        said = self.offer().body + theirs
        _verify(issuers[0], shown.signature, _issuer_signed(said, shown.clock_s))
        self._keys = _agree(self._key, theirs, said)
        return shown

    def ask(
        self, chain: MemberChain, key: Ed25519PrivateKey, *, device_csr: bytes, issuer_csr: bytes
    ) -> EnrolFrame:
        """Prove that we hold the key of our old leaf, and ask."""
        keys = self._agreed()
        asked = RenewalAsked(
            chain=chain.to_der(),
            device_csr=device_csr,
            issuer_csr=issuer_csr,
            signature=key.sign(b"p2ptrain renewal 1 member" + keys.transcript),
        )
        sealed = seal_map(keys.request, to_plain(asked), keys.transcript)
        return EnrolFrame(kind=RENEW_REQUEST, body=sealed)

    def granted(self, frame: EnrolFrame) -> RenewalGranted:
        """Open the fresh certificates; TrustError when it refused or they were changed."""
        keys = self._agreed()
        fields = open_map(keys.grant, body_of(frame, RENEW_GRANT), keys.transcript)
        return from_plain(RenewalGranted, fields)

    def _agreed(self) -> _Keys:
        if self._keys is None:
            raise LocalProtocolError("a request before the answer")
        return self._keys


class RenewalServer:
    """An issuer that is asked. Call answer, asked, grant, in this order."""

    def __init__(self, gid: GroupId, issuer: certs.Issuer, key: X25519PrivateKey) -> None:
        self._gid = gid
        self._issuer = issuer
        self._key = key
        self._keys: _Keys | None = None

    def answer(self, offer: EnrolFrame, *, rotations: Sequence[Rotation], now: float) -> EnrolFrame:
        """Show who we are and sign the time.

        Raises:
            RemoteProtocolError: not an offer, or of another group.
        """
        body = body_of(offer, RENEW_OFFER, size=_GROUP_BYTES + _KEY_BYTES)
        if body[:_GROUP_BYTES] != self._gid.encode():
            raise RemoteProtocolError("a renewal of another group")
        ours = self._key.public_key().public_bytes_raw()
        said = body + ours
        shown = IssuerShown(
            issuers=tuple(certs.to_der(certificate) for certificate in self._issuer.chain),
            rotations=tuple(rotations),
            clock_s=now,
            signature=self._issuer.key.sign(_issuer_signed(said, now)),
        )
        self._keys = _agree(self._key, body[_GROUP_BYTES:], said)
        packed: bytes = msgpack.packb(to_plain(shown), use_bin_type=True)
        return EnrolFrame(kind=RENEW_ANSWER, body=ours + packed)

    def asked(
        self, frame: EnrolFrame, *, roots: Roots, revoked: RevokedKeys, now: float
    ) -> tuple[MemberChain, RenewalAsked]:
        """Check who asks.

        Raises:
            TrustError: not a member, revoked, or away for too long: the message is a key of
                REFUSALS, for `refusal`.
            RemoteProtocolError: not a request.
        """
        if self._keys is None:
            raise LocalProtocolError("a request before the answer")
        try:
            fields = open_map(self._keys.request, body_of(frame, RENEW_REQUEST),
                              self._keys.transcript)  # fmt: skip
            asked = from_plain(RenewalAsked, fields)
            chain = read_chain(asked.chain, gid=self._gid, roots=roots.ever)
            signed = b"p2ptrain renewal 1 member" + self._keys.transcript
            _verify(chain.certificates[0], asked.signature, signed)
        except TrustError as error:
            raise TrustError("confirmation") from error
        if revoked.against(chain.keys) is not None:
            raise TrustError("revoked")
        if now > chain.certificates[0].not_valid_after_utc.timestamp() + RENEW_LATE_MAX_S:
            raise TrustError("late")
        return chain, asked

    def grant(self, granted: RenewalGranted) -> EnrolFrame:
        """Seal the fresh certificates."""
        if self._keys is None:
            raise LocalProtocolError("a grant before the answer")
        sealed = seal_map(self._keys.grant, to_plain(granted), self._keys.transcript)
        return EnrolFrame(kind=RENEW_GRANT, body=sealed)


def renew(
    issuer: certs.Issuer,
    chain: MemberChain,
    *,
    gid: GroupId,
    device_csr: bytes,
    issuer_csr: bytes,
    now: float,
) -> RenewalGranted:
    """Certify a member's keys again, and no others: a revocation must know all of them.

    Args:
        chain: What the member, whose key was proved, has shown.
        issuer_csr: Empty: certify the leaf. Otherwise the member signs its own leaf, below the
            fresh issuer.

    Raises:
        TrustError: it asks for another key than it has, or for a right that it has not.
    """
    if not issuer_csr:
        request = certs.request_from_der(device_csr)
        if certs.device_id(certs.requested_key(request)) != chain.device:
            raise TrustError("a member asks for another key than its own")
        leaf = certs.issue_leaf(issuer, request, gid=gid, name=chain.name, now=now)
        return RenewalGranted(issuers=_der(issuer.chain), leaf=certs.to_der(leaf))
    wanted = certs.request_from_der(issuer_csr)
    former = chain.issuers[0]
    if not chain.may_admit or certs.requested_key(wanted) != certs.as_ed25519(former):
        raise TrustError("a member asks for a right to admit that it has not")
    made = certs.reissue(issuer.key, issuer.certificate, former, gid=gid, now=now)
    return RenewalGranted(issuers=_der((made, *issuer.chain)))


def renewed_chain(
    granted: RenewalGranted, former: MemberChain, *, gid: GroupId, roots: Roots
) -> tuple[x509.Certificate, ...]:
    """The certificates that a grant gives us: leaf and issuers, or, without a leaf, issuers only.

    Raises:
        TrustError: they are not for our keys, or do not lead to our root.
    """
    issuers = tuple(certs.certificate_from_der(der) for der in granted.issuers)
    root_of(issuers, roots.ever)
    if granted.leaf:
        chain = read_chain((granted.leaf, *granted.issuers), gid=gid, roots=roots.ever)
        if chain.device != former.device:
            raise TrustError("what was certified is another device's key")
        return chain.certificates
    if key_fingerprint(issuers[0]) != former.keys[1]:
        raise TrustError("what was certified is another issuer's key")
    return issuers


@dataclass(frozen=True, slots=True, kw_only=True)
class _Keys:
    transcript: bytes
    request: bytes
    grant: bytes


def _agree(ours: X25519PrivateKey, theirs: bytes, said: bytes) -> _Keys:
    digest = hashlib.sha256(b"p2ptrain renewal 1" + said).digest()
    material = derive(exchange(ours, theirs), salt=digest, info=b"p2ptrain renewal 1 keys")
    return _Keys(transcript=digest, request=material[:32], grant=material[32:64])


def _issuer_signed(said: bytes, clock_s: float) -> bytes:
    return b"p2ptrain renewal 1 issuer" + said + struct.pack("<d", clock_s)


def _verify(certificate: x509.Certificate, signature: bytes, signed: bytes) -> None:
    try:
        certs.as_ed25519(certificate).verify(signature, signed)
    except InvalidSignature as error:
        raise TrustError("a renewal is signed by somebody else") from error


def _der(chain: Sequence[x509.Certificate]) -> tuple[bytes, ...]:
    return tuple(certs.to_der(certificate) for certificate in chain)
