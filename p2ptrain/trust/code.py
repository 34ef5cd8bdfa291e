"""One-time codes: ten characters that a person reads from one screen and types on another."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from p2ptrain import limits
from p2ptrain.errors import ConfigError, RemoteProtocolError, TrustError
from p2ptrain.wire.codec import from_plain, to_plain

ALPHABET: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
"""Crockford's base32: no I, L, O, U."""
CHARACTERS: Final = 10
CODE_LIFE_S: Final = 600
CODE_TRIES: Final = 3
CODE_VERSION: Final = 1
_ALIKE: Final = str.maketrans({"I": "1", "L": "1", "O": "0"})


def make_code(random: bytes) -> str:
    """A code in two groups of five from at least seven random bytes: 50 bits."""
    number = int.from_bytes(random, "big") % (1 << 5 * CHARACTERS)
    digits = [ALPHABET[number >> 5 * place & 31] for place in reversed(range(CHARACTERS))]
    return f"{''.join(digits[:5])}-{''.join(digits[5:])}"


def read_code(typed: str) -> str:
    """A code as a person types it, in its one form; ConfigError when it is none.

    Small letters, spaces and missing dashes are right, and I, L and O are read as 1, 1 and 0.
    """
    plain = "".join(typed.upper().split()).replace("-", "").translate(_ALIKE)
    if len(plain) != CHARACTERS or any(character not in ALPHABET for character in plain):
        raise ConfigError(
            f"{typed!r} is not a code: it has two groups of five letters and digits",
            hint="ask a member for one: p2ptrain group invite NAME",
        )
    return f"{plain[:5]}-{plain[5:]}"


def code_password(code: str) -> bytes:
    """What the key exchange is given for a code in its one form, 32 bytes."""
    info = b"p2ptrain code 1"
    derived: bytes = HKDF(hashes.SHA256(), 32, salt=None, info=info).derive(code.encode())
    return derived


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingCode:
    """What the sponsor keeps of a code until it is used, wrong too often, or too old."""

    password: str
    """Hex of `code_password`."""
    expires_at_s: float
    tries_left: int
    admits: bool
    """Whether the new member may admit others."""
    version: int = CODE_VERSION

    def __post_init__(self) -> None:
        if self.version != CODE_VERSION or len(bytes.fromhex(self.password)) != 32:
            raise ValueError("damaged")
        if not 1 <= self.tries_left <= CODE_TRIES:
            raise ValueError("a code has one to three tries")


def write_pending_code(code: PendingCode) -> bytes:
    """As the content of a file."""
    return (json.dumps(to_plain(code), indent=1) + "\n").encode()


def read_pending_code(content: bytes) -> PendingCode:
    """Read the sponsor's half of a code; TrustError when it is damaged."""
    try:
        if len(content) > limits.INVITE_BYTES_MAX:
            raise ValueError("too large")
        return from_plain(PendingCode, json.loads(content))
    except (RemoteProtocolError, ValueError, RecursionError) as error:
        raise TrustError("the pending code of this device is damaged") from error
