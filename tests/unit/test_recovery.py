"""The recovery file: opens with its passphrase, here and in OpenSSL, and with nothing else."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from p2ptrain.errors import ConfigError, TrustError
from p2ptrain.trust.certificates import key_to_pem
from p2ptrain.trust.recovery import open_root_key, seal_root_key

PASSPHRASE = "correct horse battery"


def test_recovery_file_opens_with_its_passphrase_only() -> None:
    key = Ed25519PrivateKey.generate()
    sealed = seal_root_key(key, PASSPHRASE)
    assert key_to_pem(open_root_key(sealed, PASSPHRASE)) == key_to_pem(key)
    assert key.private_bytes_raw() not in sealed
    for content, passphrase in ((sealed, PASSPHRASE + "x"), (b"nothing", PASSPHRASE)):
        with pytest.raises(TrustError, match="cannot be opened"):
            open_root_key(content, passphrase)


def test_short_passphrase_is_refused() -> None:
    with pytest.raises(ConfigError, match="passphrase"):
        seal_root_key(Ed25519PrivateKey.generate(), "short")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl command here")
def test_recovery_file_opens_in_openssl(tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    sealed = tmp_path / "recovery.pem"
    sealed.write_bytes(seal_root_key(key, PASSPHRASE))
    command = ["openssl", "pkey", "-in", str(sealed), "-passin", f"pass:{PASSPHRASE}"]
    opened = subprocess.run(command, capture_output=True, check=True, timeout=20)
    assert opened.stdout == key_to_pem(key)
