"""Check a bundle's directory as a whole and list everything that is wrong with it.

A peer refuses a bundle at the first problem (`store.bundles`); this is for the person who wants
to know all of them. Weights are read in chunks, so that memory does not follow their size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np

from p2ptrain import limits
from p2ptrain.bundle.contradictions import contradictions
from p2ptrain.bundle.graph_checks import graph_problems
from p2ptrain.bundle.manifest import Manifest, Tensor
from p2ptrain.bundle.reading import decode_manifest
from p2ptrain.errors import BundleError, CheckpointError, NotFound
from p2ptrain.ids import Digest
from p2ptrain.store.bundles import (
    GRAPH_FOLDER,
    MANIFEST_FILE,
    read_graph_file,
    read_inside,
    size_inside,
)
from p2ptrain.training.safetensors import FileLayout, TensorPlace, read_layout

WEIGHTS_FILE: Final = "weights.safetensors"
TOKENIZER_FILE: Final = "tokenizer.json"
CHUNK_BYTES: Final = 1 << 20
"""A multiple of every element's size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One check: what was looked at, and what came of it."""

    subject: str
    state: str
    """ok; wrong: the bundle must not be used; note: it may, but a person should know."""
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """All that was found in one directory."""

    version: int
    """Of this report."""
    directory: str
    digest: Digest | None
    """None where the manifest cannot be read."""
    sound: bool
    findings: tuple[Finding, ...]


def verify_bundle(directory: Path) -> Verification:
    """Check everything in a bundle's directory.

    Raises:
        NotFound: there is no such directory.
    """
    if not directory.is_dir():
        raise NotFound(f"there is no bundle directory {directory}")
    manifest, findings = _manifest(directory)
    digest = None
    if manifest is not None:
        digest = manifest.digest
        findings += _graphs(directory, manifest)
        findings += _weights(directory, manifest)
        findings += _tokenizer(directory, manifest)
        findings += _surroundings(directory, manifest)
    return Verification(
        version=1,
        directory=str(directory),
        digest=digest,
        sound=all(finding.state != "wrong" for finding in findings),
        findings=tuple(findings),
    )


def _manifest(directory: Path) -> tuple[Manifest | None, list[Finding]]:
    """The manifest when everything in it agrees: nothing else can be read by one that does not."""
    path = directory / MANIFEST_FILE
    try:
        manifest = decode_manifest(read_inside(directory, path, limits.MANIFEST_BYTES_MAX))
    except BundleError as error:
        return None, [_wrong(MANIFEST_FILE, error.message)]
    problems = [_wrong(MANIFEST_FILE, problem) for problem in contradictions(manifest)]
    if problems:
        unread = Finding(subject=GRAPH_FOLDER, state="note", detail="not read")
        return None, [*problems, unread]
    counted = f"{len(manifest.segments)} segments, {len(manifest.tensors)} tensors"
    return manifest, [_ok(MANIFEST_FILE, counted)]


def _graphs(directory: Path, manifest: Manifest) -> list[Finding]:
    findings = []
    for name in manifest.graphs:
        digest = Digest(name)
        subject = f"{GRAPH_FOLDER}/{digest:.12}"
        try:
            content = read_graph_file(directory, manifest, digest)
        except BundleError as error:
            findings.append(_wrong(subject, error.message))
            continue
        findings += [_wrong(subject, text) for text in graph_problems(manifest, digest, content)]
    return findings or [_ok(GRAPH_FOLDER, f"{len(manifest.graphs)} graphs as the manifest says")]


def _weights(directory: Path, manifest: Manifest) -> list[Finding]:
    if manifest.weights is None:
        return [_ok(WEIGHTS_FILE, "none: every tensor is drawn from the run's seed")]
    path = directory / WEIGHTS_FILE
    try:
        size = size_inside(directory, path)
        if not 0 < size <= limits.WEIGHTS_BYTES_MAX:
            raise BundleError(f"it has {size} bytes")
        layout = read_layout(np.memmap(path, np.uint8, "r").data)
        with path.open("rb") as file:
            problems = list(_weight_problems(file, layout, manifest))
    except (BundleError, CheckpointError) as error:
        problems = [error.message]
    except OSError as error:
        problems = [f"it cannot be read: {error.strerror}"]
    stored = sum(tensor.digest is not None for tensor in manifest.tensors)
    return [_wrong(WEIGHTS_FILE, problem) for problem in problems] or [
        _ok(WEIGHTS_FILE, f"{stored} tensors, all finite")
    ]


