"""Samples that are arrays already: `.npz`, `.npy` and folders of them, memory-mapped.

One array per data port, named after it, and one called `labels`; the first axis counts records.
Members of an `.npz` that are stored as they are get mapped where they lie in it; compressed ones
cannot be, so they are unpacked into the cache once.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray

from p2ptrain.bundle.manifest import Manifest, Port
from p2ptrain.data.cache import CacheWriter, cached
from p2ptrain.data.files import SourceFile, digest_of, inspect_file, reading
from p2ptrain.data.labels import LabelRule, listed
from p2ptrain.data.ports import FILLED_PORTS
from p2ptrain.data.records import Wanted
from p2ptrain.errors import DataError
from p2ptrain.ids import Digest
from p2ptrain.training.feed import Feed

Array = NDArray[Any]  # Any: what the file says; checked against the ports
LABELS: Final = "labels"
ARRAY_SUFFIXES: Final = frozenset({".npy", ".npz"})
_CHUNK_BYTES: Final = 1 << 24
_LOCAL_HEADER: Final = struct.Struct("<4s5H3L2H")


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedArray:
    """An array and where it comes from, for messages."""

    place: str
    array: Array

    def wrong(self, what: str, hint: str | None = None) -> DataError:
        """An error that names the array."""
        return DataError(f"{self.place}: {what}", hint=hint or "correct the array")


class ArrayRecords:
    """Rows of checked arrays."""

    def __init__(
        self,
        *,
        inputs: tuple[NamedArray, ...],
        labels: NamedArray,
        files: tuple[SourceFile, ...],
        identity: Digest,
        manifest: Manifest,
        rule: LabelRule,
    ) -> None:
        self._inputs, self._labels, self._files = inputs, labels, files
        self._manifest, self._rule = manifest, rule
        self.identity = identity
        self.class_names = rule.class_names
        classes = f", {manifest.data.classes} classes" if rule.is_class else ""
        self.summary = f"{self.count} records{classes}"

    @property
    def count(self) -> int:
        return len(self._labels.array)

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The data arrays as they lie in memory or on the disk, in port order, then labels."""
        return (*(each.array for each in self._inputs), self._labels.array)

    def feed(self, indices: Sequence[int]) -> Feed:
        """As `Records.feed`."""
        for file in self._files:
            file.check()
        rows = list(indices)
        inputs = tuple(
            self._shaped(each.array[rows], port)
            for each, port in zip(self._inputs, self._manifest.data_ports, strict=True)
        )
        port = self._manifest.labels_port
        labels = self._labels.array[rows]
        if _needs_encoding(self._labels.array, port, self._manifest):
            labels = np.stack([self._rule.sample(int(label)) for label in labels])
        return Feed(inputs=inputs, labels=self._shaped(labels, port))

    def _shaped(self, rows: Array, port: Port) -> Array:
        shape = self._manifest.shape(port.value, batch=len(rows))
        return np.ascontiguousarray(np.asarray(rows).reshape(shape), port.value.dtype)


def open_arrays(path: Path, wanted: Wanted) -> ArrayRecords:
    """Map the arrays of a path and check every value once.

    Raises:
        DataError: a missing array, one that does not fit its port, NaN, a label out of range.
    """
    files, arrays = _find(path, wanted)
    ports = [port.value.name for port in wanted.manifest.data_ports]
    missing = [name for name in (*ports, LABELS) if name not in arrays]
    if missing:
        raise DataError(
            f"{path}: there is no array {listed(missing)}; it has: {listed(arrays)}",
            hint=f"this model wants: {', '.join((*ports, LABELS))}",
        )
    content = digest_of({name: str(file.digest) for name, file in files.items()})
    return records_of(
        inputs=tuple(arrays[name] for name in ports),
        labels=arrays[LABELS],
        files=tuple(files.values()),
        identity=digest_of({"arrays": 1, "content": content, "ports": ports}),
        wanted=wanted,
    )


def records_of(
    *,
    inputs: tuple[NamedArray, ...],
    labels: NamedArray,
    files: tuple[SourceFile, ...],
    identity: Digest,
    wanted: Wanted,
) -> ArrayRecords:
    """Records of arrays that fit their ports; DataError as `open_arrays`."""
    manifest = wanted.manifest
    for each, port in zip(inputs, manifest.data_ports, strict=True):
        _check_port(each, port, manifest)
        is_tokens = manifest.data.vocabulary and port.value.name not in FILLED_PORTS
        _check_values(each, port, manifest.data.vocabulary if is_tokens else 0, None)
    _check_labels(labels, manifest)
    lengths = {each.place: len(each.array) for each in (*inputs, labels)}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{place} has {length}" for place, length in lengths.items())
        raise DataError(f"the arrays differ in their number of records: {said}")
    return ArrayRecords(
        inputs=inputs,
        labels=labels,
        files=files,
        identity=identity,
        manifest=manifest,
        rule=LabelRule(manifest, wanted.class_names),
    )


def _find(path: Path, wanted: Wanted) -> tuple[dict[str, SourceFile], dict[str, NamedArray]]:
    """The files of a path and its arrays by name."""
    if path.is_dir():
        paths = {each.stem: each for each in sorted(path.glob("*.npy"))}
    elif path.suffix.lower() == ".npz":
        file = inspect_file(path)
        return {path.name: file}, _members(file, wanted.cache)
    else:
        ports = wanted.manifest.data_ports
        if len(ports) > 1 or wanted.options.labels is None:
            raise DataError(
                f"{path} holds one array; this model wants"
                f" {', '.join(port.value.name for port in ports)} and labels",
                hint="give labels with --labels (and --heldout-labels), or an .npz with all arrays",
            )
        paths = {ports[0].value.name: path, LABELS: Path(wanted.options.labels)}
    files = {name: inspect_file(each) for name, each in paths.items()}
    return files, {name: _map_file(each) for name, each in paths.items()}


