"""A second member copies a run's data of every kind, and feeds the same bits from it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import trio
from PIL import Image

from p2ptrain import limits
from p2ptrain.data import arriving
from p2ptrain.errors import DataError, PeerLost, RemoteProtocolError
from p2ptrain.ids import RunId
from p2ptrain.runtime.keeping.data_copy import (
    CopiedRun,
    CopyProgress,
    DataCopy,
    DataOffer,
    OfferedData,
)
from p2ptrain.runtime.planning.job import Job, open_job
from p2ptrain.runtime.reports import TrainRequest
from p2ptrain.store.bundles import bundle_from_parts
from p2ptrain.store.weights import open_weights
from p2ptrain.training.minibatch import read_minibatch
from p2ptrain.training.program import Item
from p2ptrain.wire.frames import BulkHeader
from tests.blob_net import BlobNet
from tests.bundles import graph_files, tiny_bundle
from tests.data_cases import write_lines
from tests.memory_group import request_for
from tests.sim.plans import device
from tests.weights import some_weights, write_weighted

HOME, HOLDER = device(0), device(1)
RUN = RunId("c" * 26)
TINY = tiny_bundle()
TEXT = "what one member knows, another one keeps.\n" * 200
ITEMS = (
    Item(kind="train", step=1), Item(kind="train", step=7), Item(kind="evaluate", step=0),
)  # fmt: skip


def text_file(path: Path) -> TrainRequest:
    (path / "notes.txt").write_text(TEXT)
    (path / "held.txt").write_text(TEXT[:3000])
    return asked("gpt-nano", path / "notes.txt", heldout=str(path / "held.txt"))


def text_folder(path: Path) -> TrainRequest:
    for name in ("a.md", "b/c/d.py", "b/e f.txt", ".hidden.txt", "b/picture.png", "b/empty.txt"):
        (path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (path / "texts" / name).write_text("" if "empty" in name else name + TEXT)
    return asked("gpt-nano", path / "texts")


def json_text(path: Path) -> TrainRequest:
    lines = write_lines(path / "lines.jsonl", [{"body": TEXT[:900]}] * 9)
    return asked("gpt-nano", lines, text_field="body")


def json_labelled(path: Path) -> TrainRequest:
    records = [{"text": f"{index} {TEXT[:50]}", "kind": index % 20} for index in range(60)]
    return asked("bert-mini", write_lines(path / "t.jsonl", records), label_field="kind")


def csv_labelled(path: Path) -> TrainRequest:
    for name, count in (("train.csv", 60), ("held.csv", 8)):
        rows = "".join(f"text {index},class-{index % 20:02}\n" for index in range(count))
        extra = "".join(f"more,class-{index:02}\n" for index in range(20))
        (path / name).write_text("text,label\n" + rows + extra)
    return asked("bert-mini", path / "train.csv", heldout=str(path / "held.csv"))


def array_archive(path: Path) -> TrainRequest:
    numbers = np.random.default_rng(3)
    for name, pack in (("train", np.savez), ("held", np.savez_compressed)):
        features = numbers.random((40, 1, 28, 28), np.float32)
        labels = numbers.integers(0, 10, 40)
        pack(path / f"{name}.npz", features=features, labels=labels)
    return asked("mlp", path / "train.npz", heldout=str(path / "held.npz"))


def array_pair(path: Path) -> TrainRequest:
    numbers = np.random.default_rng(4)
    for name in ("train", "held"):
        np.save(path / f"{name}.npy", numbers.random((40, 1, 28, 28), np.float32))
        np.save(path / f"{name}-labels.npy", numbers.integers(0, 10, 40))
    return asked(
        "mlp", path / "train.npy", labels=str(path / "train-labels.npy"),
        heldout=str(path / "held.npy"), heldout_labels=str(path / "held-labels.npy"),
    )  # fmt: skip


def array_folder(path: Path) -> TrainRequest:
    numbers = np.random.default_rng(5)
    (path / "arrays").mkdir()
    np.save(path / "arrays" / "features.npy", numbers.random((40, 1, 28, 28), np.float32))
    np.save(path / "arrays" / "labels.npy", numbers.integers(0, 10, 40))
    return asked("mlp", path / "arrays")


def image_folders(path: Path) -> TrainRequest:
    numbers = np.random.default_rng(6)
    for label in range(10):
        for name in ("1.png", "deeper/2.bmp", "notes.txt", "three:3.png"):
            file = path / "images" / f"kind {label}" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = numbers.integers(0, 256, (28, 28), np.uint8)
            if name.endswith(".txt"):
                file.write_text("no image")
            else:
                Image.fromarray(pixels).save(file)
    return asked("mlp", path / "images")


KINDS: dict[str, Callable[[Path], TrainRequest]] = {
    made.__name__: made
    for made in (
        text_file, text_folder, json_text, json_labelled, csv_labelled, array_archive, array_pair,
        array_folder, image_folders,
    )
}  # fmt: skip


def asked(bundle: str, data: Path, **changes: object) -> TrainRequest:
    whole = TrainRequest(
        bundle=bundle, data=str(data), steps=8, microbatches=2, microbatch_size=2, threads=1,
        heldout_microbatches=1,
    )  # fmt: skip
    return dataclasses.replace(whole, **changes)  # type: ignore[arg-type]  # by name


class Copying:
    """A home peer with its job, and a member that copies the job's data."""

    def __init__(self, net: BlobNet, job: Job, path: Path) -> None:
        self.net, self.job, self.runs_path = net, job, path / "holder" / "runs"
        self.offered = OfferedData(net[0])
        self.progress: list[CopyProgress] = []
        bundle = bundle_from_parts(job.bundle.manifest_bytes, graph_files(job.bundle))
        run = CopiedRun(
            run=RUN, lineage=job.lineage, view=job.view, bundle=bundle, contract=job.contract,
            checkpoint_every=5,
        )  # fmt: skip
        self.copy = DataCopy(
            run, runs_path=self.runs_path, blobs=net[1], on_progress=self.progress.append
        )

    async def fetch(self, offer: DataOffer | None = None) -> Job:
        return await self.copy.fetch(HOME, offer or await self.offered.open(self.job))

    @property
    def here(self) -> list[str]:
        """Every file of the holder's copy."""
        root = self.runs_path / RUN / "data"
        return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())


