"""Durable replicas of other members' segment states, for when their owner is lost.

    runs/<run id>/replicas/<lineage>-<step>/segment-0003-<digest of the state>.safetensors

A file is what a checkpoint holds of a segment. It is checked against the announced digest before it
gets its name, again when the store is opened and each time it is read; one that does not match its
name is deleted and never listed. Sets of different steps lie beside each other until the caller
says that an older one is not needed any more.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from p2ptrain import limits
from p2ptrain.bundle.manifest import Manifest
from p2ptrain.errors import CheckpointError, InvariantBroken, RemoteProtocolError
from p2ptrain.ids import Digest, Lineage, RunId
from p2ptrain.recovery.inventory import HeldState, SegmentSpan
from p2ptrain.store.atomic import FileWriter, free_bytes, is_temporary
from p2ptrain.store.runs import storing
from p2ptrain.training.contract import Contract
from p2ptrain.training.segment_state import (
    StateHeader,
    StoredSegment,
    read_segment_state,
    segment_head,
    values_bytes,
)

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

FOLDER: Final = "replicas"
_SET: Final = re.compile(r"([0-9]{1,16})-([0-9]{8,13})\Z")
_FILE: Final = re.compile(r"segment-([0-9]{4})-([0-9a-f]{64})\.safetensors\Z")
_HINT: Final = "make room on this device's disk; until then a loss can cost the run its last steps"


@dataclass(frozen=True, slots=True, order=True, kw_only=True)
class ReplicaPlace:
    """Which state: of a lineage, after `step` updates, of one segment."""

    lineage: Lineage
    step: int
    segment: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One state that is durable here."""

    place: ReplicaPlace
    state: Digest
    size_bytes: int
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatistics:
    """What the replicas of a run take here."""

    set_count: int
    replica_count: int
    stored_bytes: int
    damaged_count: int
    """Found and deleted since the store was opened."""


