"""Admit a device that holds an invite: the two sides of the exchange, as pure machines.

PROTOCOL.md section 5 gives the bytes. X25519 makes fresh keys, the invite's secret authenticates
them, both sides confirm the result before anything is said, and no private key travels.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass
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
from p2ptrain.wire.codec import from_plain, to_plain, unpack_map

ENROL_MAGIC: Final = b"P2TE"
ENROL_VERSION: Final = 1
PREFIX: Final = struct.Struct("<4sBBH")

OFFER: Final = 1
ANSWER: Final = 2
REQUEST: Final = 3
GRANT: Final = 4
REFUSAL: Final = 5

REFUSALS: Final = {
    "unknown": "the sponsor does not know this invite: it was used, withdrawn or made elsewhere",
    "expired": "the invite has expired",
    "confirmation": "the invite's secret does not fit",
    "request": "the sponsor could not read our request",
    "chain": "the sponsor may not admit anybody",
}
"""Every reason a sponsor may give, and what the joiner is told."""

_CONFIRMATION_BYTES: Final = 32
_ZERO_NONCE: Final = bytes(12)  # every key seals one message only


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrolmentRequest:
    """What a joiner asks for: its two certificate requests (DER) and its display name."""

    name: str
    device_csr: bytes
    issuer_csr: bytes

    def __post_init__(self) -> None:
        check_name(self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrolmentGrant:
    """What makes a member: the root and the chain of its new issuer (DER), nearest first."""

    group_name: str
    root: bytes
    issuers: tuple[bytes, ...]
    clock_s: float
    """The sponsor's wall clock, so that a wrong clock can be told."""

    def __post_init__(self) -> None:
        check_name(self.group_name)


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
    if not OFFER <= kind <= REFUSAL or length > limits.ENROL_BODY_BYTES_MAX:
        raise RemoteProtocolError("an enrolment message breaks its limits")
    return kind, length


def refusal(reason: str) -> EnrolFrame:
    """Tell the joiner why; `reason` is a key of REFUSALS."""
    return EnrolFrame(kind=REFUSAL, body=reason.encode())


class Joiner:
    """The side that holds the invite file. Call offer, request, grant, in this order."""

    def __init__(self, invite: Invite, key: X25519PrivateKey) -> None:
        self._invite = invite
        self._key = key
        self._keys: _Keys | None = None

    def offer(self) -> EnrolFrame:
        """Name the invite and show our fresh public key."""
        body = bytes.fromhex(self._invite.id) + self._key.public_key().public_bytes_raw()
        return EnrolFrame(kind=OFFER, body=body)

    def request(self, answer: EnrolFrame, request: EnrolmentRequest) -> EnrolFrame:
        """Check that the sponsor knows the secret, prove that we do, and ask.

        Raises:
            TrustError: the sponsor refused, or does not know the secret.
            RemoteProtocolError: not an answer.
        """
        body = _body_of(answer, ANSWER, size=32 + _CONFIRMATION_BYTES)
        offer = self.offer().body
        keys = _agree(
            self._key, body[:32], self._invite.shared_key, self._invite.root_hash,
            transcript=offer + body[:32],
        )  # fmt: skip
        if not hmac.compare_digest(keys.sponsor_confirmation, body[32:]):
            raise TrustError("the other side does not know the invite's secret")
        self._keys = keys
        sealed = _seal(keys.request_key, to_plain(request), keys.transcript)
        return EnrolFrame(kind=REQUEST, body=keys.joiner_confirmation + sealed)

    def grant(self, frame: EnrolFrame) -> EnrolmentGrant:
        """Open what the sponsor granted; TrustError when it refused or it was changed."""
        if self._keys is None:
            raise LocalProtocolError("a grant before the request")
        body = _body_of(frame, GRANT)
        fields = _open(self._keys.grant_key, body, self._keys.transcript)
        return from_plain(EnrolmentGrant, fields)


