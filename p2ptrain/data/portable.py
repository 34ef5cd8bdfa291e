"""A run's data as files that a second member can copy: what there is, and reading it in parts.

Names are relative and chosen by whoever owns the data, so the receiver checks all of them before
it writes anything. Files are cut into parts, each a blob of its own: what broke off goes on, and
neither side holds more than a part in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final, Literal

from p2ptrain import limits
from p2ptrain.bundle.manifest import Manifest
from p2ptrain.data.files import SourceFile, reading
from p2ptrain.data.opening import data_files
from p2ptrain.data.options import DataOptions
from p2ptrain.errors import DataError, RemoteProtocolError
from p2ptrain.ids import Digest, is_digest
from p2ptrain.store.bundles import TOKENIZER_FILE
from p2ptrain.store.weights import WEIGHTS_FILE
from p2ptrain.wire.codec import from_plain, to_plain

FORMAT: Final = "p2ptrain-data"
VERSION: Final = 1
Role = Literal["training", "heldout", "labels", "heldout_labels", "bundle"]
ROLES: Final = ("training", "heldout", "labels", "heldout_labels", "bundle")
FOLDERS: Final = ("training", "heldout")
"""Roles that may be a folder of files; the others are single files, of the bundle at most two."""
_BUNDLE_FILES: Final = frozenset({TOKENIZER_FILE, WEIGHTS_FILE})
_FORBIDDEN: Final = "\\:" if os.name == "nt" else "\\"
_NAME_BYTES_MAX: Final = 255
"""Of one file or folder, on every common file system."""
_READ_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """One file, named relative to its place, with `/` between folders."""

    name: str
    bytes: int
    digest: str
    parts: tuple[str, ...] = ()
    """Digests of its parts of `DATA_PART_BYTES` each, the last one shorter; empty: it is one."""

    @property
    def blobs(self) -> tuple[tuple[Digest, int], ...]:
        """Digest and size of every part, in order."""
        size = limits.DATA_PART_BYTES
        digests = self.parts or (self.digest,)
        return tuple(
            (Digest(digest), min(size, self.bytes - index * size))
            for index, digest in enumerate(digests)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataPlace:
    """The files of one option of `train`, or of the bundle."""

    role: str
    is_folder: bool
    files: tuple[DataFile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataManifest:
    """Everything that a second holder needs beside the bundle's graphs and the contract."""

    places: tuple[DataPlace, ...]
    text_field: str | None
    label_field: str | None

    @property
    def total_bytes(self) -> int:
        """Of all files."""
        return sum(file.bytes for place in self.places for file in place.files)

    @property
    def file_count(self) -> int:
        """Of all places."""
        return sum(len(place.files) for place in self.places)

    def to_bytes(self) -> bytes:
        """JSON; file names that are not UTF-8 are escaped."""
        document = {"format": FORMAT, "version": VERSION, **to_plain(self)}
        return json.dumps(document, separators=(",", ":")).encode()


@dataclass(slots=True)
class DataSource:
    """The owner's side: which file each part is in. Reading blocks."""

    manifest: DataManifest
    _parts: dict[Digest, tuple[SourceFile, int, int]] = field(default_factory=dict)

    def read(self, digest: Digest) -> bytes | None:
        """One part; None when it is none of ours, or its file is not any more what it was."""
        if digest not in self._parts:
            return None
        file, offset, size = self._parts[digest]
        try:
            file.check()
            with reading(file.path), file.path.open("rb") as stream:
                stream.seek(offset)
                content = stream.read(size)
        except DataError:
            return None
        return content if len(content) == size else None


def describe_data(
    model: Manifest, data: str, heldout: str | None, options: DataOptions, bundle: Path
) -> DataSource:
    """Hash every file that a run's data consists of; blocking, one pass over all of it.

    Args:
        model: Says what kind of data the paths hold.
        data: As given to `train`.
        heldout: As given to `train`.
        options: As given to `train`.
        bundle: The bundle's folder, for its weights and its tokenizer.

    Raises:
        DataError: a file cannot be read or is empty, or there are too many for a copy.
    """
    found = DataSource(DataManifest(places=(), text_field=None, label_field=None))
    given: tuple[tuple[Role, str | None], ...] = (
        ("training", data),
        ("heldout", heldout),
        ("labels", options.labels),
        ("heldout_labels", options.heldout_labels),
    )
    places = []
    for role, path in given:
        if path is not None:
            root = Path(path)
            files = data_files(root, model.data.kind)
            places.append(_place(role, root, files, found))
    needed = [bundle / TOKENIZER_FILE] if model.data.tokenizer == TOKENIZER_FILE else []
    needed += [bundle / WEIGHTS_FILE] if any(tensor.digest for tensor in model.tensors) else []
    places.append(_place("bundle", bundle, needed, found))
    found.manifest = DataManifest(
        places=tuple(places), text_field=options.text_field, label_field=options.label_field
    )
    if found.manifest.file_count > limits.DATA_FILES_MAX:
        raise DataError(
            f"{data} has {found.manifest.file_count} files, more than the "
            f"{limits.DATA_FILES_MAX} of which a second member can hold a copy",
            hint="pack them into .npz arrays, or keep the data here with --keep-data-here",
        )
    return found


