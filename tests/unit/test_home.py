"""The home directory: private, versioned, locked per group, with a short socket path."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from p2ptrain.errors import ConfigError, PeerAlreadyRunning, TrustError
from p2ptrain.ids import GroupId
from p2ptrain.store.home import (
    Home,
    check_private,
    control_socket_path,
    default_home_path,
    lock_group,
    open_home,
    read_config,
    write_secret,
)

GID = GroupId("a" * 16)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return open_home(tmp_path / "home")


def test_new_home_is_private_and_says_its_format(home: Home) -> None:
    for folder in (home.path, home.groups, home.runs):
        assert folder.stat().st_mode & 0o777 == 0o700
    assert (home.path / "format").read_text() == "1\n"
    assert open_home(home.path) == home


def test_home_is_taken_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("P2PTRAIN_HOME", str(tmp_path / "x"))
    assert default_home_path() == tmp_path / "x"
    monkeypatch.delenv("P2PTRAIN_HOME")
    assert default_home_path().name == ".p2ptrain"


def test_home_of_another_version_is_refused(home: Home) -> None:
    (home.path / "format").write_text("2\n")
    with pytest.raises(ConfigError, match="format '2'"):
        open_home(home.path)


def test_home_that_others_may_read_is_refused_with_the_repair(home: Home) -> None:
    home.groups.chmod(0o750)
    with pytest.raises(TrustError, match="0750") as caught:
        open_home(home.path)
    assert caught.value.hint == f"chmod 700 {home.groups}"


def test_home_that_is_a_file_or_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot use"):
        open_home(tmp_path / "file")
    real = open_home(tmp_path / "real")
    (tmp_path / "link").symlink_to(real.path)
    with pytest.raises(TrustError, match="symbolic link"):
        open_home(tmp_path / "link")


def test_file_of_another_owner_is_refused(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(TrustError, match="another user"):
        check_private(home.path, 0o700)


def test_config_is_read_as_toml(home: Home) -> None:
    assert read_config(home) == {}
    (home.path / "config.toml").write_text("port = 7000\n")
    assert read_config(home) == {"port": 7000}
    for content in ("port = ", "#" * 70_000):
        (home.path / "config.toml").write_text(content)
        with pytest.raises(ConfigError):
            read_config(home)


def test_secret_is_private_and_never_overwritten(home: Home) -> None:
    previous = os.umask(0)
    try:
        write_secret(home.path / "key", b"secret")
    finally:
        os.umask(previous)
    assert (home.path / "key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        write_secret(home.path / "key", b"other")


def test_second_peer_of_a_group_is_refused_until_the_first_ends(home: Home) -> None:
    (home.groups / GID).mkdir()
    with lock_group(home, GID), pytest.raises(PeerAlreadyRunning), lock_group(home, GID):
        pass
    with lock_group(home, GID):
        pass


def test_socket_path_is_short_private_and_differs_per_home_and_group(
    tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    other = open_home(tmp_path / "other")
    paths = {
        control_socket_path(home, GID),
        control_socket_path(other, GID),
        control_socket_path(home, GroupId("b" * 16)),
    }
    assert len(paths) == 3
    assert all(path.parent.stat().st_mode & 0o777 == 0o700 for path in paths)
    assert control_socket_path(home, GID) in paths


def test_socket_directory_of_others_or_too_long_is_refused(
    tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "p2ptrain").mkdir()
    (tmp_path / "p2ptrain").chmod(0o777)
    with pytest.raises(TrustError, match="too open"):
        control_socket_path(home, GID)
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    with pytest.raises(ConfigError, match="too long"):
        control_socket_path(home, GID)
