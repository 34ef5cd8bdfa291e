"""Replicas on the disk: only what was announced is kept, and what is damaged is never listed."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import numpy as np
import pytest

from p2ptrain import limits
from p2ptrain.errors import CheckpointError, InvariantBroken, RemoteProtocolError
from p2ptrain.ids import Digest
from p2ptrain.recovery.inventory import HeldState, SegmentSpan
from p2ptrain.store import replicas
from p2ptrain.store.replicas import ReplicaPlace, ReplicaStore
from p2ptrain.training.segment_image import SegmentImage
from p2ptrain.training.segment_state import StateHeader, read_segment_state, values_bytes
from tests.varied_bundle import varied_bundle

BUNDLE = varied_bundle()
MANIFEST = BUNDLE.manifest
NAMES = ("m", "v")
RUN = "r" * 26


def made(segment: int, step: int, **changes: object) -> SegmentImage:
    fields = {
        "run": RUN, "lineage": 0, "view": 1, "plan": "3" * 64, "step": step, "segment": segment,
        "bundle": BUNDLE.digest,
    }  # fmt: skip
    image = SegmentImage(MANIFEST, StateHeader(**{**fields, **changes}), NAMES)
    generator = np.random.default_rng(100 * step + segment)
    state = image.state
    for vectors in (state.tensors, *state.state.values(), state.running):
        for array in vectors.values():
            array[...] = generator.standard_normal(array.shape)
    return image


def place(segment: int, step: int, lineage: int = 0) -> ReplicaPlace:
    return ReplicaPlace(lineage=lineage, step=step, segment=segment)


def opened(path: Path, **limit: int) -> ReplicaStore:
    store = ReplicaStore(path / RUN, MANIFEST, NAMES, **limit)
    store.scan()
    return store


def keep(store: ReplicaStore, at: ReplicaPlace, image: SegmentImage | None = None) -> SegmentImage:
    image = image or made(at.segment, at.step, lineage=at.lineage)
    writer = store.writer(image.header, image.state_digest())
    try:
        values = image.values
        for start in range(0, len(values), 5000):
            writer.write(bytes(values[start : start + 5000]))
        writer.keep(Digest(hashlib.sha256(values).hexdigest()))
    finally:
        writer.discard()
    return image


def files(path: Path) -> list[Path]:
    return sorted(each for each in path.rglob("*") if each.is_file())


def test_image_is_the_file_of_its_state() -> None:
    for segment in range(len(MANIFEST.segments)):
        image = made(segment, 3)
        assert bytes(image.content) == image.state.to_bytes(image.header)
        assert image.state_digest() == image.state.digest()
        stored = read_segment_state(
            image.content, MANIFEST, bundle=BUNDLE.digest, state_names=NAMES
        )
        assert stored.header == image.header
        assert len(image.values) == values_bytes(MANIFEST, segment, NAMES)
        assert hashlib.sha256(image.values).hexdigest() == image.state_digest()


def test_replica_is_read_back_also_by_another_process(tmp_path: Path) -> None:
    image = keep(opened(tmp_path), place(1, 20))
    store = opened(tmp_path)
    stored = store.read(place(1, 20))
    assert stored.state.digest() == image.state_digest()
    assert bytes(store.content(place(1, 20))) == bytes(image.content)
    found = store.replica(place(1, 20))
    assert found is not None
    assert (found.state, found.size_bytes) == (image.state_digest(), len(image.content))
    assert store.replica(place(1, 21)) is None


def test_held_states_are_spans_by_step(tmp_path: Path) -> None:
    store = opened(tmp_path)
    for segment, step in ((0, 20), (1, 20), (4, 20), (1, 40), (2, 40)):
        keep(store, place(segment, step))
    keep(store, place(0, 40, lineage=1))

    def held(first: int, count: int, step: int) -> HeldState:
        return HeldState(span=SegmentSpan(first=first, count=count), step=step)

    expected = (held(0, 2, 20), held(4, 1, 20), held(1, 2, 40))
    for each in (store, opened(tmp_path)):
        assert each.held(0) == expected
        assert each.held(1) == (held(0, 1, 40),)
        assert each.held(2) == ()
        assert each.statistics().set_count == 3
        assert each.statistics().replica_count == 6


@pytest.mark.parametrize("changes", [{"run": "s" * 26}, {"bundle": "4" * 64}])
def test_store_holds_one_run_of_one_model(tmp_path: Path, changes: dict[str, object]) -> None:
    store = opened(tmp_path)
    with pytest.raises(InvariantBroken):
        store.writer(made(1, 20, **changes).header, Digest("0" * 64))


def test_replica_that_is_not_the_announced_state_is_refused(tmp_path: Path) -> None:
    store, image = opened(tmp_path), made(1, 20)
    values = bytearray(image.values)
    values[-1] ^= 1
    for wrong in (values, image.values[:-4], bytes(image.values) + b"\0", b""):
        for announced in (image.state_digest(), Digest(hashlib.sha256(wrong).hexdigest())):
            if announced == image.state_digest() or len(wrong) != len(values):
                writer = store.writer(image.header, announced)
                writer.write(wrong)
                with pytest.raises(RemoteProtocolError, match="something else"):
                    writer.keep(Digest(hashlib.sha256(wrong).hexdigest()))
                writer.discard()
    assert files(tmp_path) == []
    assert store.statistics().replica_count == 0


@pytest.mark.parametrize("changes", [{"step": 21}, {"segment": 2}, {"lineage": 1}])
def test_file_that_holds_another_state_than_its_name_says_is_damaged(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    keep(opened(tmp_path), place(1, 20))
    (path,) = files(tmp_path)
    path.write_bytes(made(**{"segment": 1, "step": 20, **changes}).content)
    assert opened(tmp_path).statistics().replica_count == 0
    assert files(tmp_path) == []


@pytest.mark.parametrize("damage", ["bit", "short", "empty", "gone"])
def test_damaged_replica_is_never_listed(tmp_path: Path, damage: str) -> None:
    store = opened(tmp_path)
    for segment in (1, 2):
        keep(store, place(segment, 20))
    path = next(each for each in files(tmp_path) if "0001" in each.name)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    damaged = {"bit": content, "short": content[:-8], "empty": b""}
    path.unlink()
    if damage != "gone":
        path.write_bytes(damaged[damage])
    later = opened(tmp_path)
    assert [held.span.first for held in later.held(0)] == [2]
    assert later.statistics().damaged_count == (damage != "gone")
    with pytest.raises(CheckpointError):
        store.read(place(1, 20))
    assert [held.span.first for held in store.held(0)] == [2]
    assert len(files(tmp_path)) == 1
    with pytest.raises(CheckpointError, match="no replica"):
        store.content(place(1, 20))


def test_scan_ignores_what_is_no_replica_and_removes_what_a_crash_left(tmp_path: Path) -> None:
    keep(opened(tmp_path), place(1, 20))
    folder = files(tmp_path)[0].parent
    (folder / "notes.txt").write_text("mine")
    (folder / ".segment-0002.safetensors.0123.tmp").write_bytes(b"half")
    (folder.parent / "notes").mkdir()
    (folder.parent / "0-00000020x").mkdir()
    assert opened(tmp_path).statistics().replica_count == 1
    assert sorted(path.suffix for path in files(tmp_path)) == [".safetensors", ".txt"]


def test_older_sets_go_when_they_are_not_needed(tmp_path: Path) -> None:
    store = opened(tmp_path)
    for lineage, step in ((0, 20), (0, 40), (1, 20), (1, 40), (1, 60)):
        keep(store, place(1, step, lineage))
    store.forget_before(1, 40)
    assert [held.step for held in store.held(1)] == [40, 60]
    assert store.held(0) == ()
    store.forget_set(1, 60)
    assert store.statistics().set_count == 1
    assert opened(tmp_path).statistics() == store.statistics()
    assert len(files(tmp_path)) == 1


def test_second_replica_of_a_place_replaces_the_first(tmp_path: Path) -> None:
    store = opened(tmp_path)
    keep(store, place(1, 20))
    other = made(1, 20)
    other.state.tensors["mix0.scale"][...] = 5
    keep(store, place(1, 20), other)
    assert store.read(place(1, 20)).state.digest() == other.state_digest()
    assert len(files(tmp_path)) == 1
    keep(store, place(1, 20), other)
    assert len(files(tmp_path)) == 1


def test_replicas_take_no_more_than_they_may(tmp_path: Path) -> None:
    size = len(made(1, 20).content)
    store = opened(tmp_path, bytes_max=2 * size + 1)
    for step in (20, 40):
        keep(store, place(1, step))
    assert store.statistics().stored_bytes == 2 * size
    with pytest.raises(CheckpointError, match="replicas may take 0 MiB here") as caught:
        keep(store, place(1, 60))
    assert "make room" in caught.value.hint
    store.forget_before(0, 40)
    keep(store, place(1, 60))


def test_disk_keeps_a_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(made(1, 20).content)
    free = limits.DISK_RESERVE_BYTES + size
    monkeypatch.setattr(replicas, "free_bytes", lambda path: free - 1)
    with pytest.raises(CheckpointError, match="256 MiB stay so"):
        keep(opened(tmp_path), place(1, 20))
    monkeypatch.setattr(replicas, "free_bytes", lambda path: free)
    keep(opened(tmp_path), place(1, 20))


def test_disk_that_refuses_is_a_checkpoint_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = opened(tmp_path)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match="cannot be stored: No space left"):
        keep(store, place(1, 20))
    assert files(tmp_path) == []
    assert store.replica(place(1, 20)) is None
    with pytest.raises(CheckpointError):
        keep(store, place(2, 20))
