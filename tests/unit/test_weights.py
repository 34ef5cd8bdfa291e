"""Weights on the disk: mapped, checked when they are asked for, whole or not there."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from p2ptrain.bundle.manifest import Tensor
from p2ptrain.errors import BundleError, CheckpointError
from p2ptrain.store import weights as store
from p2ptrain.store.bundles import Bundle, load_bundle
from p2ptrain.store.weights import (
    SegmentWeightsWriter,
    keep_weights,
    needed_weights,
    open_segment_weights,
    open_weights,
)
from p2ptrain.training.safetensors import encode_tensors, raw_bytes, tensor_digest
from tests.bundles import tiny_bundle, write_bundle
from tests.weights import some_weights, write_weighted

NAMES = ("embed.table", "block1.w", "block1.b")
GIVEN = some_weights(tiny_bundle(), NAMES)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_weighted(tmp_path / "weighted", tiny_bundle(), GIVEN)


def file_of(bundle: Bundle) -> Path:
    assert bundle.directory is not None
    return bundle.directory / "weights.safetensors"


def root(array: np.ndarray) -> np.ndarray:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def test_weights_are_read_only_views_of_one_map(bundle: Bundle) -> None:
    weights = open_weights(bundle)
    assert set(weights) == set(NAMES)
    for name in NAMES:
        np.testing.assert_array_equal(weights[name], GIVEN[name])
        assert not weights[name].flags.writeable
    assert "head.head" not in weights
    assert weights.get("head.head") is None
    roots = [root(weights[name]) for name in NAMES]
    assert all(each is roots[0] for each in roots)
    assert isinstance(roots[0], np.memmap)


def test_bundle_without_weights_has_none(tmp_path: Path) -> None:
    assert len(open_weights(tiny_bundle())) == 0
    assert len(open_weights(load_bundle(write_bundle(tmp_path / "drawn", tiny_bundle())))) == 0


def test_damaged_tensor_is_refused_when_it_is_asked_for_and_others_are_not(bundle: Bundle) -> None:
    path = file_of(bundle)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # the last tensor of the file
    path.write_bytes(content)
    weights = open_weights(bundle)
    np.testing.assert_array_equal(weights["embed.table"], GIVEN["embed.table"])
    with pytest.raises(BundleError, match=r"'block1\.b' are damaged: their hash differs"):
        weights["block1.b"]
    with pytest.raises(BundleError, match="damaged"):
        weights.get("block1.b")
    assert weights.unchecked("block1.b").shape == GIVEN["block1.b"].shape


def without(name: str) -> bytes:
    kept = {n: tensor for n, tensor in GIVEN.items() if n != name}
    return b"".join(encode_tensors(kept, {}))


def with_other(name: str, tensor: np.ndarray) -> bytes:
    return b"".join(encode_tensors({**GIVEN, name: tensor}, {}))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be used"),
        (b"no tensors here", "cannot be used"),
        (with_other("block1.b", np.zeros(16, np.float32))[:-4], "does not lie where"),
        (without("block1.w"), r"lack 'block1\.w'"),
        (with_other("block1.b", np.zeros(17, np.float32)), r"lack 'block1\.b'"),
        (with_other("block1.b", np.zeros(16, np.float16)), r"lack 'block1\.b'"),
    ],
)
def test_file_that_does_not_fit_its_manifest_is_refused(
    bundle: Bundle, content: bytes, reason: str
) -> None:
    file_of(bundle).write_bytes(content)
    with pytest.raises(BundleError, match=reason):
        open_weights(bundle)


def test_missing_and_foreign_files_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    path = file_of(bundle)
    outside = tmp_path / "elsewhere"
    path.rename(outside)
    with pytest.raises(BundleError, match="lacks weights"):
        open_weights(bundle)
    path.symlink_to(outside)
    with pytest.raises(BundleError, match="outside the bundle"):
        open_weights(bundle)
    with pytest.raises(BundleError, match="without its weights"):
        open_weights(dataclasses.replace(bundle, directory=None))


def test_tied_copy_is_found_under_its_owners_name(tmp_path: Path) -> None:
    bundle = tiny_bundle()
    tensors = tuple(
        dataclasses.replace(t, tied_to="block1.w") if t.name == "block3.w" else t
        for t in bundle.manifest.tensors
    )
    tied = dataclasses.replace(bundle.manifest, tensors=tensors)
    made = write_weighted(tmp_path / "tied", dataclasses.replace(bundle, manifest=tied), GIVEN)
    weights = open_weights(made)
    np.testing.assert_array_equal(weights["block3.w"], GIVEN["block1.w"])


def test_misaligned_tensor_is_read_all_the_same(tmp_path: Path) -> None:
    odd = {"a": np.arange(3, dtype=np.uint8), "b": np.arange(4, dtype=np.float32)}
    path = tmp_path / "odd.safetensors"
    path.write_bytes(b"".join(encode_tensors(odd, {})))
    tensors = [tensor_of(name, array) for name, array in odd.items()]
    weights = open_segment_weights(path, tensors)
    assert weights is not None
    np.testing.assert_array_equal(weights["b"], odd["b"])


def tensor_of(name: str, array: np.ndarray) -> Tensor:
    like = tiny_bundle().manifest.tensors[0]
    return dataclasses.replace(
        like, name=name, shape=array.shape, dtype=array.dtype.name, digest=tensor_digest(array)
    )


def test_segment_needs_its_own_weights_and_after_a_checkpoint_the_frozen_ones(
    bundle: Bundle,
) -> None:
    manifest = bundle.manifest
    assert [t.name for t in needed_weights(manifest, 2, resumed=False)] == ["block1.w", "block1.b"]
    assert needed_weights(manifest, 1, resumed=False) == ()
    assert needed_weights(manifest, 2, resumed=True) == ()
    frozen = [
        dataclasses.replace(t, binding="frozen") if t.name == "block1.w" else t
        for t in manifest.tensors
    ]
    manifest = dataclasses.replace(manifest, tensors=tuple(frozen))
    assert [t.name for t in needed_weights(manifest, 2, resumed=True)] == ["block1.w"]


def write_segment(path: Path, tensors: list[Tensor]) -> None:
    writer = SegmentWeightsWriter(path, tensors)
    for tensor in tensors:
        content = bytes(raw_bytes(GIVEN[tensor.name]))
        writer.write(content[:7])
        writer.write(content[7:])
    writer.commit()
    writer.discard()


def test_segment_weights_are_read_back(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "weights" / "segment-0002.safetensors"
    tensors = list(needed_weights(bundle.manifest, 2, resumed=False))
    assert open_segment_weights(path, tensors) is None
    write_segment(path, tensors)
    weights = open_segment_weights(path, tensors)
    assert weights is not None
    assert {n: weights[n].tobytes() for n in weights} == {
        t.name: GIVEN[t.name].tobytes() for t in tensors
    }
    other = [*tensors, bundle.manifest.tensor("embed.table")]
    assert open_segment_weights(path, other) is None
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    assert open_segment_weights(path, tensors) is None


def test_discarded_segment_leaves_nothing(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "weights" / "segment-0002.safetensors"
    writer = SegmentWeightsWriter(path, needed_weights(bundle.manifest, 2, resumed=False))
    writer.write(b"half")
    writer.discard()
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("linked", [True, False])
def test_kept_weights_are_whole(
    bundle: Bundle, tmp_path: Path, linked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not linked:
        monkeypatch.setattr(store.os, "link", refuse)
    kept = tmp_path / "run"
    kept.mkdir()
    keep_weights(bundle, kept)
    target = kept / "weights.safetensors"
    assert target.read_bytes() == file_of(bundle).read_bytes()
    assert target.samefile(file_of(bundle)) == linked
    keep_weights(dataclasses.replace(bundle, directory=kept), kept)  # a resumed run's own
    assert [path.name for path in kept.iterdir()] == ["weights.safetensors"]


def refuse(source: os.PathLike[str], target: os.PathLike[str]) -> None:
    raise PermissionError(1, "not permitted")


def test_weights_that_cannot_be_kept_end_the_session(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be stored"):
        keep_weights(bundle, tmp_path / "absent")


def test_bundle_without_weights_keeps_none(tmp_path: Path) -> None:
    keep_weights(tiny_bundle(), tmp_path)
    assert list(tmp_path.iterdir()) == []
