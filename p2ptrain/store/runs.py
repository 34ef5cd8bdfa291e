"""The home peer's record of its runs: contract, bundle, checkpoints per segment, model.

    runs/<run id>/run.json                                    what the run is
    runs/<run id>/bundle/                                     its graphs
    runs/<run id>/checkpoints/step-00000020/segment-0003.safetensors
    runs/<run id>/checkpoints/step-00000020/checkpoint.json   written last: it commits the step
    runs/<run id>/progress.jsonl                              one line per step
    runs/<run id>/ended.json                                  how its newest lineage ended

A checkpoint without `checkpoint.json` does not exist. Checkpoints are per segment, so that any
number of peers can resume them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.data.options import DataOptions
from p2ptrain.errors import CheckpointError, NotFound, RemoteProtocolError
from p2ptrain.ids import Digest, Lineage, RunId, ViewNumber, is_base32
from p2ptrain.store.atomic import write_atomic
from p2ptrain.store.bundles import TOKENIZER_FILE
from p2ptrain.training.contract import Contract
from p2ptrain.training.messages import Ended
from p2ptrain.wire.codec import from_plain, to_plain

RUN_FORMAT: Final = "p2ptrain-run"
ENDED_FORMAT: Final = "p2ptrain-run-end"
CHECKPOINT_FORMAT: Final = "p2ptrain-checkpoint"
VERSION: Final = 1
KEPT_CHECKPOINTS: Final = 2

_STEP_FOLDER: Final = re.compile(r"step-[0-9]{8,12}\Z")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What a run is, and the newest view this device took part in."""

    run: RunId
    lineage: Lineage
    view: ViewNumber
    bundle_name: str
    contract: Contract
    data: str
    heldout: str | None
    checkpoint_every: int
    data_options: DataOptions = field(default_factory=DataOptions)
    private: bool = False
    """Neither inputs nor labels may leave this device, when it is resumed either."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedSegment:
    """One segment of a checkpoint: the file's digest and size, the digest of its state."""

    segment: int
    blob: Digest
    blob_bytes: int
    state: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRecord:
    """A whole, durable step."""

    run: RunId
    lineage: Lineage
    view: ViewNumber
    plan: Digest
    step: int
    bundle: Digest
    contract: Digest
    segments: tuple[SavedSegment, ...]