def _map_file(path: Path) -> NamedArray:
    try:
        with reading(path):
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise DataError(
            f"{path} is not an .npy array that can be mapped: {error}",
            hint="save it with numpy.save, without Python objects",
        ) from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path} is an archive", hint="give its name the ending .npz")
    return NamedArray(place=str(path), array=array)


def _members(file: SourceFile, cache: Path) -> dict[str, NamedArray]:
    try:
        with reading(file.path), zipfile.ZipFile(file.path) as archive:
            return {
                info.filename.removesuffix(".npy"): NamedArray(
                    place=f"{file.path}, array {info.filename.removesuffix('.npy')}",
                    array=_member(archive, info, file, cache),
                )
                for info in archive.infolist()
            }
    except (zipfile.BadZipFile, ValueError, EOFError, struct.error) as error:
        raise DataError(
            f"{file.path} is not an .npz archive of plain arrays: {error}",
            hint="save it with numpy.savez, without Python objects",
        ) from error


def _member(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, file: SourceFile, cache: Path
) -> Array:
    with archive.open(info) as stream:
        shape, is_fortran, dtype = _array_header(stream)
        offset = stream.tell()
        if not shape or dtype.hasobject or is_fortran:
            raise ValueError(f"{info.filename} is a scalar, of objects or in Fortran order")
        if info.compress_type != zipfile.ZIP_STORED:
            key = digest_of({"npz": file.digest, "member": info.filename})

            def make(writer: CacheWriter) -> None:
                _unpack(stream, writer, shape, dtype)

            return cached(cache, key, make).arrays["rows"]
    with file.path.open("rb") as raw:
        raw.seek(info.header_offset)
        *_, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(raw.read(_LOCAL_HEADER.size))
    start = info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes + offset
    if 0 in shape:
        return np.empty(shape, dtype)
    return np.memmap(file.path, dtype, "r", offset=start, shape=shape)


def _array_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:  # Any: any
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream)
    raise ValueError(f"array format {version} is unknown")


def _unpack(
    stream: IO[bytes], writer: CacheWriter, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> None:
    writer.append("rows", np.empty((0, *shape[1:]), dtype))
    row_bytes = max(int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize, 1)
    rows_at_once, left = max(_CHUNK_BYTES // row_bytes, 1), shape[0]
    while left:
        rows = min(rows_at_once, left)
        content = stream.read(rows * row_bytes)
        writer.append("rows", np.frombuffer(content, dtype).reshape(rows, *shape[1:]))
        left -= rows


def _check_port(each: NamedArray, port: Port, manifest: Manifest) -> None:
    """Refuse an array whose dtype or row shape is not the port's."""
    name, dtype = port.value.name, np.dtype(port.value.dtype)
    wanted = manifest.shape(port.value, batch=1)[1:]
    found = each.array.shape[1:]
    allowed = "fiub" if dtype.kind == "f" else "iub"
    if each.array.ndim == 0 or not _fits(found, wanted):
        raise each.wrong(f"records of shape {found}; {name!r} wants {wanted}")
    if each.array.dtype.kind not in allowed:
        raise each.wrong(f"dtype {each.array.dtype}; {name!r} wants {dtype}")


def _fits(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return found == wanted or (found, wanted) in (((), (1,)), ((1,), ()))


def _needs_encoding(labels: Array, port: Port, manifest: Manifest) -> bool:
    """Class numbers for a port that wants one value per class."""
    wanted = manifest.shape(port.value, batch=1)[1:]
    return labels.ndim == 1 and wanted == (manifest.data.classes,) and wanted != (1,)


def _check_labels(labels: NamedArray, manifest: Manifest) -> None:
    port, data = manifest.labels_port, manifest.data
    if _needs_encoding(labels.array, port, manifest):
        if labels.array.dtype.kind not in "iu":
            raise labels.wrong(f"dtype {labels.array.dtype}; classes are whole numbers")
        _check_values(labels, port, data.classes, None)
        return
    _check_port(labels, port, manifest)
    is_class = np.dtype(port.value.dtype).kind in "iu"
    ignored = manifest.loss.ignore_index
    _check_values(labels, port, (data.classes or data.vocabulary) if is_class else 0, ignored)


def _check_values(each: NamedArray, port: Port, below: int, ignored: int | None) -> None:
    """Read an array once: finite after the cast to the port's dtype, and within 0 to `below`."""
    array, dtype = each.array, np.dtype(port.value.dtype)
    row_bytes = max(array.nbytes // max(len(array), 1), 1)
    rows_at_once = max(_CHUNK_BYTES // row_bytes, 1)
    for start in range(0, len(array), rows_at_once):
        rows = np.asarray(array[start : start + rows_at_once])
        with np.errstate(over="ignore"):
            cast = rows.astype(dtype)
        bad = ~np.isfinite(cast) if dtype.kind == "f" else cast != rows
        if below:
            outside = (cast < 0) | (cast >= below)
            bad |= outside if ignored is None else outside & (cast != ignored)
        if bad.any():
            _refuse_row(each, start, rows, bad, below)


def _refuse_row(each: NamedArray, start: int, rows: Array, bad: Array, below: int) -> None:
    place = np.unravel_index(int(bad.argmax()), bad.shape)
    value = rows[place]
    if below:
        raise each.wrong(
            f"record {start + place[0] + 1} has {value}, which is out of range: 0 to {below - 1}"
        )
    raise each.wrong(f"record {start + place[0] + 1} has {value}, which the model cannot take")