def _weight_problems(file: BinaryIO, layout: FileLayout, manifest: Manifest) -> Iterator[str]:
    stored = {tensor.name: tensor for tensor in manifest.tensors if tensor.digest is not None}
    start = min((place.start for place in layout.places.values()), default=0)
    whole = hashlib.sha256(file.read(start))
    for name, place in layout.places.items():
        tensor = stored.pop(name, None)
        if tensor is None:
            yield f"it holds {name!r:.80}, which the manifest does not expect there"
        yield from _tensor_problems(file, name, place, tensor, whole)
    for name, tensor in stored.items():
        if tensor.tied_to is None:
            yield f"it lacks {name!r:.80}"
    if whole.hexdigest() != manifest.weights:
        yield "it is damaged: its hash differs"


def _tensor_problems(
    file: BinaryIO,
    name: str,
    place: TensorPlace,
    tensor: Tensor | None,
    whole: hashlib._Hash,
) -> Iterator[str]:
    """Problems of the tensor that comes next in the file; its bytes go into both hashes."""
    own, left, is_finite = hashlib.sha256(), place.nbytes, True
    while left:
        chunk = file.read(min(left, CHUNK_BYTES))
        if len(chunk) < min(left, CHUNK_BYTES):
            raise BundleError("it became shorter while it was read")
        left -= len(chunk)
        own.update(chunk)
        whole.update(chunk)
        if place.dtype.kind == "f":
            is_finite = is_finite and bool(np.isfinite(np.frombuffer(chunk, place.dtype)).all())
    if not is_finite:
        yield f"tensor {name!r:.80} is not finite: it holds NaN or infinity"
    if tensor is not None:
        if (place.shape, place.dtype.name) != (tensor.shape, tensor.dtype):
            yield f"tensor {name!r:.80} has shape {place.shape} and dtype {place.dtype.name}"
        if own.hexdigest() != tensor.digest:
            yield f"tensor {name!r:.80} is damaged: its hash differs"


def _tokenizer(directory: Path, manifest: Manifest) -> list[Finding]:
    expected = manifest.data.tokenizer_digest
    if expected is None:
        return []
    path = directory / TOKENIZER_FILE
    try:
        content = read_inside(directory, path, limits.TOKENIZER_BYTES_MAX)
        if hashlib.sha256(content).hexdigest() != expected:
            raise BundleError("it is damaged: its hash differs")
        if not isinstance(json.loads(content), dict):
            raise BundleError("it is not a JSON object")
    except BundleError as error:
        return [_wrong(TOKENIZER_FILE, error.message)]
    except (ValueError, RecursionError):
        return [_wrong(TOKENIZER_FILE, "it is not JSON")]
    return [_ok(TOKENIZER_FILE, f"{len(content)} bytes")]


def _surroundings(directory: Path, manifest: Manifest) -> list[Finding]:
    """Notes about files that the manifest does not know: nobody reads them."""
    expected = {MANIFEST_FILE, GRAPH_FOLDER}
    expected |= {f"{GRAPH_FOLDER}/{digest}.onnx" for digest in manifest.graphs}
    expected |= {WEIGHTS_FILE} if manifest.weights is not None else set()
    expected |= {TOKENIZER_FILE} if manifest.data.tokenizer_digest is not None else set()
    findings = []
    for number, path in enumerate(_entries(directory)):
        name = path.relative_to(directory).as_posix()
        if number == limits.BUNDLE_FILES_LISTED_MAX:
            findings.append(_note(".", "there are more files than are looked at"))
            break
        if path.is_symlink() and not _stays_inside(directory, path):
            findings.append(_note(name, "a link that leaves the bundle"))
        elif name not in expected:
            findings.append(_note(name, "not part of the bundle"))
    return findings


def _entries(directory: Path) -> Iterator[Path]:
    for folder in (directory, directory / GRAPH_FOLDER):
        if folder.is_dir():
            yield from sorted(folder.iterdir())


def _stays_inside(directory: Path, path: Path) -> bool:
    try:
        return path.resolve(strict=True).is_relative_to(directory.resolve())
    except (OSError, RuntimeError):  # RuntimeError: a loop of links, before Python 3.13
        return False


def _ok(subject: str, detail: str) -> Finding:
    return Finding(subject=subject, state="ok", detail=detail)


def _wrong(subject: str, detail: str) -> Finding:
    return Finding(subject=subject, state="wrong", detail=detail)


def _note(subject: str, detail: str) -> Finding:
    return Finding(subject=subject, state="note", detail=detail)
