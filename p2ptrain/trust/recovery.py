"""The group's root key at rest: PKCS#8 under a passphrase, with scrypt (RFC 7914) and AES-256.

`cryptography` writes PKCS#8 with PBKDF2 and few rounds only, so the envelope is built here. It is
an ordinary one: `openssl pkey -in recovery.pem` opens it too.
"""

from __future__ import annotations

import base64
import os
import re
from typing import Final

from cryptography.hazmat.primitives import padding, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from p2ptrain.errors import ConfigError, TrustError

PASSPHRASE_CHARACTERS_MIN: Final = 8
# 16 MiB, five times over: OpenSSL refuses to open a file that needs more than 32 MiB at once.
SCRYPT_N: Final = 1 << 14
SCRYPT_R: Final = 8
SCRYPT_P: Final = 5

_PBES2: Final = bytes.fromhex("06092a864886f70d01050d")
_SCRYPT: Final = bytes.fromhex("06092b06010401da47040b")
_AES_256_CBC: Final = bytes.fromhex("060960864801650304012a")


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
    lines = re.findall(".{1,64}", base64.b64encode(der).decode())
    body = "\n".join(lines)
    return (
        f"-----BEGIN ENCRYPTED PRIVATE KEY-----\n{body}\n-----END ENCRYPTED PRIVATE KEY-----\n"
    ).encode()