def parse_data_manifest(content: bytes) -> DataManifest:
    """Read what another member says about its data.

    Raises:
        RemoteProtocolError: damaged, of an unknown version, or with a name, size or number that
            no data has; nothing is to be fetched.
    """
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RemoteProtocolError(f"the list of the run's data is damaged: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise RemoteProtocolError("the list of the run's data is something else")
    if document.get("version") != VERSION:
        raise RemoteProtocolError(
            f"the list of the run's data has version {document.get('version')!r}, not {VERSION}",
            hint="update p2ptrain",
        )
    manifest = from_plain(DataManifest, document)
    problem = _problem(manifest)
    if problem is not None:
        raise RemoteProtocolError(f"the list of the run's data is refused: {problem}")
    return manifest


def _problem(manifest: DataManifest) -> str | None:
    roles = [place.role for place in manifest.places]
    if len(set(roles)) != len(roles) or not set(roles) <= set(ROLES) or "training" not in roles:
        return f"places {', '.join(roles)!r:.100}"
    if manifest.file_count > limits.DATA_FILES_MAX:
        return f"{manifest.file_count} files"
    for place in manifest.places:
        names = [file.name for file in place.files]
        problem = _name_problem(names) or _shape_problem(place)
        if problem is not None:
            return problem
        for file in place.files:
            if not _is_consistent(file):
                return f"{file.name!r:.100} of {file.bytes} bytes in {len(file.parts)} parts"
    if manifest.total_bytes > limits.DATA_COPY_BYTES_MAX:
        return f"{manifest.total_bytes} bytes"
    return None


def _shape_problem(place: DataPlace) -> str | None:
    """What is wrong with the number and the depth of a place's files."""
    names = [file.name for file in place.files]
    if place.role == "bundle":
        return None if set(names) <= _BUNDLE_FILES else f"{names!r:.100} of the bundle"
    if place.is_folder:
        return None if place.role in FOLDERS and names else f"a folder of {place.role}"
    return None if len(names) == 1 and "/" not in names[0] else f"{names!r:.100} as one file"


def _name_problem(names: list[str]) -> str | None:
    """The first name that leads out of its place, or cannot be a file beside the others."""
    for name in names:
        if not _is_safe(name):
            return f"the name {name!r:.100}"
    folders = {str(above) for name in names for above in PurePosixPath(name).parents}
    if len(set(names)) != len(names) or folders & set(names):
        return "a name appears twice"
    return None


def _is_safe(name: str) -> bool:
    """Whether a name stays below its place on every system, and can be a file there."""
    parts = name.split("/")
    try:
        lengths = [len(os.fsencode(part)) for part in parts]
    except UnicodeEncodeError:
        return False
    return (
        len(parts) <= limits.DATA_FOLDER_DEPTH_MAX
        and sum(lengths) + len(parts) <= limits.NAME_BYTES_MAX
        and all(0 < length <= _NAME_BYTES_MAX for length in lengths)
        and not {".", ".."} & set(parts)
        and not any(each in _FORBIDDEN or ord(each) < ord(" ") for each in name)
    )


def _is_consistent(file: DataFile) -> bool:
    count = -(-file.bytes // limits.DATA_PART_BYTES)
    digests = (file.digest, *file.parts)
    parts_fit = len(file.parts) == (count if count > 1 else 0)
    return file.bytes > 0 and parts_fit and all(is_digest(digest) for digest in digests)


def _place(role: Role, root: Path, files: Iterable[Path], source: DataSource) -> DataPlace:
    with reading(root):
        is_folder = root.is_dir()
    described = []
    for path in files:
        name = path.relative_to(root).as_posix() if is_folder else path.name
        if _name_problem([name]) is not None:
            raise DataError(
                f"{path}: its name cannot be given to another device",
                hint="rename the file, or keep the data here with --keep-data-here",
            )
        described.append(_described(path, name, source))
    return DataPlace(role=role, is_folder=is_folder and role != "bundle", files=tuple(described))


def _described(path: Path, name: str, source: DataSource) -> DataFile:
    """Hash a file as a whole and by parts."""
    whole, parts, sizes = hashlib.sha256(), [], []
    with reading(path), path.open("rb") as stream:
        while True:
            part, size = hashlib.sha256(), 0
            while size < limits.DATA_PART_BYTES:
                chunk = stream.read(min(_READ_BYTES, limits.DATA_PART_BYTES - size))
                if not chunk:
                    break
                whole.update(chunk)
                part.update(chunk)
                size += len(chunk)
            if not size:
                break
            parts.append(Digest(part.hexdigest()))
            sizes.append(size)
        status = os.fstat(stream.fileno())
    if not parts:
        raise DataError(f"{path} is empty")
    file = SourceFile(
        path=path,
        bytes=sum(sizes),
        modified_ns=status.st_mtime_ns,
        digest=Digest(whole.hexdigest()),
    )
    for index, (digest, size) in enumerate(zip(parts, sizes, strict=True)):
        source._parts[digest] = (file, index * limits.DATA_PART_BYTES, size)
    several = tuple(parts) if len(parts) > 1 else ()
    return DataFile(name=name, bytes=file.bytes, digest=file.digest, parts=several)
