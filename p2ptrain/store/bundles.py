"""Find and read bundles: directories of a manifest and graphs named by their hashes.

A bundle is hostile until checked. Files are opened by digest only, never by a path that the
manifest holds; their length is checked before they are read, and their hash before they are used.
No graph is handed out that is not what the manifest says (`bundle.graph_checks`), whether it comes
from a directory or over the wire, so none reaches onnxruntime.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import p2ptrain
from p2ptrain import limits
from p2ptrain.bundle.graph_checks import check_graph
from p2ptrain.bundle.manifest import Manifest
from p2ptrain.bundle.reading import parse_manifest
from p2ptrain.errors import BundleError, NotFound
from p2ptrain.ids import Digest

MANIFEST_FILE: Final = "manifest.json"
GRAPH_FOLDER: Final = "graphs"
TOKENIZER_FILE: Final = "tokenizer.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A checked manifest and where its graphs come from; graphs are read when asked for."""

    manifest: Manifest
    manifest_bytes: bytes
    """Canonical, so that its sha256 is the digest, however the file was laid out."""
    digest: Digest
    """Names the bundle."""
    directory: Path | None
    """None for a bundle that came over the wire."""
    _graphs: dict[Digest, bytes] = field(repr=False)

    def graphs(self) -> dict[Digest, bytes]:
        """Every graph by its digest; errors as `graph`."""
        return {Digest(digest): self.graph(Digest(digest)) for digest in self.manifest.graphs}

    def graph(self, digest: Digest) -> bytes:
        """The bytes of one graph, checked against the manifest.

        Raises:
            BundleError: not in the bundle, missing, damaged, outside the directory, or not what
                the manifest says; do not use the bundle.
        """
        if digest not in self.manifest.graphs:
            raise BundleError(f"the bundle has no graph {digest!r:.20}")
        content = self._graphs.get(digest)
        if content is None:
            content = self._read(digest)
            self._graphs[digest] = content
        return content

    def tokenizer(self) -> bytes | None:
        """The bundle's `tokenizer.json`, checked; None for a model without one, or that came over
        the wire: only a home peer needs it.

        Raises:
            BundleError: missing, damaged, too large or outside the directory.
        """
        if self.directory is None:
            return None
        return read_tokenizer(self.directory, self.manifest)

    def check(self) -> None:
        """Read every graph once; BundleError names the first that is missing or damaged."""
        for digest in self.manifest.graphs:
            self.graph(Digest(digest))

    def _read(self, digest: Digest) -> bytes:
        if self.directory is None:
            raise BundleError(f"the bundle came without its graph {digest:.12}")
        content = read_graph_file(self.directory, self.manifest, digest)
        check_graph(self.manifest, digest, content)
        return content


def load_bundle(directory: Path) -> Bundle:
    """Read a bundle's manifest; graphs follow when asked for, or all at once with `check`.

    Raises:
        NotFound: there is no such directory.
        BundleError: no manifest, or one that is damaged or of an unknown version.
    """
    if not directory.is_dir():
        raise NotFound(f"there is no bundle directory {directory}")
    path = directory / MANIFEST_FILE
    if not path.exists():
        raise BundleError(f"{directory} is not a bundle: it has no {MANIFEST_FILE}")
    return _bundle(read_inside(directory, path, limits.MANIFEST_BYTES_MAX), directory, {})


def read_tokenizer(directory: Path, manifest: Manifest) -> bytes | None:
    """The bundle's `tokenizer.json`, checked; None for a model that needs none.

    Raises:
        BundleError: missing, damaged, too large or outside the directory.
    """
    if manifest.data.tokenizer != TOKENIZER_FILE:
        return None
    path = directory / TOKENIZER_FILE
    content = read_inside(directory, path, limits.TOKENIZER_BYTES_MAX)
    if hashlib.sha256(content).hexdigest() != manifest.data.tokenizer_digest:
        raise BundleError(f"{TOKENIZER_FILE} is damaged: its hash differs")
    return content


