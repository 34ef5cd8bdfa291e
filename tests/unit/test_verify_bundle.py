"""`verify_bundle` lists everything that is wrong in a folder, and reads weights in chunks."""

from __future__ import annotations

import hashlib
import json
import re
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from p2ptrain.errors import NotFound
from p2ptrain.store.bundles import Bundle, load_bundle
from p2ptrain.store.verify_bundle import CHUNK_BYTES, Verification, verify_bundle
from p2ptrain.training.random import draw_parameter
from p2ptrain.training.safetensors import encode_tensors
from tests.bundles import tiny_bundle, write_bundle
from tests.hostile import GRAPHS, MANIFESTS, Parts, changed_by, parts_of

Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def tiny() -> Bundle:
    return tiny_bundle(blocks=2)


@pytest.fixture
def directory(tmp_path: Path, tiny: Bundle) -> Path:
    return write_bundle(tmp_path / "tiny", tiny)


def wrong(report: Verification) -> list[str]:
    assert report.sound == all(finding.state != "wrong" for finding in report.findings)
    return [f"{f.subject}: {f.detail}" for f in report.findings if f.state == "wrong"]


def notes(report: Verification) -> list[str]:
    return [f"{f.subject}: {f.detail}" for f in report.findings if f.state == "note"]


def drawn(bundle: Bundle) -> Tensors:
    return {
        tensor.name: draw_parameter(0, tensor, index)
        for index, tensor in enumerate(bundle.manifest.tensors)
    }


def file_of(tensors: Mapping[str, np.ndarray]) -> bytes:
    return b"".join(encode_tensors(tensors, {}))


def with_weights(
    bundle: Bundle, directory: Path, content: bytes, stated: Mapping[str, np.ndarray]
) -> Path:
    """A bundle whose manifest states the hash of `content`, and those of the `stated` tensors."""
    parts = parts_of(bundle)
    parts.manifest["weights"] = hashlib.sha256(content).hexdigest()
    for tensor in parts.manifest["tensors"]:
        if tensor["name"] in stated:
            tensor["digest"] = hashlib.sha256(stated[tensor["name"]].tobytes()).hexdigest()
    parts.write(directory)
    (directory / "weights.safetensors").write_bytes(content)
    return directory


def test_sound_bundle_has_nothing_wrong(directory: Path, tiny: Bundle) -> None:
    report = verify_bundle(directory)
    assert report.sound
    assert report.digest == tiny.digest
    assert wrong(report) == notes(report) == []
    assert [f.subject for f in report.findings] == [
        "manifest.json", "graphs", "weights.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("case", GRAPHS | MANIFESTS)
def test_what_a_peer_refuses_is_listed(case: str, tiny: Bundle, tmp_path: Path) -> None:
    change, said = (GRAPHS | MANIFESTS)[case]
    found = wrong(verify_bundle(changed_by(tiny, change).write(tmp_path / "b")))
    assert any(re.search(said, line) for line in found)


def test_every_bad_graph_is_listed_with_damaged_and_missing_ones(
    tiny: Bundle, tmp_path: Path
) -> None:
    parts = changed_by(tiny, GRAPHS["an unknown input"][0])
    directory = parts.write(tmp_path / "b")
    lost, damaged = parts.digest("embed", "forward"), parts.digest("embed", "backward")
    (directory / "graphs" / f"{lost}.onnx").unlink()
    path = directory / "graphs" / f"{damaged}.onnx"
    path.write_bytes(bytes(len(path.read_bytes())))
    found = "\n".join(wrong(verify_bundle(directory)))
    assert f"the bundle lacks {lost}.onnx" in found
    assert f"graph {damaged:.12} is damaged" in found
    assert "input 'z' is not in the manifest" in found


def test_directory_without_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        verify_bundle(tmp_path / "absent")
    assert wrong(verify_bundle(tmp_path)) == ["manifest.json: the bundle lacks manifest.json"]
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    assert "is not JSON" in wrong(verify_bundle(tmp_path))[0]


def test_good_weights_are_sound(tiny: Bundle, tmp_path: Path) -> None:
    tensors = drawn(tiny)
    directory = with_weights(tiny, tmp_path / "b", file_of(tensors), tensors)
    report = verify_bundle(directory)
    assert report.sound
    assert "6 tensors, all finite" in [finding.detail for finding in report.findings]
    load_bundle(directory).check()


def _not_a_number(tensors: Tensors) -> bytes:
    tensors["block0.w"][3, 3] = np.nan
    return file_of(tensors)


def _infinite(tensors: Tensors) -> bytes:
    tensors["head.head"][-1, -1] = -np.inf
    return file_of(tensors)


def _header(text: bytes, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text


def _overlapping(_: Tensors) -> bytes:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    return _header(json.dumps({"a": entry, "b": entry}).encode()) + bytes(4)


def _huge(_: Tensors) -> bytes:
    entry = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}
    return _header(json.dumps({"a": entry}).encode()) + bytes(4)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_not_a_number, "tensor 'block0.w' is not finite"),
        (_infinite, "tensor 'head.head' is not finite"),
        (lambda t: file_of({**t, "more": np.zeros(2, np.float32)}), "holds 'more'"),
        (lambda t: file_of({n: v for n, v in t.items() if n != "block0.w"}), "lacks 'block0.w'"),
        (lambda t: file_of({**t, "block0.b": t["block0.b"].reshape(4, 4)}), r"shape \(4, 4\)"),
        (lambda t: file_of({**t, "block0.b": t["block0.b"].astype("f8")}), "dtype float64"),
        (lambda t: file_of({**t, "block0.b": t["block0.b"] + 1}), "'block0.b' is damaged"),
        (lambda t: file_of(t)[:-1], "does not lie where its shape puts it"),
        (lambda t: file_of(t) + b"\0", "its tensors cover"),
        (_overlapping, "does not lie where its shape puts it"),
        (_huge, "does not lie where its shape puts it"),
        (lambda _: _header(b"{}", 1 << 60), "header claims"),
        (lambda _: _header(b"["), "header is not JSON"),
        (lambda _: b"\0\0", "it has 2 bytes"),
        (lambda _: b"", "it has 0 bytes"),
    ],
)
def test_bad_weights_are_named(
    make: Callable[[Tensors], bytes], said: str, tiny: Bundle, tmp_path: Path
) -> None:
    content = make(drawn(tiny))
    found = wrong(verify_bundle(with_weights(tiny, tmp_path / "b", content, drawn(tiny))))
    assert any(re.search(said, line) for line in found)
    assert all(line.startswith("weights.safetensors: ") for line in found)


