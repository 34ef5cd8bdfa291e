"""Files of data: what is in them by hash, whether they have changed, and errors as sentences."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from p2ptrain.errors import DataError
from p2ptrain.ids import Digest

_CHUNK_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """A file as it was when it was hashed."""

    path: Path
    bytes: int
    modified_ns: int
    digest: Digest

    def check(self) -> None:
        """DataError when the file is gone or was written to since; a mapped page of a file that
        has shrunk would end the process instead."""
        with reading(self.path):
            status = self.path.stat()
        if (status.st_size, status.st_mtime_ns) != (self.bytes, self.modified_ns):
            raise DataError(
                f"{self.path} has changed while it is in use",
                hint="restore the file and resume, or start a new run",
            )

    def mapped(self) -> NDArray[np.uint8]:
        """The content as a read-only array in mapped memory; the file is not empty."""
        with reading(self.path):
            return np.memmap(self.path, np.uint8, "r")


def inspect_file(path: Path) -> SourceFile:
    """Hash a file; DataError when it cannot be read or holds nothing."""
    digest = hashlib.sha256()
    with reading(path), path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
        status = os.fstat(stream.fileno())
    if status.st_size == 0:
        raise DataError(f"{path} is empty")
    return SourceFile(
        path=path,
        bytes=status.st_size,
        modified_ns=status.st_mtime_ns,
        digest=Digest(digest.hexdigest()),
    )


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the system's errors into DataError that names the file."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: {(error.strerror or str(error)).lower()}") from error


def digest_of(description: Mapping[str, object]) -> Digest:
    """sha256 of a description in canonical JSON."""
    plain = json.dumps(description, sort_keys=True, separators=(",", ":"))
    return Digest(hashlib.sha256(plain.encode()).hexdigest())


def digest_of_files(files: Iterable[tuple[str, Digest]]) -> Digest:
    """sha256 over names and contents, in the order given."""
    total = hashlib.sha256()
    for name, digest in files:
        total.update(f"{digest} {len(name)} {name}\n".encode(errors="surrogateescape"))
    return Digest(total.hexdigest())


def walk(folder: Path) -> Iterator[Path]:
    """Every file below a folder that is not hidden, sorted by name at each level.

    Links to files are followed, links to folders are not: they may lead back here.
    """
    with reading(folder):
        entries = sorted(folder.iterdir())
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and not entry.is_symlink():
            yield from walk(entry)
        elif entry.is_file():
            yield entry
