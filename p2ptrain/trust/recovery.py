"""The group's root key at rest: PKCS#8 under a passphrase, with scrypt (RFC 7914) and AES-256.

`cryptography` writes PKCS#8 with PBKDF2 and few rounds only, so the envelope is built here. It is
an ordinary one: `openssl pkey -in recovery.pem` opens it too. Behind it the file holds, in the
clear, what else is needed to bring a group back when no device is left: its first root's
certificate and the rotations since.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import padding, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from p2ptrain.errors import ConfigError, TrustError
from p2ptrain.ids import GroupId
from p2ptrain.trust import certificates as certs
from p2ptrain.trust.rotation import Roots, Rotation, decode_rotation, encode_rotation

PASSPHRASE_CHARACTERS_MIN: Final = 8
# 16 MiB, five times over: OpenSSL refuses to open a file that needs more than 32 MiB at once.
SCRYPT_N: Final = 1 << 14
SCRYPT_R: Final = 8
SCRYPT_P: Final = 5

_ROTATION: Final = "P2PTRAIN ROTATION"
_PEM_BLOCK: Final = re.compile(
    rb"(-----BEGIN ([A-Z0-9 ]+)-----\n[A-Za-z0-9+/=\n]+-----END \2-----\n)"
)
_PBES2: Final = bytes.fromhex("06092a864886f70d01050d")
_SCRYPT: Final = bytes.fromhex("06092b06010401da47040b")
_AES_256_CBC: Final = bytes.fromhex("060960864801650304012a")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """An opened recovery file."""

    key: Ed25519PrivateKey
    """Of the newest root."""
    roots: Roots
    group: GroupId
    first: x509.Certificate
    """The root that the group began with."""


def seal_recovery(
    key: Ed25519PrivateKey,
    passphrase: str,
    *,
    first: x509.Certificate,
    rotations: Sequence[Rotation] = (),
) -> bytes:
    """The recovery file's content (PEM); ConfigError when the passphrase is too short."""
    sealed = seal_root_key(key, passphrase)
    lines = [_block(_ROTATION, encode_rotation(rotation)) for rotation in rotations]
    return sealed + certs.to_pem(first) + b"".join(lines)


def open_recovery(
    content: bytes, passphrase: str, *, known: x509.Certificate | None = None
) -> Recovery:
    """Read a recovery file.

    Args:
        known: The group's first root where the file does not hold it.

    Raises:
        TrustError: the passphrase is wrong, the file is damaged, or its key is not that of the
            newest root: an older file, from before a rotation.
    """
    blocks = _PEM_BLOCK.findall(content)
    named = {name: whole for whole, name in blocks}
    key = open_root_key(named.get(b"ENCRYPTED PRIVATE KEY", b""), passphrase)
    if b"CERTIFICATE" in named:
        (known,) = certs.certificates_from_pem(named[b"CERTIFICATE"])
    if known is None:
        raise TrustError(
            "the recovery file does not say of which group it is",
            hint="run the command on a device that has been a member",
        )
    gid = certs.group_id(known)
    lines = [_unblock(whole) for whole, name in blocks if name == _ROTATION.encode()]
    roots = Roots(known, map(decode_rotation, lines), gid=gid)
    return Recovery(key=key, roots=roots, group=gid, first=known)


def check_newest(recovery: Recovery, roots: Roots) -> None:
    """TrustError unless the recovery file's key is that of the newest root that is known."""
    if recovery.key.public_key() != certs.as_ed25519(roots.current):
        raise TrustError(
            "the recovery file is not the one of the group's present root",
            hint="use the one that the last rotation of the root wrote",
        )


def seal_root_key(key: Ed25519PrivateKey, passphrase: str) -> bytes:
    """The recovery file's content (PEM); ConfigError when the passphrase is too short."""
    if len(passphrase) < PASSPHRASE_CHARACTERS_MIN:
        raise ConfigError(
            f"the recovery passphrase has fewer than {PASSPHRASE_CHARACTERS_MIN} characters",
            hint="four random words are a good passphrase",
        )
    salt, iv = os.urandom(16), os.urandom(16)
    scrypt = Scrypt(salt=salt, length=32, n=SCRYPT_N, r=SCRYPT_R, p=SCRYPT_P)
    encryptor = Cipher(
        algorithms.AES256(scrypt.derive(passphrase.encode())), modes.CBC(iv)
    ).encryptor()
    pad = padding.PKCS7(128).padder()
    plain = key.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    sealed = encryptor.update(pad.update(plain) + pad.finalize()) + encryptor.finalize()
    return _pem(_envelope(salt, iv, sealed))


def open_root_key(pem: bytes, passphrase: str) -> Ed25519PrivateKey:
    """Read a recovery file.

    Raises:
        TrustError: the passphrase is wrong, or the file is damaged or not one.
    """
    try:
        key = serialization.load_pem_private_key(pem, password=passphrase.encode())
    except (ValueError, TypeError) as error:
        raise TrustError(
            "the recovery file cannot be opened: wrong passphrase, or damaged",
            hint="try the passphrase again, or another copy of the file",
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise TrustError("the recovery file does not hold a group's root key")
    return key


def _envelope(salt: bytes, iv: bytes, sealed: bytes) -> bytes:
    """EncryptedPrivateKeyInfo (RFC 5958) with PBES2 (RFC 8018) and scrypt (RFC 7914)."""
    cost = _integer(SCRYPT_N) + _integer(SCRYPT_R) + _integer(SCRYPT_P) + _integer(32)
    derivation = _der(0x30, _SCRYPT + _der(0x30, _der(0x04, salt) + cost))
    cipher = _der(0x30, _AES_256_CBC + _der(0x04, iv))
    algorithm = _der(0x30, _PBES2 + _der(0x30, derivation + cipher))
    return _der(0x30, algorithm + _der(0x04, sealed))


def _integer(value: int) -> bytes:
    return _der(0x02, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def _der(tag: int, content: bytes) -> bytes:
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    octets = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(octets)]) + octets + content


def _pem(der: bytes) -> bytes:
    return _block("ENCRYPTED PRIVATE KEY", der)


def _block(name: str, content: bytes) -> bytes:
    body = "\n".join(re.findall(".{1,64}", base64.b64encode(content).decode()))
    return f"-----BEGIN {name}-----\n{body}\n-----END {name}-----\n".encode()


def _unblock(block: bytes) -> bytes:
    return base64.b64decode(b"".join(block.splitlines()[1:-1]))
