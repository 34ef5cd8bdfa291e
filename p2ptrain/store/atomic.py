"""Write a file whole or not at all, and on the disk before anybody is told."""

from __future__ import annotations

import contextlib
import os
import secrets
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
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"
    try:
        _write_synced(temporary, chunks, mode)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


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