def bundle_from_parts(manifest_bytes: bytes, graphs: Mapping[Digest, bytes]) -> Bundle:
    """A bundle received over the wire.

    Raises:
        BundleError: a graph is not in the manifest, has another length or hash, or is not what
            the manifest says.
    """
    bundle = _bundle(manifest_bytes, None, dict(graphs))
    for digest, content in graphs.items():
        if digest not in bundle.manifest.graphs:
            raise BundleError(f"graph {digest!r:.20} is not in the manifest")
        _check_file(bundle.manifest, digest, content)
        check_graph(bundle.manifest, digest, content)
    return bundle


def read_graph_file(directory: Path, manifest: Manifest, digest: Digest) -> bytes:
    """The bytes of a graph that the manifest lists; nobody has looked at their meaning yet.

    Raises:
        BundleError: missing, damaged, or outside the directory.
    """
    path = directory / GRAPH_FOLDER / f"{digest}.onnx"
    content = read_inside(directory, path, manifest.graphs[digest].bytes)
    _check_file(manifest, digest, content)
    return content


def find_bundle(name_or_path: str) -> Path:
    """The directory of a bundle: a path as given, else one that comes with p2ptrain.

    Raises:
        NotFound: neither; the hint lists what comes with p2ptrain.
    """
    given = Path(name_or_path).expanduser()
    if given.is_dir():
        return given
    shipped = shipped_bundles()
    name = name_or_path.removeprefix("onnx_models/").rstrip("/")
    if name in shipped:
        return shipped[name]
    known = ", ".join(sorted(shipped)) or "none"
    raise NotFound(
        f"there is no bundle {name_or_path!r}",
        hint=f"give a folder made by tools/export_model.py, or one of: {known}",
    )


def shipped_bundles() -> dict[str, Path]:
    """Bundles in the installed package, or beside it in a checkout, by name."""
    package = Path(p2ptrain.__file__).resolve().parent
    found: dict[str, Path] = {}
    for folder in (package.parent / "onnx_models", package / "bundles"):
        if folder.is_dir():
            found |= {
                entry.name: entry
                for entry in sorted(folder.iterdir())
                if (entry / MANIFEST_FILE).is_file()
            }
    return found


def _bundle(content: bytes, directory: Path | None, graphs: dict[Digest, bytes]) -> Bundle:
    manifest = parse_manifest(content)
    canonical = manifest.to_bytes()
    return Bundle(
        manifest=manifest,
        manifest_bytes=canonical,
        digest=Digest(hashlib.sha256(canonical).hexdigest()),
        directory=directory,
        _graphs=graphs,
    )


def _check_file(manifest: Manifest, digest: Digest, content: bytes) -> None:
    expected = manifest.graphs[digest].bytes
    if len(content) != expected:
        raise BundleError(f"graph {digest:.12} has {len(content)} bytes instead of {expected}")
    if hashlib.sha256(content).hexdigest() != digest:
        raise BundleError(f"graph {digest:.12} is damaged: its hash differs")


def read_inside(directory: Path, path: Path, bytes_max: int) -> bytes:
    """The content of a regular file of at most `bytes_max` bytes that lies inside `directory`.

    Raises:
        BundleError: it is none, or cannot be read.
    """
    size = size_inside(directory, path)
    if size > bytes_max:
        raise BundleError(f"{path.name} has {size} bytes; {bytes_max} are expected")
    try:
        with path.open("rb") as file:
            return file.read(bytes_max + 1)
    except OSError as error:
        raise BundleError(f"{path.name} cannot be read: {error.strerror}") from error


def size_inside(directory: Path, path: Path) -> int:
    """Bytes of a regular file inside `directory`; BundleError for anything else."""
    try:
        if not path.resolve(strict=True).is_relative_to(directory.resolve()):
            raise BundleError(f"{path.name} lies outside the bundle")
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BundleError(f"{path.name} is not a regular file")
        return status.st_size
    except FileNotFoundError as error:
        raise BundleError(f"the bundle lacks {path.name}") from error
    except RuntimeError as error:  # a loop of links, before Python 3.13
        raise BundleError(f"{path.name} is a link that leads nowhere") from error
    except OSError as error:
        raise BundleError(f"{path.name} cannot be read: {error.strerror}") from error
