"""Groups on disk: founded, loaded, refused when loose, invites used once."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from p2ptrain.errors import ConfigError, NotFound, TrustError
from p2ptrain.store import groups
from p2ptrain.store.groups import (
    Group,
    claim_invite,
    create_group,
    create_invite,
    find_invite,
    known_groups,
    load_addresses,
    load_group,
    load_issuer,
    save_addresses,
)
from p2ptrain.store.home import Home, open_home
from p2ptrain.trust import certificates as certs
from p2ptrain.trust.invite import read_invite
from p2ptrain.trust.recovery import open_root_key

PASSPHRASE = "correct horse"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return open_home(tmp_path / "home")


@pytest.fixture
def group(home: Home) -> Group:
    return create_group(home, "home", PASSPHRASE, "alpha")


def test_founded_group_loads_by_name_and_by_id(home: Home, group: Group) -> None:
    assert load_group(home, "home") == group
    assert load_group(home, group.id) == group
    assert (group.name, group.device_name) == ("home", "alpha")
    assert known_groups(home) == ("home",)


def test_root_key_is_in_the_recovery_file_and_nowhere_else(group: Group) -> None:
    root_key = open_root_key(group.recovery_file.read_bytes(), PASSPHRASE)
    assert root_key.public_key() == group.root.public_key()
    raw = root_key.private_bytes_raw()
    pem = certs.key_to_pem(root_key)
    for path in group.folder.rglob("*"):
        if path.is_file():
            assert raw not in path.read_bytes()
            assert pem not in path.read_bytes()


def test_keys_are_private_and_the_folder_too(group: Group) -> None:
    for name in ("device.key", "issuer.key", "recovery.pem"):
        assert (group.folder / name).stat().st_mode & 0o777 == 0o600
    assert group.folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", ["device.key", "issuer.key"])
def test_world_readable_key_is_refused_with_the_repair(home: Home, group: Group, name: str) -> None:
    path = group.folder / name
    path.chmod(0o644)
    with pytest.raises(TrustError, match=name) as caught:
        load_group(home, "home")
    assert caught.value.hint == f"chmod 600 {path}"
    path.chmod(0o600)
    assert load_group(home, "home") == group


def test_unknown_group_lists_the_known_ones(home: Home, group: Group) -> None:
    with pytest.raises(NotFound, match="knows: home"):
        load_group(home, "work")


def test_taken_or_bad_names_and_short_passphrase_make_nothing(home: Home, group: Group) -> None:
    attempts = [("home", PASSPHRASE, "a"), ("a/b", PASSPHRASE, "a"), ("x", PASSPHRASE, "\n")]
    for name, passphrase, device in [*attempts, ("y", "short", "a")]:
        with pytest.raises(ConfigError):
            create_group(home, name, passphrase, device)
    assert os.listdir(home.groups) == [group.id]


def test_damaged_or_mixed_up_files_are_refused(home: Home, group: Group) -> None:
    other = create_group(home, "other", PASSPHRASE, "alpha")
    for name in ("group.crt", "chain.pem", "device.key"):
        original = (group.folder / name).read_bytes()
        for content in (b"", (other.folder / name).read_bytes()):
            (group.folder / name).write_bytes(content)
            with pytest.raises(TrustError):
                load_group(home, "home")
        (group.folder / name).unlink()
        with pytest.raises(TrustError, match="missing"):
            load_group(home, "home")
        (group.folder / name).write_bytes(original)
        (group.folder / name).chmod(0o600)
    assert load_group(home, "home") == group


def test_leaf_is_renewed_after_two_thirds_of_its_life(
    home: Home, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = certs.renew_at_s(group.chain[0]) + 1
    monkeypatch.setattr(groups.time, "time", lambda: later)
    renewed = load_group(home, "home")
    assert renewed.device == group.device
    assert renewed.chain[0].not_valid_after_utc > group.chain[0].not_valid_after_utc
    assert load_group(home, "home") == renewed


def test_member_without_issuer_key_cannot_invite(group: Group) -> None:
    (group.folder / "issuer.key").unlink()
    with pytest.raises(TrustError, match="may not admit"):
        create_invite(group, ["10.0.0.1:1"], 60)
    with pytest.raises(TrustError, match="may not admit"):
        load_issuer(group)


def test_invite_is_found_and_used_once(group: Group) -> None:
    invite = read_invite(create_invite(group, ["10.0.0.1:1"], 60))
    assert invite.root_hash == certs.root_hash(group.root)
    pending = find_invite(group, invite.id)
    assert pending is not None
    assert bytes.fromhex(pending.shared_key) == invite.shared_key
    assert claim_invite(group, invite.id)
    assert not claim_invite(group, invite.id)
    assert find_invite(group, invite.id) is None


def test_invite_id_is_never_a_path(group: Group) -> None:
    for hostile in ("../name", "aa", "..", ""):
        with pytest.raises((TrustError, ValueError)):
            find_invite(group, hostile)


def test_unused_invites_are_bounded_and_expired_ones_dropped(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups.limits, "INVITES_PENDING_MAX", 2)
    first = read_invite(create_invite(group, [], 60))
    create_invite(group, [], 60)
    with pytest.raises(ConfigError, match="too many"):
        create_invite(group, [], 60)
    (group.folder / "invites" / f"{first.id}.json").write_text("half wri")
    create_invite(group, [], 60)
    later = time.time() + 61
    monkeypatch.setattr(groups.time, "time", lambda: later)
    create_invite(group, [], 60)
    assert len(list((group.folder / "invites").iterdir())) == 1


def test_invite_with_bad_addresses_is_refused(group: Group) -> None:
    with pytest.raises(ConfigError, match="cannot invite"):
        create_invite(group, ["x" * 300], 60)


def test_addresses_are_remembered_up_to_a_bound(group: Group) -> None:
    assert load_addresses(group) == {}
    save_addresses(group, {f"10.0.0.{n}:1": "dev" for n in range(groups.REMEMBERED_MAX + 5)})
    loaded = load_addresses(group)
    assert len(loaded) == groups.REMEMBERED_MAX
    assert "10.0.0.4:1" not in loaded
    for content in ("", "[]", '{"addresses": 1}', "{"):
        (group.folder / "addresses.json").write_text(content)
        assert load_addresses(group) == {}
