"""Admit a device that was told a short code: SPAKE2, then the ordinary request and grant.

The joiner proves first that it has the code, so a sponsor that is asked by somebody who guesses
says nothing before the guess is spent. PROTOCOL.md section 5.2 gives the bytes.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from typing import Final

from p2ptrain.errors import RemoteProtocolError, TrustError
from p2ptrain.ids import GroupId, is_base32
from p2ptrain.trust.enrolment import (
    CODE_ANSWER,
    CODE_CONFIRM,
    CODE_OFFER,
    CODE_PROOF,
    CONFIRMATION_BYTES,
    REFUSALS,
    EnrolFrame,
    Sealed,
    body_of,
    derive,
)
from p2ptrain.trust.password_exchange import (
    EXCHANGE_MESSAGE_BYTES,
    Entropy,
    PasswordExchange,
    begin_exchange,
)

NONCE_BYTES: Final = 32
_GROUP_BYTES: Final = 16


class CodeJoiner:
    """The side on which the code was typed. Call offer, proof, agreed, in this order."""

    def __init__(self, password: bytes, nonce: bytes, *, entropy: Entropy = os.urandom) -> None:
        self._password = password
        self._nonce = nonce
        self._entropy = entropy
        self._keys: Sealed | None = None
        self.group: GroupId | None = None
        """The sponsor's group; believed only once `agreed` returns."""

    def offer(self) -> EnrolFrame:
        """Ask for an open code."""
        return EnrolFrame(kind=CODE_OFFER, body=self._nonce)

    def proof(self, answer: EnrolFrame) -> EnrolFrame:
        """Our half of the exchange and the proof that we have the key; blocks while it computes.

        Raises:
            TrustError: the sponsor refused.
            RemoteProtocolError: not an answer.
        """
        size = _GROUP_BYTES + NONCE_BYTES + EXCHANGE_MESSAGE_BYTES
        body = body_of(answer, CODE_ANSWER, size=size)
        self.group = _group(body[:_GROUP_BYTES])
        context = _context(self._nonce, body[: _GROUP_BYTES + NONCE_BYTES])
        ours = begin_exchange(
            self._password, is_sponsor=False, context=context, entropy=self._entropy
        )
        theirs = body[_GROUP_BYTES + NONCE_BYTES :]
        self._keys = _agreed(ours, theirs, context + theirs + ours.message)
        return EnrolFrame(kind=CODE_PROOF, body=ours.message + self._keys.joiner_confirmation)

    def agreed(self, confirm: EnrolFrame) -> Sealed:
        """Check that the sponsor has the key as well; TrustError when it has not, or refused."""
        body = body_of(confirm, CODE_CONFIRM, size=CONFIRMATION_BYTES)
        if self._keys is None or not hmac.compare_digest(self._keys.sponsor_confirmation, body):
            raise TrustError("the other side does not know the code")
        return self._keys


class CodeSponsor:
    """The side that showed the code. Call answer, then agreed."""

    def __init__(self, group: GroupId, nonce: bytes, *, entropy: Entropy = os.urandom) -> None:
        self._group = group
        self._nonce = nonce
        self._entropy = entropy
        self._exchange: PasswordExchange | None = None
        self._context = b""

    def answer(self, offer: EnrolFrame, password: bytes) -> EnrolFrame:
        """Our half of the exchange; blocks while it computes."""
        theirs = body_of(offer, CODE_OFFER, size=NONCE_BYTES)
        ours = self._group.encode() + self._nonce
        self._context = _context(theirs, ours)
        self._exchange = begin_exchange(
            password, is_sponsor=True, context=self._context, entropy=self._entropy
        )
        return EnrolFrame(kind=CODE_ANSWER, body=ours + self._exchange.message)

    def agreed(self, proof: EnrolFrame) -> tuple[EnrolFrame, Sealed]:
        """Check that the joiner has the code; gives what to send and the keys. Blocks.

        Raises:
            TrustError: it guessed wrong; a try is spent.
            RemoteProtocolError: not a proof.
        """
        body = body_of(proof, CODE_PROOF, size=EXCHANGE_MESSAGE_BYTES + CONFIRMATION_BYTES)
        theirs, confirmation = body[:EXCHANGE_MESSAGE_BYTES], body[EXCHANGE_MESSAGE_BYTES:]
        if self._exchange is None:
            raise RemoteProtocolError("a proof before the answer")
        transcript = self._context + self._exchange.message + theirs
        keys = _agreed(self._exchange, theirs, transcript)
        if not hmac.compare_digest(keys.joiner_confirmation, confirmation):
            raise TrustError(REFUSALS["code"])
        return EnrolFrame(kind=CODE_CONFIRM, body=keys.sponsor_confirmation), keys


def _context(joiner_nonce: bytes, group_and_sponsor_nonce: bytes) -> bytes:
    return joiner_nonce + group_and_sponsor_nonce


def _agreed(ours: PasswordExchange, theirs: bytes, transcript: bytes) -> Sealed:
    digest = hashlib.sha256(b"p2ptrain code enrolment 1" + transcript).digest()
    secret = ours.finish(theirs)
    return Sealed(derive(secret, salt=digest, info=b"p2ptrain code enrolment 1 keys"), digest)


def _group(raw: bytes) -> GroupId:
    text = raw.decode("ascii", "replace")
    if not is_base32(text, _GROUP_BYTES):
        raise RemoteProtocolError("the sponsor's group id is not one")
    return GroupId(text)
