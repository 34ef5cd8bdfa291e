"""A run's files on its home peer: whole, damaged, foreign, of another version."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import pytest

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.errors import CheckpointError, NotFound
from p2ptrain.ids import Digest, Lineage, RunId, ViewNumber
from p2ptrain.store import runs as stores
from p2ptrain.store.runs import (
    CheckpointRecord,
    RunDirectory,
    RunRecord,
    SavedSegment,
    find_run,
    run_paths,
    summaries,
)
from tests.bundles import contract_for, tiny_bundle

BUNDLE = tiny_bundle(blocks=1)
MANIFEST: Manifest = BUNDLE.manifest
RUN, OTHER = RunId("a" * 26), RunId("ab" + "c" * 24)


def record(run: RunId = RUN) -> RunRecord:
    return RunRecord(
        run=run, lineage=Lineage(0), view=ViewNumber(1), bundle_name="tiny",
        contract=contract_for(BUNDLE), data="notes.txt", heldout=None, checkpoint_every=5,
    )  # fmt: skip


def content(step: int, segment: int) -> bytes:
    return f"segment {segment} after step {step}".encode()


def saved(step: int, segment: int) -> SavedSegment:
    file = content(step, segment)
    return SavedSegment(
        segment=segment, blob=Digest(hashlib.sha256(file).hexdigest()), blob_bytes=len(file),
        state=Digest("0" * 64),
    )  # fmt: skip


def checkpoint(step: int) -> CheckpointRecord:
    return CheckpointRecord(
        run=RUN, lineage=Lineage(0), view=ViewNumber(1), plan=Digest("1" * 64), step=step,
        bundle=MANIFEST.digest, contract=record().contract.digest,
        segments=tuple(saved(step, index) for index in range(len(MANIFEST.segments))),
    )  # fmt: skip


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / RUN)
    made.write_record(record())
    return made


def store(directory: RunDirectory, step: int) -> CheckpointRecord:
    made = checkpoint(step)
    for segment in made.segments:
        directory.write_segment(step, segment.segment, content(step, segment.segment))
    directory.commit_checkpoint(made)
    return made


def checkpoint_file(directory: RunDirectory, step: int) -> Path:
    return directory.path / "checkpoints" / f"step-{step:08d}" / "checkpoint.json"


def test_record_comes_back(directory: RunDirectory) -> None:
    assert directory.read_record() == record()


def test_record_of_another_run_is_refused(tmp_path: Path) -> None:
    copied = RunDirectory(tmp_path / OTHER)
    copied.write_record(record())
    with pytest.raises(CheckpointError, match=r"run.json is of run aaaaaaaa, not abcccccc"):
        copied.read_record()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", "cannot be read"),
        (lambda text: text[:-20], "cannot be read"),
        (lambda text: "[]", "is not a p2ptrain-run file"),
        (lambda text: text.replace("p2ptrain-run", "p2ptrain-checkpoint"), "is not a"),
        (lambda text: text.replace('"version": 1,', '"version": 2,', 1), "has version 2"),
        (lambda text: text.replace('"lineage": 0', '"lineage": "x"'), "lineage"),
        (lambda text: text.replace('"lineage"', '"generation"'), "'lineage' is missing"),
        (lambda text: text.replace('"microbatches": 4', '"microbatches": 0'), "microbatches"),
    ],
)
def test_damaged_record_is_refused(directory: RunDirectory, change: object, message: str) -> None:
    path = directory.path / "run.json"
    path.write_text(change(path.read_text()))  # type: ignore[operator]  # a function of the table
    with pytest.raises(CheckpointError, match=message):
        directory.read_record()
    (line,) = summaries(directory.path.parent)
    assert line.startswith(f"{RUN}: run.json")


def test_bundle_is_kept_beside_the_run(directory: RunDirectory) -> None:
    graphs = {Digest(digest): BUNDLE.graph(Digest(digest)) for digest in MANIFEST.graphs}
    directory.write_bundle(BUNDLE.manifest_bytes, graphs)
    names = {path.stem for path in (directory.bundle_path / "graphs").iterdir()}
    assert names == set(MANIFEST.graphs)
    assert (directory.bundle_path / "manifest.json").read_bytes() == BUNDLE.manifest_bytes


def test_before_the_first_checkpoint_there_is_none(directory: RunDirectory) -> None:
    assert directory.checkpoint_steps() == []
    assert directory.read_checkpoint(MANIFEST) is None


def test_newest_whole_checkpoint_is_read(directory: RunDirectory) -> None:
    store(directory, 5)
    newest = store(directory, 10)
    directory.write_segment(15, 0, b"half a checkpoint is none")
    assert directory.checkpoint_steps() == [5, 10]
    assert directory.read_checkpoint(MANIFEST) == newest
    assert directory.read_segment(10, newest.segments[1]) == content(10, 1)


def test_old_and_half_checkpoints_go_when_a_new_one_is_whole(directory: RunDirectory) -> None:
    directory.write_segment(3, 0, b"never finished")
    for step in (5, 10, 15):
        store(directory, step)
    kept = sorted(path.name for path in (directory.path / "checkpoints").iterdir())
    assert kept == ["step-00000010", "step-00000015"]


def test_what_is_no_checkpoint_is_left_alone(directory: RunDirectory) -> None:
    store(directory, 5)
    foreign = directory.path / "checkpoints" / "step-old"
    foreign.mkdir()
    (foreign / "checkpoint.json").write_text("{}")
    assert directory.checkpoint_steps() == [5]
    store(directory, 10)
    assert foreign.is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bundle": Digest("9" * 64)}, "is of another model"),
        ({"run": OTHER}, "of another run or step"),
        ({"step": 6}, "of another run or step"),
        ({"segments": checkpoint(5).segments[:-1]}, "lacks segments"),
        ({"segments": checkpoint(5).segments[::-1]}, "lacks segments"),
    ],
)
def test_foreign_checkpoint_is_refused(
    directory: RunDirectory, changes: dict[str, object], message: str
) -> None:
    store(directory, 5)
    path = checkpoint_file(directory, 5)
    other = dataclasses.replace(checkpoint(5), **changes)  # type: ignore[arg-type]  # by name
    path.write_bytes(stores._document(stores.CHECKPOINT_FORMAT, other))
    with pytest.raises(CheckpointError, match=message):
        directory.read_checkpoint(MANIFEST)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_checkpoint_of_another_version_says_what_to_do(
    directory: RunDirectory, version: object
) -> None:
    store(directory, 5)
    path = checkpoint_file(directory, 5)
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": version}))
    with pytest.raises(CheckpointError, match="this p2ptrain reads 1") as caught:
        directory.read_checkpoint(MANIFEST)
    assert "update" in caught.value.hint


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_bytes(b""), "wrong size"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "wrong size"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"), "its hash differs"),
    ],
)
def test_damaged_segment_is_refused(directory: RunDirectory, spoil: object, message: str) -> None:
    newest = store(directory, 5)
    spoil(checkpoint_file(directory, 5).parent / "segment-0001.safetensors")  # type: ignore[operator]  # a function of the table
    with pytest.raises(CheckpointError, match=f"(?i)segment-0001.safetensors of step 5.*{message}"):
        directory.read_segment(5, newest.segments[1])


@pytest.mark.parametrize("write", ["segment", "commit", "record", "bundle", "progress"])
def test_disk_that_refuses_is_a_checkpoint_error(tmp_path: Path, write: str) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("not a directory")
    blocked = RunDirectory(in_the_way / RUN)
    writes = {
        "segment": lambda: blocked.write_segment(5, 0, b"x"),
        "commit": lambda: blocked.commit_checkpoint(checkpoint(5)),
        "record": lambda: blocked.write_record(record()),
        "bundle": lambda: blocked.write_bundle(b"{}", {}),
        "progress": lambda: blocked.append_progress({"step": 1}),
    }
    with pytest.raises(CheckpointError, match="cannot be stored: Not a directory") as caught:
        writes[write]()
    assert "--resume" in caught.value.hint


def test_progress_is_one_line_per_step(directory: RunDirectory) -> None:
    for step in (1, 2):
        directory.append_progress({"step": step, "loss": 0.5})
    lines = (directory.path / "progress.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_run_is_found_by_the_beginning_of_its_id(tmp_path: Path, directory: RunDirectory) -> None:
    RunDirectory(tmp_path / OTHER).write_record(record(OTHER))
    (tmp_path / "notes").mkdir()
    (tmp_path / ("z" * 26)).mkdir()  # no run.json: not a run
    assert find_run(tmp_path, "aa").path.name == RUN
    assert find_run(tmp_path, OTHER).path.name == OTHER
    with pytest.raises(NotFound, match=r"'a' is ambiguous .*aaaaaaaa"):
        find_run(tmp_path, "a")
    with pytest.raises(NotFound, match=r"no run 'q' \(runs here: "):
        find_run(tmp_path, "q")
    with pytest.raises(NotFound, match="no run ''"):
        find_run(tmp_path, "")


def test_no_runs_at_all(tmp_path: Path) -> None:
    assert run_paths(tmp_path / "missing") == []
    assert list(summaries(tmp_path / "missing")) == []
    with pytest.raises(NotFound, match="runs here: none"):
        find_run(tmp_path, "a")


def test_summaries_come_newest_first(tmp_path: Path, directory: RunDirectory) -> None:
    newer = RunDirectory(tmp_path / OTHER)
    newer.write_record(record(OTHER))
    os.utime(directory.path / "run.json", (1, 1))
    store(directory, 5)
    assert list(summaries(tmp_path)) == [
        f"{OTHER}: tiny, step 0 of 20",
        f"{RUN}: tiny, step 5 of 20",
    ]
