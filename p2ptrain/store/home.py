"""P2PTRAIN_HOME: the directory that holds this device's groups and runs, and who may read it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from p2ptrain import limits
from p2ptrain.errors import ConfigError, PeerAlreadyRunning, TrustError
from p2ptrain.ids import GroupId
from p2ptrain.store.atomic import sync_directory, write_atomic

if os.name == "posix":
    import fcntl

HOME_FORMAT: Final = 1
DIRECTORY_MODE: Final = 0o700
KEY_MODE: Final = 0o600
_SOCKET_PATH_BYTES_MAX: Final = 107


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """An opened P2PTRAIN_HOME whose format and modes were checked."""

    path: Path

    @property
    def groups(self) -> Path:
        return self.path / "groups"

    @property
    def runs(self) -> Path:
        return self.path / "runs"


def default_home_path() -> Path:
    """P2PTRAIN_HOME, or ~/.p2ptrain."""
    return Path(os.environ.get("P2PTRAIN_HOME") or Path.home() / ".p2ptrain")


def open_home(path: Path | None = None) -> Home:
    """Open a home, making it if it does not exist.

    Raises:
        TrustError: others may read or own it; the message says what to do.
        ConfigError: written by another version, or the path is not usable.
    """
    home = Home(path=(path if path is not None else default_home_path()).absolute())
    try:
        for folder in (home.path, home.groups, home.runs):
            folder.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
            check_private(folder, DIRECTORY_MODE)
        _check_format(home.path / "format")
    except OSError as error:
        raise ConfigError(
            f"cannot use {home.path}: {error.strerror}",
            hint="set P2PTRAIN_HOME to a directory of your own",
        ) from error
    return home


def read_config(home: Home) -> dict[str, object]:
    """The settings in config.toml, unchecked; empty when there is no file.

    Raises:
        ConfigError: too large or not TOML.
    """
    path = home.path / "config.toml"
    if not path.exists():
        return {}
    try:
        return tomllib.loads(read_bounded(path, limits.CONFIG_BYTES_MAX).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}", hint="correct or remove it") from error


def read_bounded(path: Path, bytes_max: int) -> bytes:
    """Read a small file; ConfigError when it is larger than it can be."""
    with path.open("rb") as file:
        content = file.read(bytes_max + 1)
    if len(content) > bytes_max:
        raise ConfigError(f"{path} is larger than {bytes_max} bytes", hint="remove or replace it")
    return content


def check_private(path: Path, mode: int) -> None:
    """Refuse a file or directory that anybody else owns or may open, as ssh does.

    Raises:
        TrustError: names the path and the command that repairs it.
    """
    if os.name != "posix":
        return
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        raise TrustError(f"{path} is a symbolic link", hint=f"remove {path}")
    if status.st_uid != os.geteuid():
        raise TrustError(f"{path} belongs to another user", hint=f"chown {os.geteuid()} {path}")
    if stat.S_IMODE(status.st_mode) & ~mode:
        shown = stat.S_IMODE(status.st_mode)
        raise TrustError(f"{path} has mode {shown:04o}, too open", hint=f"chmod {mode:o} {path}")


def write_secret(path: Path, content: bytes) -> None:
    """Make a file only its owner may read, fsynced; FileExistsError when it exists."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    descriptor = os.open(path, flags, KEY_MODE)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    sync_directory(path.parent)


@contextlib.contextmanager
def lock_group(home: Home, gid: GroupId) -> Iterator[None]:
    """Hold a group of this home for one running peer; the lock ends with the process.

    Raises:
        PeerAlreadyRunning: another process holds it.
    """
    if os.name != "posix":
        yield
        return
    descriptor = os.open(home.groups / gid / "lock", os.O_RDWR | os.O_CREAT, KEY_MODE)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise PeerAlreadyRunning from error
        yield
    finally:
        os.close(descriptor)


def control_socket_path(home: Home, gid: GroupId) -> Path:
    """Where the peer of this group listens for commands; the directory exists and is private.

    The path is short, because a socket address holds 108 bytes, and differs for every home.

    Raises:
        TrustError: the directory belongs to somebody else.
        ConfigError: no directory short enough.
    """
    key = hashlib.sha256(f"{home.path}\0{gid}".encode()).hexdigest()[:16]
    directory = _runtime_directory()
    directory.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
    check_private(directory, DIRECTORY_MODE)
    path = directory / f"{key}.sock"
    if len(os.fsencode(path)) > _SOCKET_PATH_BYTES_MAX:
        raise ConfigError(
            f"the path of the control socket is too long: {path}",
            hint="set XDG_RUNTIME_DIR to a shorter directory",
        )
    return path


def _runtime_directory() -> Path:
    given = os.environ.get("XDG_RUNTIME_DIR")
    if given and Path(given).is_dir():
        return Path(given) / "p2ptrain"
    user = os.geteuid() if os.name == "posix" else 0
    return Path(tempfile.gettempdir()) / f"p2ptrain-{user}"


def _check_format(path: Path) -> None:
    if not path.exists():
        write_atomic(path, [f"{HOME_FORMAT}\n".encode()])
        return
    found = path.read_bytes()[:16].strip()
    if found != str(HOME_FORMAT).encode():
        raise ConfigError(
            f"{path.parent} has format {found.decode('ascii', 'replace')!r}, "
            f"this p2ptrain reads {HOME_FORMAT}",
            hint="update p2ptrain, or set P2PTRAIN_HOME to another directory",
        )
