"""The recovery file: opens with its passphrase, here and in OpenSSL, and with nothing else."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from p2ptrain.errors import ConfigError, TrustError
from p2ptrain.trust.certificates import key_to_pem
from p2ptrain.trust.recovery import (
    check_newest,
    open_recovery,
    open_root_key,
    seal_recovery,
    seal_root_key,
)
from p2ptrain.trust.rotation import Roots
from tests.minted_group import MintedGroup
from tests.unit.test_rotation import rotated

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


def test_recovery_file_says_which_group_it_brings_back() -> None:
    group = MintedGroup()
    content = seal_recovery(group.made.root_key, PASSPHRASE, first=group.made.root)
    recovery = open_recovery(content, PASSPHRASE)
    assert (recovery.group, recovery.first) == (group.gid, group.made.root)
    assert recovery.key.public_key() == group.made.root_key.public_key()
    check_newest(recovery, recovery.roots)
    assert open_root_key(content.split(b"-----BEGIN CERT")[0], PASSPHRASE)


def test_recovery_file_without_its_group_needs_a_device_that_knows_it() -> None:
    group = MintedGroup()
    bare = seal_root_key(group.made.root_key, PASSPHRASE)
    with pytest.raises(TrustError, match="of which group"):
        open_recovery(bare, PASSPHRASE)
    assert open_recovery(bare, PASSPHRASE, known=group.made.root).group == group.gid


def test_recovery_file_of_a_rotated_root_knows_the_way_from_the_first() -> None:
    group = MintedGroup()
    rotation, new = rotated(group, group.founder())
    content = seal_recovery(new.key, PASSPHRASE, first=group.made.root, rotations=[rotation])
    recovery = open_recovery(content, PASSPHRASE)
    assert recovery.roots.current == new.certificate
    assert recovery.group == group.gid
    check_newest(recovery, recovery.roots)
    before = open_recovery(
        seal_recovery(group.made.root_key, PASSPHRASE, first=group.made.root), PASSPHRASE
    )
    with pytest.raises(TrustError, match="present root"):
        check_newest(before, Roots(group.made.root, [rotation], gid=group.gid))


@pytest.mark.parametrize("damage", [b"", b"x", b"-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_damaged_recovery_file_is_told(damage: bytes) -> None:
    with pytest.raises(TrustError, match="cannot be opened"):
        open_recovery(damage, PASSPHRASE)