def test_weights_that_changed_as_a_whole_are_damaged(tiny: Bundle, tmp_path: Path) -> None:
    tensors = drawn(tiny)
    directory = with_weights(tiny, tmp_path / "b", file_of(tensors), tensors)
    content = b"".join(encode_tensors(tensors, {"a": "remark"}))
    (directory / "weights.safetensors").write_bytes(content)
    assert wrong(verify_bundle(directory)) == [
        "weights.safetensors: it is damaged: its hash differs"
    ]
    (directory / "weights.safetensors").unlink()
    assert "lacks weights.safetensors" in wrong(verify_bundle(directory))[0]


def test_weights_are_read_in_bounded_memory(tiny: Bundle, tmp_path: Path) -> None:
    big = {"big": np.zeros(32 * CHUNK_BYTES // 4, np.float32)}
    directory = with_weights(tiny, tmp_path / "b", file_of(big), drawn(tiny))
    del big
    tracemalloc.start()
    try:
        verify_bundle(directory)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * CHUNK_BYTES


def _with_tokenizer(bundle: Bundle, directory: Path, content: bytes, stated: bytes) -> Path:
    parts: Parts = parts_of(bundle)
    parts.manifest["data"]["tokenizer"] = "tokenizer.json"
    parts.manifest["data"]["tokenizer_digest"] = hashlib.sha256(stated).hexdigest()
    parts.write(directory)
    (directory / "tokenizer.json").write_bytes(content)
    return directory


@pytest.mark.parametrize(
    ("content", "stated", "said"),
    [
        (b"{}", b"{}", None),
        (b"{ }", b"{}", "its hash differs"),
        (b"{", b"{", "is not JSON"),
        (b"[1]", b"[1]", "is not a JSON object"),
    ],
)
def test_tokenizer_is_checked(
    content: bytes, stated: bytes, said: str | None, tiny: Bundle, tmp_path: Path
) -> None:
    report = verify_bundle(_with_tokenizer(tiny, tmp_path / "b", content, stated))
    found = wrong(report)
    assert found == [] if said is None else said in found[0]
    assert notes(report) == []


def test_unknown_files_and_links_that_leave_are_noted(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    (directory / "link").symlink_to(tmp_path / "secret")
    (directory / "loop").symlink_to(directory / "loop")
    (directory / "README.md").write_text("r")
    (directory / "graphs" / "old.onnx").write_bytes(b"")
    report = verify_bundle(directory)
    assert report.sound
    assert notes(report) == [
        "README.md: not part of the bundle",
        "link: a link that leaves the bundle",
        "loop: a link that leaves the bundle",
        "graphs/old.onnx: not part of the bundle",
    ]


def test_link_in_place_of_a_part_is_refused(directory: Path, tmp_path: Path, tiny: Bundle) -> None:
    (graph, *_) = tiny.manifest.graphs
    path = directory / "graphs" / f"{graph}.onnx"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    found = wrong(verify_bundle(directory))
    assert len(found) == 1
    assert "lies outside the bundle" in found[0]
    path.unlink()
    path.symlink_to(path)
    assert len(wrong(verify_bundle(directory))) == 1