@asynccontextmanager
async def copying(path: Path, request: TrainRequest) -> AsyncIterator[Copying]:
    job = open_job(request, runs_path=path / "home" / "runs", new_run=RUN, default_threads=1)
    async with trio.open_nursery() as nursery:
        yield Copying(BlobNet(nursery, 2, (HOME, HOLDER)), job, path)
        nursery.cancel_scope.cancel()


def fed(job: Job) -> list[bytes]:
    """Everything that both ends of a pipeline would be fed."""
    loss = job.bundle.manifest.loss
    return [
        read_minibatch(job.samples, job.contract, loss, item).packed(kind)
        for item in ITEMS
        for kind in ("input", "labels")
    ]


@pytest.mark.parametrize("kind", KINDS)
async def test_copy_feeds_the_same_bits(tmp_path: Path, kind: str) -> None:
    request = KINDS[kind](tmp_path)
    async with copying(tmp_path, request) as pair:
        copied = await pair.fetch()
        assert fed(copied) == fed(pair.job)
        assert copied.contract == pair.job.contract
        assert Path(copied.data).is_relative_to(pair.runs_path)
        last = pair.progress[-1]
        assert (last.files_done, last.bytes_done) == (last.files, last.bytes)
        asked_before = len(pair.net.sent)
        again = await pair.fetch()
        assert fed(again) == fed(pair.job)
        assert len(pair.net.sent) == asked_before + 1, "only the list is fetched again"
        pair.offered.close()
        assert pair.net[0].statistics().published_count == 0


async def test_only_files_that_are_read_are_copied(tmp_path: Path) -> None:
    async with copying(tmp_path, text_folder(tmp_path)) as pair:
        await pair.fetch()
        assert pair.here == ["training/a.md", "training/b/c/d.py", "training/b/e f.txt"]
        stray = pair.runs_path / RUN / "data" / "training" / "zz.txt"
        stray.write_text("of an older list")
        assert fed(await pair.fetch()) == fed(pair.job)
        assert not stray.exists()


async def test_weights_and_tokenizer_of_the_bundle_come_along(tmp_path: Path) -> None:
    names = ("block0.w", "head.head")
    bundle = write_weighted(tmp_path / "weighted", TINY, some_weights(TINY, names))
    (tmp_path / "data.txt").write_text(TEXT)
    request = asked(str(bundle.directory), tmp_path / "data.txt")
    async with copying(tmp_path, request) as pair:
        copied = await pair.fetch()
        ours, theirs = open_weights(pair.job.bundle), open_weights(copied.bundle)
        assert sorted(theirs) == sorted(names)
        for name in names:
            np.testing.assert_array_equal(theirs[name], ours[name])
        copied.bundle.check()


def large(path: Path) -> TrainRequest:
    """A text of several parts, all different."""
    numbers = np.random.default_rng(8)
    size = 2 * limits.DATA_PART_BYTES + 12_345
    (path / "large.txt").write_bytes(numbers.integers(32, 126, size, np.uint8).tobytes())
    return request_for(path, TINY, data=str(path / "large.txt"))


