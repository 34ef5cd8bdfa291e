"""Write a file whole or not at all, and on the disk before anybody is told."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


def write_atomic(path: Path, chunks: Iterable[ReadableBuffer], mode: int = 0o644) -> None:
    """Replace `path` by the joined chunks: afterwards it holds all of them, fsynced.

    A reader, or a crash at any moment, sees the old file or the new one. The file is created
    with `mode` whatever the umask, so that a key is never readable for an instant.

    Raises:
        OSError: the directory is missing, full or read-only; `path` is as it was.
    """
    temporary = temporary_for(path)
    try:
        _write_synced(temporary, chunks, mode)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


class FileWriter:
    """Writes a file as its bytes arrive; under its name it is whole, fsynced, or not there.

    The caller writes, then commits; `discard` is due whatever happened. Every call raises OSError
    when the disk refuses.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path, self._temporary = path, temporary_for(path)
        self._file = self._temporary.open("xb")

    def write(self, chunk: ReadableBuffer) -> None:
        """The next bytes."""
        self._file.write(chunk)

    def commit(self) -> None:
        """Give the file its name, durably."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self._path)
        sync_directory(self._path.parent)

    def discard(self) -> None:
        """Forget what was not committed."""
        with contextlib.suppress(OSError):
            self._file.close()
            self._temporary.unlink()


def temporary_for(path: Path) -> Path:
    """A name beside `path` that nothing else has."""
    return path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"


def is_temporary(path: Path) -> bool:
    """Whether a crash left this file behind."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def free_bytes(path: Path) -> int:
    """What can still be written where `path` is, or will be.

    Raises:
        OSError: no folder above it exists.
    """
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` durable, where the platform can do that."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_synced(path: Path, chunks: Iterable[ReadableBuffer], mode: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, mode)
    try:
        if os.name == "posix":
            os.fchmod(descriptor, mode)
        for view in _views(chunks):
            while view:
                view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _views(chunks: Iterable[ReadableBuffer]) -> Iterator[memoryview]:
    for chunk in chunks:
        view = memoryview(chunk)
        yield view.cast("B") if view.nbytes else memoryview(b"")
