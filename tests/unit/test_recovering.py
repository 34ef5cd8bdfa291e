"""Coming back with the root's key, rotating the root and leaving, on disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from p2ptrain.errors import ConfigError, NotFound, PeerAlreadyRunning, TrustError
from p2ptrain.runtime.credentials.revoking import RevokeRequest, sign_revocation
from p2ptrain.runtime.credentials.trust_reports import read_known, trust_report
from p2ptrain.store.groups import Group, create_group, known_groups, load_group, load_issuer
from p2ptrain.store.home import Home, lock_group, open_home
from p2ptrain.store.recovering import forget, recover, sign_rotation
from p2ptrain.store.trust_log import append_statements, read_roots
from p2ptrain.trust import certificates as certs
from p2ptrain.trust.chains import member_chain

PASSPHRASE = "correct horse"
NEW_PASSPHRASE = "battery staple"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return open_home(tmp_path / "home")


@pytest.fixture
def group(home: Home) -> Group:
    return create_group(home, "home", PASSPHRASE, "alpha")


@pytest.fixture
def sealed(group: Group) -> bytes:
    return group.recovery_file.read_bytes()


def test_revoked_device_comes_back_with_new_keys_and_the_old_ones_stay_out(
    home: Home, group: Group, sealed: bytes
) -> None:
    signed = sign_revocation(read_known(group), RevokeRequest(device="alpha", reason="lost"))
    append_statements(group.folder, [signed.statement])
    back = recover(home, "home", sealed, PASSPHRASE, "alpha")
    assert (back.id, back.name) == (group.id, "home")
    assert back.device != group.device
    states = {member.device: member.state for member in trust_report(back).members}
    assert states == {back.device: "member", group.device: "revoked"}
    assert len(load_issuer(back).chain) == 1
    assert sorted(os.listdir(home.groups)) == [group.id]


def test_device_that_knows_nothing_brings_the_group_back_from_the_file(
    tmp_path: Path, group: Group, sealed: bytes
) -> None:
    elsewhere = open_home(tmp_path / "elsewhere")
    back = recover(elsewhere, "ours", sealed, PASSPHRASE, "beta")
    assert (back.id, back.name, back.device_name) == (group.id, "ours", "beta")
    assert back.root == group.root


def test_recovery_that_does_not_fit_changes_nothing(
    home: Home, group: Group, sealed: bytes, tmp_path: Path
) -> None:
    other = create_group(open_home(tmp_path / "other"), "home", PASSPHRASE, "x")
    with pytest.raises(TrustError, match="another group"):
        recover(home, "home", other.recovery_file.read_bytes(), PASSPHRASE, "alpha")
    with pytest.raises(TrustError, match="cannot be opened"):
        recover(home, "home", sealed, "wrong passphrase", "alpha")
    with lock_group(home, group.id), pytest.raises(PeerAlreadyRunning):
        recover(home, "home", sealed, PASSPHRASE, "alpha")
    assert load_group(home, "home") == group


def test_failure_in_the_middle_leaves_the_former_membership(
    home: Home, group: Group, sealed: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("p2ptrain.store.recovering.shutil.copy2", full)
    with pytest.raises(OSError, match="no space"):
        recover(home, "home", sealed, PASSPHRASE, "alpha")
    assert load_group(home, "home") == group
    assert os.listdir(home.groups) == [group.id]


def test_rotation_moves_this_device_and_only_the_new_file_opens_the_group(
    home: Home, group: Group, sealed: bytes
) -> None:
    made = sign_rotation(group, sealed, PASSPHRASE, NEW_PASSPHRASE)
    assert made.moved == ("alpha",)
    append_statements(group.folder, [made.rotation])
    moved = load_group(home, "home")
    assert moved.id == group.id
    assert moved.device == group.device
    assert moved.root == group.root
    chain = member_chain(moved.chain, gid=moved.id, roots=[made.rotation.new_root])
    assert chain.root == made.rotation.new_root
    assert moved.trusted == (made.rotation.new_root,)
    assert load_group(home, "home") == moved
    assert made.rotation.new_root.subject != group.root.subject
    with pytest.raises(TrustError, match="present root"):
        recover(home, "home", sealed, PASSPHRASE, "alpha")
    with pytest.raises(TrustError, match="present root"):
        sign_rotation(moved, sealed, PASSPHRASE, NEW_PASSPHRASE)
    back = recover(home, "home", made.recovery, NEW_PASSPHRASE, "alpha")
    assert back.trusted[0] == made.rotation.new_root
    assert back.id == group.id


def test_group_is_brought_back_after_two_rotations_from_the_last_file(
    home: Home, group: Group, sealed: bytes, tmp_path: Path
) -> None:
    first = sign_rotation(group, sealed, PASSPHRASE, NEW_PASSPHRASE)
    append_statements(group.folder, [first.rotation])
    second = sign_rotation(load_group(home, "home"), first.recovery, NEW_PASSPHRASE, PASSPHRASE)
    elsewhere = open_home(tmp_path / "elsewhere")
    back = recover(elsewhere, "home", second.recovery, PASSPHRASE, "beta")
    roots = read_roots(back.folder, back.root, back.id)
    assert (back.id, roots.current) == (group.id, second.rotation.new_root)
    assert len(roots.rotations) == 2
    # A device that missed both learns them from the file.
    again = recover(home, "home", second.recovery, PASSPHRASE, "alpha")
    assert again.trusted == (second.rotation.new_root,)


def test_revoked_members_are_not_moved_below_the_new_root(
    home: Home, group: Group, sealed: bytes
) -> None:
    signed = sign_revocation(read_known(group), RevokeRequest(device="alpha", reason="lost"))
    append_statements(group.folder, [signed.statement])
    assert sign_rotation(group, sealed, PASSPHRASE, NEW_PASSPHRASE).moved == ()


def test_short_new_passphrase_rotates_nothing(group: Group, sealed: bytes) -> None:
    with pytest.raises(ConfigError, match="passphrase"):
        sign_rotation(group, sealed, PASSPHRASE, "short")


def test_forgotten_group_leaves_no_key_behind(home: Home, group: Group) -> None:
    with lock_group(home, group.id), pytest.raises(PeerAlreadyRunning):
        forget(home, group)
    forget(home, group)
    assert known_groups(home) == ()
    assert os.listdir(home.groups) == []
    with pytest.raises(NotFound):
        load_group(home, "home")
    assert certs.group_id(group.root) == group.id