async def test_large_file_goes_on_where_it_broke_off(tmp_path: Path) -> None:
    async with copying(tmp_path, large(tmp_path)) as pair:
        offer = await pair.offered.open(pair.job)
        seen = 0

        def break_off(header: BulkHeader) -> None:
            nonlocal seen
            seen += 1
            if seen == 20:  # in the second part
                pair.net[1].peer_down(HOME)

        pair.net.on_chunk = break_off
        with pytest.raises(PeerLost):
            await pair.fetch(offer)
        first_size = sum(each.stat().st_size for each in pair.runs_path.rglob("incoming/*"))
        assert limits.DATA_PART_BYTES < first_size < 2 * limits.DATA_PART_BYTES
        pair.net.on_chunk = lambda header: None
        asked_before = len(pair.net.sent)
        copied = await pair.fetch(offer)
        assert len(pair.net.sent) - asked_before == 3, "the list and two parts"
        assert fed(copied) == fed(pair.job)
        assert pair.here == ["training/large.txt"]


async def test_damaged_part_on_the_disk_is_fetched_again(tmp_path: Path) -> None:
    async with copying(tmp_path, large(tmp_path)) as pair:
        offer = await pair.offered.open(pair.job)
        copied = await pair.fetch(offer)
        damage(Path(copied.data))
        assert fed(await pair.fetch(offer)) == fed(pair.job)


async def test_neither_side_holds_more_than_a_part(tmp_path: Path) -> None:
    async with copying(tmp_path, large(tmp_path)) as pair:
        offer = await pair.offered.open(pair.job)
        totals: list[int] = []
        pair.net.on_chunk = lambda header: totals.append(header.total)
        await pair.fetch(offer)
        assert max(totals) == limits.DATA_PART_BYTES
        assert pair.net[0].statistics().published_bytes == offer.listing_bytes


def damage(path: Path, change: str = "same size") -> None:
    """Change a file; of the same size also with its old time."""
    status = path.stat()
    if change == "gone":
        path.unlink()
    elif change == "longer":
        path.write_bytes(path.read_bytes() + b"more")
    else:
        path.write_bytes(b"~" + path.read_bytes()[1:])
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", ["longer", "same size", "gone"])
async def test_file_that_changes_during_the_copy_is_noticed(tmp_path: Path, change: str) -> None:
    async with copying(tmp_path, large(tmp_path)) as pair:
        offer = await pair.offered.open(pair.job)
        damage(Path(pair.job.data), change)
        expected = DataError if change == "same size" else PeerLost
        with pytest.raises(expected, match=r"has changed while|no longer has"):
            await pair.fetch(offer)


async def test_closed_offer_gives_nothing_to_who_asked_before(tmp_path: Path) -> None:
    async with copying(tmp_path, text_file(tmp_path)) as pair:
        offer = await pair.offered.open(pair.job)

        async def closing(digest: object) -> None:
            await trio.lowlevel.checkpoint()
            pair.offered.close()

        blobs, own = pair.net[0], pair.offered._read
        blobs.remove_source(own)
        blobs.add_source(closing)
        blobs.add_source(own)
        with pytest.raises(PeerLost, match="no longer has"):
            await pair.fetch(offer)


async def test_data_that_changed_before_the_offer_is_not_the_runs(tmp_path: Path) -> None:
    async with copying(tmp_path, text_file(tmp_path)) as pair:
        (tmp_path / "notes.txt").write_text(TEXT + "more")
        with pytest.raises(DataError, match="not the data that the run was started with"):
            await pair.fetch()


async def test_no_room_is_said_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with copying(tmp_path, text_file(tmp_path)) as pair:
        total = len(TEXT) + 3000
        free = limits.DISK_RESERVE_BYTES + total
        monkeypatch.setattr(arriving, "free_bytes", lambda path: free - 1)
        with pytest.raises(DataError, match="256 MiB stay so") as caught:
            await pair.fetch()
        assert "--keep-data-here" in caught.value.hint
        assert len(pair.net.sent) == 1
        monkeypatch.setattr(arriving, "free_bytes", lambda path: free)
        await pair.fetch()
        monkeypatch.setattr(arriving, "free_bytes", lambda path: 0)
        assert fed(await pair.fetch()) == fed(pair.job), "nothing is missing any more"


async def test_disk_that_refuses_ends_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: object, chunk: bytes) -> None:
        raise OSError(28, "No space left on device")

    async with copying(tmp_path, text_file(tmp_path)) as pair:
        monkeypatch.setattr(arriving.ArrivingFile, "write", full)
        with pytest.raises(DataError, match="cannot be stored: No space left"):
            await pair.fetch()