class Sponsor:
    """The side that made the invite. Call answer, request, grant, in this order."""

    def __init__(self, key: X25519PrivateKey, *, root_hash: str) -> None:
        self._key = key
        self._root_hash = root_hash
        self._keys: _Keys | None = None

    @staticmethod
    def invite_id(offer: EnrolFrame) -> str:
        """Which invite is offered; RemoteProtocolError when it is not an offer."""
        return _body_of(offer, OFFER, size=INVITE_ID_BYTES + 32)[:INVITE_ID_BYTES].hex()

    def answer(self, offer: EnrolFrame, shared_key: bytes) -> EnrolFrame:
        """Show our fresh public key and prove that we know the invite's secret."""
        body = _body_of(offer, OFFER, size=INVITE_ID_BYTES + 32)
        ours = self._key.public_key().public_bytes_raw()
        self._keys = _agree(
            self._key, body[INVITE_ID_BYTES:], shared_key, self._root_hash,
            transcript=body + ours,
        )  # fmt: skip
        return EnrolFrame(kind=ANSWER, body=ours + self._keys.sponsor_confirmation)

    def request(self, frame: EnrolFrame) -> EnrolmentRequest:
        """Check that the joiner knows the secret and read what it asks.

        Raises:
            TrustError: it does not know it.
            RemoteProtocolError: not a request.
        """
        if self._keys is None:
            raise LocalProtocolError("a request before the answer")
        body = _body_of(frame, REQUEST)
        confirmation, sealed = body[:_CONFIRMATION_BYTES], body[_CONFIRMATION_BYTES:]
        if not hmac.compare_digest(self._keys.joiner_confirmation, confirmation):
            raise TrustError(REFUSALS["confirmation"])
        fields = _open(self._keys.request_key, sealed, self._keys.transcript)
        return from_plain(EnrolmentRequest, fields)

    def grant(self, grant: EnrolmentGrant) -> EnrolFrame:
        """Seal what makes the joiner a member."""
        if self._keys is None:
            raise LocalProtocolError("a grant before the request")
        sealed = _seal(self._keys.grant_key, to_plain(grant), self._keys.transcript)
        return EnrolFrame(kind=GRANT, body=sealed)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Keys:
    transcript: bytes
    sponsor_confirmation: bytes
    joiner_confirmation: bytes
    request_key: bytes
    grant_key: bytes


def _agree(
    ours: X25519PrivateKey, theirs: bytes, shared_key: bytes, root_hash: str, *, transcript: bytes
) -> _Keys:
    try:
        secret = ours.exchange(X25519PublicKey.from_public_bytes(theirs))
    except ValueError as error:  # a point of low order
        raise RemoteProtocolError("the other side's public key is not usable") from error
    digest = hashlib.sha256(b"p2ptrain enrolment 1" + transcript).digest()
    info = b"p2ptrain enrolment 1 keys" + bytes.fromhex(root_hash)
    material = HKDF(hashes.SHA256(), 128, salt=digest, info=info).derive(shared_key + secret)
    return _Keys(
        transcript=digest,
        sponsor_confirmation=hmac.digest(material[:32], b"sponsor" + digest, "sha256"),
        joiner_confirmation=hmac.digest(material[32:64], b"joiner" + digest, "sha256"),
        request_key=material[64:96],
        grant_key=material[96:],
    )


def _seal(key: bytes, fields: dict[str, object], transcript: bytes) -> bytes:
    plain: bytes = _pack(fields)
    return ChaCha20Poly1305(key).encrypt(_ZERO_NONCE, plain, transcript)


def _open(key: bytes, sealed: bytes, transcript: bytes) -> dict[str, object]:
    try:
        plain = ChaCha20Poly1305(key).decrypt(_ZERO_NONCE, sealed, transcript)
    except (InvalidTag, ValueError) as error:
        raise TrustError("an enrolment message was changed on its way") from error
    return unpack_map(plain, bytes_max=limits.ENROL_BODY_BYTES_MAX)


def _pack(fields: dict[str, object]) -> bytes:
    packed: bytes = msgpack.packb(fields, use_bin_type=True)
    return packed


def _body_of(frame: EnrolFrame, kind: int, *, size: int | None = None) -> bytes:
    if frame.kind == REFUSAL:
        reason = frame.body[:64].decode("ascii", "replace")
        raise TrustError(REFUSALS.get(reason, "the sponsor refused"))
    if frame.kind != kind or (size is not None and len(frame.body) != size):
        raise RemoteProtocolError("an enrolment message is out of order or has a wrong size")
    return frame.body