class RunDirectory:
    """One run's files on its home peer."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def bundle_path(self) -> Path:
        return self.path / "bundle"

    @property
    def model_path(self) -> Path:
        """Where `trained.onnx` goes unless the user names another place."""
        return self.path / "trained.onnx"

    def exists(self) -> bool:
        """Whether the run was written down, so that it can be resumed."""
        return (self.path / "run.json").is_file()

    def write_record(self, record: RunRecord) -> None:
        """Create or replace `run.json`."""
        with storing("the run's record"):
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomic(self.path / "run.json", [_document(RUN_FORMAT, record)])
            (self.path / "ended.json").unlink(missing_ok=True)  # it goes on

    def read_record(self) -> RunRecord:
        """The run's record; CheckpointError when it is damaged, foreign or of another version."""
        record = _read(self.path / "run.json", RUN_FORMAT, RunRecord)
        if record.run != self.path.name:
            raise CheckpointError(f"run.json is of run {record.run[:8]}, not {self.path.name[:8]}")
        return record

    def write_ended(self, ended: Ended) -> None:
        """Note that a lineage is over: a restart does not take it up, and others can be told."""
        with storing("the run's end"):
            write_atomic(self.path / "ended.json", [_document(ENDED_FORMAT, ended)])

    def read_ended(self) -> Ended | None:
        """How the newest lineage ended; None where nothing is known of an end."""
        with contextlib.suppress(CheckpointError):
            ended = _read(self.path / "ended.json", ENDED_FORMAT, Ended)
            return ended if ended.run == self.path.name else None
        return None

    def write_bundle(
        self, manifest: bytes, graphs: Mapping[Digest, bytes], tokenizer: bytes | None = None
    ) -> None:
        """Keep the bundle beside the run, so that it can be resumed without the original."""
        folder = self.bundle_path / "graphs"
        with storing("the run's bundle"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for digest, content in graphs.items():
                write_atomic(folder / f"{digest}.onnx", [content])
            if tokenizer is not None:
                write_atomic(self.bundle_path / TOKENIZER_FILE, [tokenizer])
            write_atomic(self.bundle_path / "manifest.json", [manifest])

    def append_progress(self, line: Mapping[str, object]) -> None:
        """Add one step to the log; the log is for people, nothing is read back from it."""
        path = self.path / "progress.jsonl"
        with storing("the run's log"), path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def write_segment(self, step: int, segment: int, content: bytes) -> None:
        """Store one segment of a checkpoint that is not yet complete.

        This and every other write raises CheckpointError when the disk is full or read-only.
        """
        folder = self._checkpoint_path(step)
        with storing(f"the checkpoint of step {step}"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomic(folder / segment_name(segment), [content])

    def commit_checkpoint(self, record: CheckpointRecord) -> None:
        """Make a checkpoint whole, then forget the oldest ones and what never became whole."""
        path = self._checkpoint_path(record.step) / "checkpoint.json"
        with storing(f"the checkpoint of step {record.step}"):
            write_atomic(path, [_document(CHECKPOINT_FORMAT, record)])
        oldest_kept = self.checkpoint_steps()[-KEPT_CHECKPOINTS:][0]
        for step in self._begun_steps():
            if step < oldest_kept:
                shutil.rmtree(self._checkpoint_path(step), ignore_errors=True)

    def checkpoint_steps(self) -> list[int]:
        """The steps of all whole checkpoints, ascending."""
        begun = self._begun_steps()
        return [s for s in begun if (self._checkpoint_path(s) / "checkpoint.json").is_file()]

    def read_checkpoint(self, manifest: Manifest) -> CheckpointRecord | None:
        """The newest whole checkpoint, or None before the first.

        Raises:
            CheckpointError: it is damaged, of an unknown version, or of another model.
        """
        steps = self.checkpoint_steps()
        if not steps:
            return None
        path = self._checkpoint_path(steps[-1]) / "checkpoint.json"
        record = _read(path, CHECKPOINT_FORMAT, CheckpointRecord)
        if (record.run, record.step) != (self.path.name, steps[-1]):
            raise CheckpointError(f"the checkpoint of step {steps[-1]} is of another run or step")
        if record.bundle != manifest.digest:
            raise CheckpointError(f"the checkpoint of step {record.step} is of another model")
        if [saved.segment for saved in record.segments] != list(range(len(manifest.segments))):
            raise CheckpointError(f"the checkpoint of step {record.step} lacks segments")
        return record

    def read_segment(self, step: int, saved: SavedSegment) -> bytes:
        """One segment's file, exactly the bytes that its record names; else CheckpointError."""
        path = self._checkpoint_path(step) / segment_name(saved.segment)
        try:
            if path.stat().st_size != saved.blob_bytes:
                raise CheckpointError(f"{path.name} of step {step} has the wrong size")
            content = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path.name} of step {step}: {error.strerror}") from error
        if hashlib.sha256(content).hexdigest() != saved.blob:
            raise CheckpointError(f"{path.name} of step {step} is damaged: its hash differs")
        return content

    def _begun_steps(self) -> list[int]:
        """Steps with a checkpoint directory, whole or not, ascending."""
        folder = self.path / "checkpoints"
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return sorted(int(name[5:]) for name in names if _STEP_FOLDER.match(name))

    def _checkpoint_path(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:08d}"


def segment_name(segment: int) -> str:
    """The file of one segment in a folder of a step."""
    return f"segment-{segment:04d}.safetensors"


def find_run(runs: Path, prefix: str) -> RunDirectory:
    """The run whose id begins with `prefix`.

    Raises:
        NotFound: none does, or several do; the message lists them.
    """
    matches = [path for path in run_paths(runs) if prefix and path.name.startswith(prefix)]
    if len(matches) == 1:
        return RunDirectory(matches[0])
    known = ", ".join(path.name[:8] for path in (matches or run_paths(runs))) or "none"
    what = f"run {prefix!r} is ambiguous" if matches else f"this device has no run {prefix!r}"
    raise NotFound(f"{what} (runs here: {known})")


def run_paths(runs: Path) -> list[Path]:
    """All runs of this device, the most recently written first."""
    if not runs.is_dir():
        return []
    found = [p for p in runs.iterdir() if is_base32(p.name, 26) and (p / "run.json").is_file()]
    return sorted(found, key=lambda path: (path / "run.json").stat().st_mtime, reverse=True)


def summaries(runs: Path) -> Iterator[str]:
    """`3f2a...: gpt-nano, step 40 of 100` for every run, newest first."""
    for path in run_paths(runs):
        directory = RunDirectory(path)
        try:
            record = directory.read_record()
        except CheckpointError as error:
            yield f"{path.name}: {error.message}"
            continue
        last = (directory.checkpoint_steps() or [0])[-1]
        yield f"{path.name}: {record.bundle_name}, step {last} of {record.contract.steps}"


@contextlib.contextmanager
def storing(what: str) -> Iterator[None]:
    """Turns OSError into CheckpointError: a disk that refuses ends the session, not the peer."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{what} cannot be stored: {error.strerror or error}",
            hint="make room on the disk, then go on with --resume",
        ) from error


def _document(kind: str, record: object) -> bytes:
    plain = to_plain(record)
    return (json.dumps({"format": kind, "version": VERSION, **plain}, indent=1) + "\n").encode()


def _read(path: Path, kind: str, cls: type[_T]) -> _T:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}") from error
    if not isinstance(document, dict) or document.get("format") != kind:
        raise CheckpointError(f"{path.name} is not a {kind} file")
    if document.get("version") != VERSION:
        raise CheckpointError(
            f"{path.name} has version {document.get('version')!r}; this p2ptrain reads {VERSION}",
            hint="resume it with the p2ptrain that wrote it, or update this one",
        )
    try:
        return from_plain(cls, document)
    except RemoteProtocolError as error:
        raise CheckpointError(f"{path.name}: {error.message}") from error