NAME = {"name": "notes.txt", "bytes": 3, "digest": "1" * 64, "parts": []}
PLACE = {"role": "training", "is_folder": False, "files": [NAME]}
LISTING = {
    "format": "p2ptrain-data", "version": 1, "places": [PLACE], "text_field": None,
    "label_field": None,
}  # fmt: skip


def listing(*, folder: bool = False, role: str = "training", **changes: object) -> object:
    file = {**NAME, **changes}
    return {**LISTING, "places": [{"role": role, "is_folder": folder, "files": [file]}]}


def folder_of(*names: str) -> object:
    files = [{**NAME, "name": name} for name in names]
    return {**LISTING, "places": [{"role": "training", "is_folder": True, "files": files}]}


HOSTILE: dict[str, object] = {
    "parent": folder_of("../x"),
    "absolute": folder_of("/etc/passwd"),
    "inner parent": folder_of("a/../../x"),
    "dot": folder_of("./x"),
    "empty": folder_of(""),
    "double slash": folder_of("a//b"),
    "trailing slash": folder_of("a/"),
    "backslash": folder_of("..\\x"),
    "line end": folder_of("a\nb"),
    "null": folder_of("a\0b"),
    "lone surrogate": folder_of("\ud800"),
    "long name": folder_of("n" * 256),
    "long path": folder_of("/".join(["n" * 200] * 6)),
    "deep": folder_of("/".join("d" * 33)),
    "twice": folder_of("a", "a"),
    "file as folder": folder_of("a", "a/b"),
    "no files": folder_of(),
    "file in folder as file": listing(name="a/b"),
    "folder of labels": listing(folder=True, role="labels"),
    "unknown role": listing(role="elsewhere"),
    "only labels": listing(role="labels"),
    "graphs": {**LISTING, "places": [PLACE, {**PLACE, "role": "bundle"}]},
    "role twice": {**LISTING, "places": [PLACE, PLACE]},
    "no bytes": listing(bytes=0),
    "negative": listing(bytes=-1),
    "more bytes than parts": listing(bytes=limits.DATA_PART_BYTES + 1),
    "more parts than bytes": listing(parts=["1" * 64]),
    "too large": listing(
        bytes=limits.DATA_PART_BYTES * (limits.DATA_COPY_BYTES_MAX // limits.DATA_PART_BYTES + 1)
    ),
    "no digest": listing(digest="../" + "1" * 61),
    "wrong type": listing(bytes="3"),
    "other format": {**LISTING, "format": "p2ptrain-run"},
    "newer": {**LISTING, "version": 2},
    "no map": [LISTING],
}


@pytest.mark.parametrize("case", HOSTILE)
async def test_hostile_list_is_refused_before_anything_is_written(
    tmp_path: Path, case: str
) -> None:
    async with copying(tmp_path, text_file(tmp_path)) as pair:
        content = json.dumps(HOSTILE[case]).encode()
        digest = pair.net[0].publish(content)
        offer = DataOffer(listing=digest, listing_bytes=len(content), total_bytes=3)
        with pytest.raises(RemoteProtocolError):
            await pair.fetch(offer)
        assert not pair.runs_path.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
async def test_damaged_list_is_refused(tmp_path: Path, content: bytes) -> None:
    async with copying(tmp_path, text_file(tmp_path)) as pair:
        digest = pair.net[0].publish(content)
        size = len(content)
        with pytest.raises(RemoteProtocolError):
            await pair.fetch(DataOffer(listing=digest, listing_bytes=size, total_bytes=3))
        for wild in (-1, limits.DATA_MANIFEST_BYTES_MAX + 1):
            with pytest.raises(RemoteProtocolError):
                await pair.fetch(DataOffer(listing=digest, listing_bytes=wild, total_bytes=3))


async def test_names_that_cannot_travel_are_said_at_home(tmp_path: Path) -> None:
    request = text_folder(tmp_path)
    (tmp_path / "texts" / "back\\slash.txt").write_text(TEXT)
    async with copying(tmp_path, request) as pair:
        with pytest.raises(DataError, match="its name cannot be given") as caught:
            await pair.fetch()
        assert "--keep-data-here" in caught.value.hint


async def test_names_that_are_not_utf8_travel(tmp_path: Path) -> None:
    request = text_folder(tmp_path)
    name = os.fsdecode(b"caf\xe9.txt")
    try:
        (tmp_path / "texts" / name).write_text(TEXT)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    async with copying(tmp_path, request) as pair:
        assert fed(await pair.fetch()) == fed(pair.job)
