"""Admit a device: the two sides of the exchange with an invite's secret, as pure machines.

The exchange with a short code is in `code_enrolment`; both end in the same request and grant.

PROTOCOL.md section 5 gives the bytes. X25519 makes fresh keys, the invite's secret authenticates
them, both sides confirm the result before anything is said, and no private key travels.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

import msgpack
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from p2ptrain import limits
from p2ptrain.errors import LocalProtocolError, RemoteProtocolError, TrustError
from p2ptrain.trust.certificates import check_name
from p2ptrain.trust.invite import INVITE_ID_BYTES, Invite
from p2ptrain.trust.revocation import Revocation
from p2ptrain.trust.rotation import Rotation
from p2ptrain.wire.codec import from_plain, to_plain, unpack_map

ENROL_MAGIC: Final = b"P2TE"
ENROL_VERSION: Final = 1
PREFIX: Final = struct.Struct("<4sBBH")

OFFER: Final = 1
ANSWER: Final = 2
REQUEST: Final = 3
GRANT: Final = 4
REFUSAL: Final = 5
CODE_OFFER: Final = 6
CODE_ANSWER: Final = 7
CODE_PROOF: Final = 8
CODE_CONFIRM: Final = 9
RENEW_OFFER: Final = 10
RENEW_ANSWER: Final = 11
RENEW_REQUEST: Final = 12
RENEW_GRANT: Final = 13

REFUSALS: Final = {
    "unknown": "the sponsor does not know this invite: it was used, withdrawn or made elsewhere",
    "expired": "the invite has expired",
    "confirmation": "the invite's secret does not fit",
    "request": "the sponsor could not read our request",
    "chain": "the sponsor may not admit anybody",
    "no code": "no code is open there: it was used, is too old, or was wrong three times",
    "code": "the code is wrong",
    "void": "the code is wrong, for the third time: it is void",
    "revoked": "a key of this device was revoked",
    "late": "this device was away for too long to be recognised",
    "busy": "the other side is busy with others; try again",
}
"""Every reason a sponsor may give, and what the joiner is told."""

CONFIRMATION_BYTES: Final = 32
_ZERO_NONCE: Final = bytes(12)  # every key seals one message only
_SEAL_BYTES: Final = 32
"""More than sealing and the head of one more list take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrolmentRequest:
    """What a joiner asks for: its two certificate requests (DER) and its display name."""

    name: str
    device_csr: bytes
    issuer_csr: bytes
    """Used only if the invite gives the right to admit others."""

    def __post_init__(self) -> None:
        check_name(self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrolmentGrant:
    """What makes a member: the root and the chain of its new issuer (DER), nearest first."""

    group_name: str
    root: bytes
    issuers: tuple[bytes, ...]
    clock_s: float
    """The sponsor's wall clock: it vouches for it towards a device whose own is wrong."""
    leaf: bytes = b""
    """For a member that may not admit: its leaf, below the sponsor's `issuers`."""
    rotations: tuple[Rotation, ...] = ()
    """How the root that the group began with was replaced so far."""
    revocations: tuple[Revocation, ...] = ()
    """Who is out, so that the new member never links with them; see `with_revocations`."""

    def __post_init__(self) -> None:
        check_name(self.group_name)
        check_clock(self.clock_s)


def with_revocations(grant: EnrolmentGrant, statements: Iterable[Revocation]) -> EnrolmentGrant:
    """A grant with as many of the statements as one message holds, the newest first.

    The others reach the new member over its first link, as they reach everybody.
    """
    room_bytes = limits.ENROL_BODY_BYTES_MAX - _SEAL_BYTES - len(_packed(grant))
    taken: list[Revocation] = []
    for statement in sorted(statements, key=lambda each: (-each.at_s, each.id)):
        room_bytes -= len(_packed(statement))
        if room_bytes < 0:
            break
        taken.append(statement)
    return replace(grant, revocations=tuple(taken))


def check_clock(clock_s: float) -> None:
    """ValueError for what no clock shows: not a number, before 1970, or far beyond any life."""
    if not 0 <= clock_s < 1 << 40:
        raise ValueError("the time is not one")


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrolFrame:
    """One message of the exchange."""

    kind: int
    body: bytes

    def encoded(self) -> bytes:
        """The bytes on the wire."""
        if len(self.body) > limits.ENROL_BODY_BYTES_MAX:
            raise LocalProtocolError("an enrolment message is too large")
        return PREFIX.pack(ENROL_MAGIC, ENROL_VERSION, self.kind, len(self.body)) + self.body


def parse_enrol_prefix(prefix: bytes) -> tuple[int, int]:
    """Kind and body length of the message that follows.

    Raises:
        RemoteProtocolError: not an enrolment message, or one over the limits.
    """
    magic, version, kind, length = PREFIX.unpack(prefix)
    if magic != ENROL_MAGIC or version != ENROL_VERSION:
        raise RemoteProtocolError("not an enrolment message of a known version")
    if not OFFER <= kind <= RENEW_GRANT or length > limits.ENROL_BODY_BYTES_MAX:
        raise RemoteProtocolError("an enrolment message breaks its limits")
    return kind, length


def refusal(reason: str) -> EnrolFrame:
    """Tell the joiner why; `reason` is a key of REFUSALS."""
    return EnrolFrame(kind=REFUSAL, body=reason.encode())


class Sealed:
    """What both sides share once the keys are agreed: proofs, the request and the grant."""

    def __init__(self, material: bytes, transcript: bytes) -> None:
        """Takes 128 bytes of key material and the hash of all that was said before."""
        self._transcript = transcript
        self._sponsor_key, self._joiner_key = material[:32], material[32:64]
        self._request_key, self._grant_key = material[64:96], material[96:]

    @property
    def sponsor_confirmation(self) -> bytes:
        """Proves that the sponsor has the keys."""
        return hmac.digest(self._sponsor_key, b"sponsor" + self._transcript, "sha256")

    @property
    def joiner_confirmation(self) -> bytes:
        """Proves that the joiner has them."""
        return hmac.digest(self._joiner_key, b"joiner" + self._transcript, "sha256")

    def ask(self, request: EnrolmentRequest) -> EnrolFrame:
        """The joiner's proof and its sealed request."""
        sealed = seal_map(self._request_key, to_plain(request), self._transcript)
        return EnrolFrame(kind=REQUEST, body=self.joiner_confirmation + sealed)

    def asked(self, frame: EnrolFrame) -> EnrolmentRequest:
        """Check the joiner's proof and open what it asks; TrustError when it has not the keys."""
        body = body_of(frame, REQUEST)
        confirmation, sealed = body[:CONFIRMATION_BYTES], body[CONFIRMATION_BYTES:]
        if not hmac.compare_digest(self.joiner_confirmation, confirmation):
            raise TrustError(REFUSALS["confirmation"])
        fields = open_map(self._request_key, sealed, self._transcript)
        return from_plain(EnrolmentRequest, fields)

    def grant(self, grant: EnrolmentGrant) -> EnrolFrame:
        """Seal what makes the joiner a member."""
        fields = {name: value for name, value in to_plain(grant).items() if value not in (b"", [])}
        sealed = seal_map(self._grant_key, fields, self._transcript)
        return EnrolFrame(kind=GRANT, body=sealed)

    def granted(self, frame: EnrolFrame) -> EnrolmentGrant:
        """Open what the sponsor granted; TrustError when it refused or it was changed."""
        fields = open_map(self._grant_key, body_of(frame, GRANT), self._transcript)
        return from_plain(EnrolmentGrant, fields)


class Joiner:
    """The side that holds the invite. Call offer, then agreed."""

    def __init__(self, invite: Invite, key: X25519PrivateKey) -> None:
        self._invite = invite
        self._key = key

    def offer(self) -> EnrolFrame:
        """Name the invite and show our fresh public key."""
        body = bytes.fromhex(self._invite.id) + self._key.public_key().public_bytes_raw()
        return EnrolFrame(kind=OFFER, body=body)

    def agreed(self, answer: EnrolFrame) -> Sealed:
        """Check that the sponsor knows the secret.

        Raises:
            TrustError: the sponsor refused, or does not know the secret.
            RemoteProtocolError: not an answer.
        """
        body = body_of(answer, ANSWER, size=32 + CONFIRMATION_BYTES)
        transcript = self.offer().body + body[:32]
        keys = _agree(
            self._key, body[:32], self._invite.shared_key, self._invite.root_hash, transcript
        )
        if not hmac.compare_digest(keys.sponsor_confirmation, body[32:]):
            raise TrustError("the other side does not know the invite's secret")
        return keys


class Sponsor:
    """The side that made the invite. Call answer; the Sealed of it then reads the request."""

    def __init__(self, key: X25519PrivateKey, *, root_hash: str) -> None:
        self._key = key
        self._root_hash = root_hash

    @staticmethod
    def invite_id(offer: EnrolFrame) -> str:
        """Which invite is offered; RemoteProtocolError when it is not an offer."""
        return body_of(offer, OFFER, size=INVITE_ID_BYTES + 32)[:INVITE_ID_BYTES].hex()

    def answer(self, offer: EnrolFrame, shared_key: bytes) -> tuple[EnrolFrame, Sealed]:
        """Show our fresh public key and prove that we know the invite's secret."""
        body = body_of(offer, OFFER, size=INVITE_ID_BYTES + 32)
        ours = self._key.public_key().public_bytes_raw()
        keys = _agree(self._key, body[INVITE_ID_BYTES:], shared_key, self._root_hash, body + ours)
        return EnrolFrame(kind=ANSWER, body=ours + keys.sponsor_confirmation), keys


def derive(secret: bytes, *, salt: bytes, info: bytes) -> bytes:
    """128 bytes of key material: HKDF-SHA256."""
    material: bytes = HKDF(hashes.SHA256(), 128, salt=salt, info=info).derive(secret)
    return material


def exchange(ours: X25519PrivateKey, theirs: bytes) -> bytes:
    """The X25519 secret; RemoteProtocolError for a public key of low order."""
    try:
        return ours.exchange(X25519PublicKey.from_public_bytes(theirs))
    except ValueError as error:
        raise RemoteProtocolError("the other side's public key is not usable") from error


def body_of(frame: EnrolFrame, kind: int, *, size: int | None = None) -> bytes:
    """The body of the frame that is expected.

    Raises:
        TrustError: it is a refusal instead; the sentence is ours, whatever the other side wrote.
        RemoteProtocolError: another kind or size.
    """
    if frame.kind == REFUSAL:
        reason = frame.body[:64].decode("ascii", "replace")
        raise TrustError(REFUSALS.get(reason, "the sponsor refused"))
    if frame.kind != kind or (size is not None and len(frame.body) != size):
        raise RemoteProtocolError("an enrolment message is out of order or has a wrong size")
    return frame.body


def _agree(
    ours: X25519PrivateKey, theirs: bytes, shared_key: bytes, root_hash: str, transcript: bytes
) -> Sealed:
    secret = exchange(ours, theirs)
    digest = hashlib.sha256(b"p2ptrain enrolment 1" + transcript).digest()
    info = b"p2ptrain enrolment 1 keys" + bytes.fromhex(root_hash)
    return Sealed(derive(shared_key + secret, salt=digest, info=info), digest)


def _packed(value: EnrolmentGrant | Revocation) -> bytes:
    packed: bytes = msgpack.packb(to_plain(value), use_bin_type=True)
    return packed


def seal_map(key: bytes, fields: dict[str, object], transcript: bytes) -> bytes:
    """Encrypt a map under a key that seals nothing else."""
    plain: bytes = msgpack.packb(fields, use_bin_type=True)
    return ChaCha20Poly1305(key).encrypt(_ZERO_NONCE, plain, transcript)


def open_map(key: bytes, sealed: bytes, transcript: bytes) -> dict[str, object]:
    """The inverse of `seal_map`; TrustError when it was changed."""
    try:
        plain = ChaCha20Poly1305(key).decrypt(_ZERO_NONCE, sealed, transcript)
    except (InvalidTag, ValueError) as error:
        raise TrustError("an enrolment message was changed on its way") from error
    return unpack_map(plain, bytes_max=limits.ENROL_BODY_BYTES_MAX)