class ReplicaStore:
    """The replicas of one run on this device.

    Everything that touches the disk blocks and belongs in a worker thread, one call at a time;
    `held`, `kept`, `replica` and `statistics` only look at what is known, also meanwhile.
    """

    def __init__(
        self,
        run_path: Path,
        manifest: Manifest,
        state_names: tuple[str, ...],
        *,
        contract: Contract | None = None,
        bytes_max: int = limits.REPLICA_BYTES_MAX,
    ) -> None:
        """Nothing is known before `scan`.

        Args:
            run_path: The run's folder; its name is the run's id.
            manifest: Of the model.
            state_names: The optimizer's state vectors, in the update rule's order.
            contract: Of the run; None: its codec loses nothing.
            bytes_max: Of all replicas together.
        """
        self._contract = contract
        self._path, self._run = run_path / FOLDER, RunId(run_path.name)
        self._manifest, self._state_names = manifest, state_names
        self._bundle = manifest.digest
        self._bytes_max = bytes_max
        self._kept: dict[ReplicaPlace, Replica] = {}
        self._damaged_count = 0

    def scan(self) -> None:
        """Read and check everything that an earlier process left; damaged files go."""
        for folder in self._folders():
            with contextlib.suppress(OSError):  # a folder that cannot be read holds nothing
                for path in sorted(folder.iterdir()):
                    self._scan(folder, path)

    def writer(self, header: StateHeader, state: Digest) -> ReplicaWriter:
        """Begin to store a replica whose values will arrive.

        Args:
            header: Which state it is, of this run and model.
            state: The digest that its owner announced for its values.

        Raises:
            CheckpointError: there is no room for it; its owner's steps stay provisional.
        """
        if (header.run, header.bundle) != (self._run, self._bundle):
            raise InvariantBroken("a replica of another run or model")
        place = ReplicaPlace(lineage=header.lineage, step=header.step, segment=header.segment)
        head = segment_head(self._manifest, header, self._state_names, self._contract)
        values = values_bytes(self._manifest, header.segment, self._state_names, self._contract)
        size = len(head) + values
        self._check_room(place, size)
        with storing(_what(place)):
            path = self._folder(place) / f"segment-{place.segment:04d}-{state}.safetensors"
            replica = Replica(place=place, state=state, size_bytes=size, path=path)
            return ReplicaWriter(self, replica, head)

    def held(self, lineage: Lineage) -> tuple[HeldState, ...]:
        """Spans of segments whose replicas are here, by step."""
        places = sorted(place for place in list(self._kept) if place.lineage == lineage)
        spans: list[HeldState] = []
        for place in places:
            last = spans[-1] if spans else None
            if last and last.step == place.step and last.span.segments.stop == place.segment:
                grown = SegmentSpan(first=last.span.first, count=last.span.count + 1)
                spans[-1] = HeldState(span=grown, step=place.step)
            else:
                span = SegmentSpan(first=place.segment, count=1)
                spans.append(HeldState(span=span, step=place.step))
        return tuple(spans)

    def kept(self, lineage: Lineage) -> tuple[Replica, ...]:
        """Every replica of a lineage, by step and segment."""
        places = sorted(place for place in list(self._kept) if place.lineage == lineage)
        return tuple(self._kept[place] for place in places)

    def replica(self, place: ReplicaPlace) -> Replica | None:
        """What is known of one state; None when it is not here."""
        return self._kept.get(place)

    def content(self, place: ReplicaPlace) -> memoryview:
        """A replica's file, mapped and checked, to be sent to whoever needs it.

        Raises:
            CheckpointError: it is not here, or damaged and now deleted; ask another keeper.
        """
        replica = self._kept.get(place)
        if replica is None:
            raise CheckpointError(f"this device has no replica of {_what(place)}")
        try:
            content = _mapped(replica.path)
            self.checked(replica, content)
        except CheckpointError:
            self._forget(replica)
            raise
        return content

    def read(self, place: ReplicaPlace) -> StoredSegment:
        """A replica's state, its arrays views of the mapped file; errors as `content`."""
        return self._parsed(self.content(place))

    def forget_before(self, lineage: Lineage, step: int) -> None:
        """Delete all sets of earlier lineages, and of earlier steps of this one."""
        for folder in self._folders():
            if _set_of(folder) < (lineage, step):
                self._delete(folder)

    def forget_set(self, lineage: Lineage, step: int) -> None:
        """Delete one set, which will never be whole."""
        for folder in self._folders():
            if _set_of(folder) == (lineage, step):
                self._delete(folder)

    def statistics(self) -> ReplicaStatistics:
        """What is here now."""
        kept = list(self._kept.values())
        return ReplicaStatistics(
            set_count=len({(each.place.lineage, each.place.step) for each in kept}),
            replica_count=len(kept),
            stored_bytes=sum(each.size_bytes for each in kept),
            damaged_count=self._damaged_count,
        )

    def checked(self, replica: Replica, content: memoryview) -> None:
        """CheckpointError unless these bytes are the state that the replica says."""
        stored, place = self._parsed(content), replica.place
        header = stored.header
        found = (header.run, header.lineage, header.step, header.segment)
        if found != (self._run, place.lineage, place.step, place.segment):
            raise CheckpointError(f"{_what(place)} holds something else")
        if len(content) != replica.size_bytes or stored.state.digest() != replica.state:
            raise CheckpointError(f"{_what(place)} is damaged: its hash differs")

    def added(self, replica: Replica) -> None:
        """A writer has made this replica durable; another of the same place is replaced."""
        before = self._kept.get(replica.place)
        self._kept[replica.place] = replica
        if before is not None and before.path != replica.path:
            _unlink(before.path)

    def _scan(self, folder: Path, path: Path) -> None:
        replica = _named(folder, path)
        if replica is not None and self._is_sound(replica):
            self._kept[replica.place] = replica
        elif replica is not None or is_temporary(path):
            _unlink(path)

    def _parsed(self, content: memoryview) -> StoredSegment:
        return read_segment_state(
            content, self._manifest, bundle=self._bundle, state_names=self._state_names
        )

    def _is_sound(self, replica: Replica) -> bool:
        try:
            self.checked(replica, _mapped(replica.path))
        except CheckpointError:
            self._damaged_count += 1
            return False
        return True

    def _forget(self, replica: Replica) -> None:
        self._damaged_count += 1
        self._kept.pop(replica.place, None)
        _unlink(replica.path)

    def _check_room(self, place: ReplicaPlace, size: int) -> None:
        total = self.statistics().stored_bytes + size
        if total > self._bytes_max:
            raise CheckpointError(
                f"{_what(place)} does not fit: replicas may take {self._bytes_max >> 20} MiB here",
                hint=_HINT,
            )
        with storing(_what(place)):
            free = free_bytes(self._path)
        if size + limits.DISK_RESERVE_BYTES > free:
            raise CheckpointError(
                f"{_what(place)} does not fit: {size >> 20} MiB, and {free >> 20} MiB of disk are "
                f"free, of which {limits.DISK_RESERVE_BYTES >> 20} MiB stay so",
                hint=_HINT,
            )

    def _folder(self, place: ReplicaPlace) -> Path:
        return self._path / f"{place.lineage}-{place.step:08d}"

    def _folders(self) -> list[Path]:
        found = list(self._path.iterdir()) if self._path.is_dir() else []
        return sorted(path for path in found if _SET.match(path.name) and path.is_dir())

    def _delete(self, folder: Path) -> None:
        lineage, step = _set_of(folder)
        for place in [p for p in list(self._kept) if (p.lineage, p.step) == (lineage, step)]:
            del self._kept[place]
        shutil.rmtree(folder, ignore_errors=True)


