"""What is derived from data once and mapped ever after: token ids, offsets of records, labels.

    cache/<digest>/<member>.bin    raw little-endian arrays
    cache/<digest>/facts.json      their dtypes and row shapes, and what else was found out

The digest is of everything that an entry follows from, so an entry is never out of date, and the
folder may be removed whenever no run uses it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from p2ptrain.errors import DataError
from p2ptrain.ids import Digest
from p2ptrain.store.atomic import sync_directory, write_atomic

Array = NDArray[Any]  # Any: whatever a reader keeps
_FACTS: Final = "facts.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheEntry:
    """The arrays of one entry, memory-mapped and read only, and its facts."""

    arrays: Mapping[str, Array]
    facts: Mapping[str, Any]  # Any: JSON


class CacheWriter:
    """Collects one entry; arrays grow by rows and are never held in memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._streams: dict[str, BinaryIO] = {}
        self._members: dict[str, dict[str, Any]] = {}
        self.facts: dict[str, Any] = {}

    def append(self, member: str, rows: Array) -> None:
        """Add rows to a member; all of them have one dtype and one shape."""
        if member not in self._members:
            self._streams[member] = (self._folder / f"{member}.bin").open("wb")
            shape = list(rows.shape[1:])
            self._members[member] = {"dtype": rows.dtype.str, "shape": shape, "rows": 0}
        self._members[member]["rows"] += len(rows)
        self._streams[member].write(np.ascontiguousarray(rows).tobytes())

    def finish(self) -> None:
        """Make everything durable; the entry's name comes after that."""
        for stream in self._streams.values():
            stream.flush()
            os.fsync(stream.fileno())
        document = {"members": self._members, "facts": self.facts}
        write_atomic(self._folder / _FACTS, [json.dumps(document).encode()])

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()


def cached(cache: Path, key: Digest, make: Callable[[CacheWriter], None]) -> CacheEntry:
    """The entry of this key, made by `make` when there is none.

    Raises:
        DataError: the disk is full or read-only; or whatever `make` finds wrong with the data.
    """
    folder = cache / key
    entry = _open(folder)
    if entry is not None:
        return entry
    with _writing(cache):
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        _make(folder, make)
    made = _open(folder)
    if made is None:
        raise DataError(f"{folder} was damaged while it was written", hint="remove that folder")
    return made


def _make(folder: Path, make: Callable[[CacheWriter], None]) -> None:
    temporary = folder.parent / f".{folder.name[:16]}.{secrets.token_hex(8)}.tmp"
    temporary.mkdir(mode=0o700)
    writer = CacheWriter(temporary)
    try:
        make(writer)
        writer.finish()
        writer.close()
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        sync_directory(folder.parent)
    finally:
        writer.close()
        shutil.rmtree(temporary, ignore_errors=True)


def _open(folder: Path) -> CacheEntry | None:
    """An entry whose files have the sizes that its facts say; None for anything else."""
    try:
        document = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        members = document["members"].items()
        arrays = {name: _mapped(folder / f"{name}.bin", member) for name, member in members}
        return CacheEntry(arrays=arrays, facts=document["facts"])
    except (OSError, ValueError, KeyError):
        return None


def _mapped(path: Path, member: Mapping[str, Any]) -> Array:  # Any: JSON
    dtype, shape = np.dtype(member["dtype"]), (member["rows"], *member["shape"])
    if path.stat().st_size != dtype.itemsize * int(np.prod(shape, dtype=np.int64)):
        raise ValueError(path.name)
    return (
        np.memmap(path, dtype, "r", shape=shape) if path.stat().st_size else np.empty(shape, dtype)
    )


@contextlib.contextmanager
def _writing(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot keep what was read from the data in {cache}: {error.strerror}",
            hint="make room, or set P2PTRAIN_HOME to a place with room",
        ) from error
