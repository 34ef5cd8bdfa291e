"""The holder's side of a copy of a run's data: files that arrive part by part.

    runs/<run id>/data/training/...      one folder per place, the files under their own names
    runs/<run id>/data/incoming/<digest> a file until its last part is here
    runs/<run id>/bundle/                the bundle's tokenizer and weights

A part counts when its digest was checked, so what broke off goes on where it stopped, also in
another process. Everything here blocks.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from p2ptrain import limits
from p2ptrain.data.files import inspect_file
from p2ptrain.data.options import DataOptions
from p2ptrain.data.portable import DataFile, DataManifest, DataPlace
from p2ptrain.errors import DataError
from p2ptrain.store.atomic import free_bytes, sync_directory

FOLDER: Final = "data"
_INCOMING: Final = "incoming"
_HINT: Final = "make room on this device's disk, or keep the data at home with --keep-data-here"


@dataclass(frozen=True, slots=True, kw_only=True)
class DataPaths:
    """Where the copy lies, as `open_samples` takes it."""

    data: str
    heldout: str | None
    options: DataOptions


class ArrivingData:
    """One run's copy on this device."""

    def __init__(self, run_path: Path, manifest: DataManifest) -> None:
        self._path, self._bundle = run_path / FOLDER, run_path / "bundle"
        self._manifest = manifest

    def missing(self) -> tuple[ArrivingFile, ...]:
        """The files that are not here yet, once it is sure that they fit; what is here is hashed.

        Raises:
            DataError: the disk has no room for the rest, or refuses.
        """
        wanted = [
            ArrivingFile(self._target(place, file), self._path / _INCOMING / file.digest, file)
            for place in self._manifest.places
            for file in place.files
        ]
        with storing():
            left = tuple(file for file in wanted if not file.is_whole())
            needed = sum(file.left_bytes() for file in left)
            free = free_bytes(self._path)
        if needed + limits.DISK_RESERVE_BYTES > free and left:
            raise DataError(
                f"the second copy of the data needs {needed >> 20} MiB here; {free >> 20} MiB are "
                f"free, of which {limits.DISK_RESERVE_BYTES >> 20} MiB stay so",
                hint=_HINT,
            )
        return left

    def paths(self) -> DataPaths:
        """Remove what belongs to no place any more; then where the whole copy is."""
        wanted = {
            self._target(place, file) for place in self._manifest.places for file in place.files
        }
        with storing():
            if self._path.is_dir():
                for path in [p for p in _everything(self._path) if p not in wanted]:
                    path.unlink()
        places = {place.role: self._given(place) for place in self._manifest.places}
        return DataPaths(
            data=places["training"],
            heldout=places.get("heldout"),
            options=DataOptions(
                text_field=self._manifest.text_field,
                label_field=self._manifest.label_field,
                labels=places.get("labels"),
                heldout_labels=places.get("heldout_labels"),
            ),
        )

    def forget(self) -> None:
        """The run is over, or its data is elsewhere: remove the copy."""
        shutil.rmtree(self._path, ignore_errors=True)

    def _root(self, place: DataPlace) -> Path:
        return self._bundle if place.role == "bundle" else self._path / place.role

    def _target(self, place: DataPlace, file: DataFile) -> Path:
        return self._root(place) / file.name

    def _given(self, place: DataPlace) -> str:
        root = self._root(place)
        return str(root if place.is_folder or not place.files else root / place.files[0].name)


class ArrivingFile:
    """One file; `begin`, write the parts that it names, `finish`, and `close` in any case."""

    def __init__(self, target: Path, incoming: Path, file: DataFile) -> None:
        self.target, self.file = target, file
        self._incoming = incoming
        self._stream: BinaryIO | None = None

    def is_whole(self) -> bool:
        """Whether exactly this file lies at its place."""
        with contextlib.suppress(DataError):
            has_size = self.target.is_file() and self.target.stat().st_size == self.file.bytes
            return has_size and inspect_file(self.target).digest == self.file.digest
        return False

    def left_bytes(self) -> int:
        """What has still to arrive, at most."""
        here = self._incoming.stat().st_size if self._incoming.is_file() else 0
        return max(self.file.bytes - here, 0)

    def begin(self) -> int:
        """Open the file after its last sound part; how many parts are there.

        Raises:
            DataError: the disk refuses, here and in `finish`.
        """
        with storing():
            self._incoming.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._stream = self._incoming.open("r+b" if self._incoming.exists() else "w+b")
            sound = 0
            for digest, size in self.file.blobs:
                if hashlib.sha256(self._stream.read(size)).hexdigest() != digest:
                    break
                sound += 1
            self.keep(sound)
        return sound

    def keep(self, parts: int) -> None:
        """Cut off what came after so many parts; the next bytes follow them."""
        end = sum(size for _, size in self.file.blobs[:parts])
        self._open().truncate(end)
        self._open().seek(end)

    def write(self, chunk: bytes) -> None:
        """The next bytes; OSError when the disk refuses."""
        self._open().write(chunk)

    def finish(self) -> None:
        """Every part is here and was checked: make the file durable in its place."""
        with storing():
            stream = self._open()
            stream.flush()
            os.fsync(stream.fileno())
            self.close()
            self.target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.replace(self._incoming, self.target)
            sync_directory(self.target.parent)

    def close(self) -> None:
        """Parts that are whole stay for the next attempt."""
        if self._stream is not None:
            with contextlib.suppress(OSError):  # what was not written is fetched again
                self._stream.close()
        self._stream = None

    def _open(self) -> BinaryIO:
        if self._stream is None:
            raise OSError("the file is not open")
        return self._stream


@contextlib.contextmanager
def storing() -> Iterator[None]:
    """Turn a disk that refuses into DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"the second copy of the data cannot be stored: {error.strerror or error}", hint=_HINT
        ) from error


def _everything(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if not path.is_dir() or path.is_symlink())