class ReplicaWriter(FileWriter):
    """Takes a replica's values in order; `discard` is due whatever happened."""

    def __init__(self, store: ReplicaStore, replica: Replica, head: bytes) -> None:
        super().__init__(replica.path)
        self._store, self._replica = store, replica
        self._size = len(head)
        super().write(head)

    def write(self, chunk: ReadableBuffer) -> None:
        """The next bytes."""
        super().write(chunk)
        self._size += memoryview(chunk).nbytes

    def keep(self, hashed: Digest) -> None:
        """Make it durable and known to the store, if it is what was announced; blocking.

        Args:
            hashed: sha256 of what was written: who fetches a blob has just computed it.

        Raises:
            RemoteProtocolError: it is not, and never will be.
            CheckpointError: the disk refuses; it may do better later.
        """
        replica = self._replica
        if (self._size, hashed) != (replica.size_bytes, replica.state):
            raise RemoteProtocolError(f"what came as {_what(replica.place)} is something else")
        with storing(_what(replica.place)):
            self.commit()
        self._store.added(replica)


def _named(folder: Path, path: Path) -> Replica | None:
    """What a file's names and size say it is; None when it is no replica."""
    match = _FILE.match(path.name)
    if match is None:
        return None
    lineage, step = _set_of(folder)
    return Replica(
        place=ReplicaPlace(lineage=lineage, step=step, segment=int(match[1])),
        state=Digest(match[2]),
        size_bytes=path.stat().st_size,
        path=path,
    )


def _set_of(folder: Path) -> tuple[Lineage, int]:
    lineage, _, step = folder.name.partition("-")
    return Lineage(int(lineage)), int(step)


def _mapped(path: Path) -> memoryview:
    try:
        return np.memmap(path, np.uint8, "r").data
    except (OSError, ValueError) as error:  # ValueError: it is empty
        raise CheckpointError(f"{path.name} cannot be read: {error}") from error


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):  # it is unknown to the store either way
        path.unlink()


def _what(place: ReplicaPlace) -> str:
    return f"the replica of segment {place.segment} at step {place.step}"
