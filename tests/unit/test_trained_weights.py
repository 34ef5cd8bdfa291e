"""What a run has made: names and values of the model's own tensors, wherever they lie."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.engine.contract import Array
from p2ptrain.errors import BundleError, CheckpointError
from p2ptrain.runtime.home.trained_weights import (
    TrainedRun,
    final_tensors,
    own_tensors,
    safetensors_chunks,
)
from p2ptrain.store.bundles import Bundle
from p2ptrain.training.random import draw_tensor
from p2ptrain.training.safetensors import decode_tensors, tensor_digest
from p2ptrain.training.segment_state import SegmentState
from tests.adapted_bundle import RANK, SCALE, adapted_bundle
from tests.bundles import WIDTH, contract_for
from tests.stored_runs import store_run
from tests.weights import write_weighted

STEP = 3
DOWN, UP = "fixed.lora_down", "fixed.lora_up"


def value_of(name: str, shape: tuple[int, ...]) -> Array:
    """What training has made of a tensor: anything but its draw."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
    return np.random.Generator(np.random.Philox(seed)).standard_normal(shape).astype(np.float32)


def _state(manifest: Manifest, index: int) -> SegmentState:
    trained = [t for t in manifest.segment_tensors(index) if t.binding == "trainable"]
    values = {t.name: value_of(t.tied_to or t.name, t.shape) for t in trained}
    running = {t.name: value_of(t.name, t.shape) for t in manifest.segment_running(index)}
    zeros = {name: np.zeros_like(value) for name, value in values.items()}
    return SegmentState(tensors=values, state={"m": zeros, "v": zeros}, step=STEP, running=running)


def run_of(path: Path, bundle: Bundle) -> TrainedRun:
    """A run whose trained tensors and running values are all made by `value_of`."""
    states = [_state(bundle.manifest, index) for index in range(len(bundle.manifest.segments))]
    return store_run(path, bundle, contract_for(bundle, seed=11), states)


def test_the_model_s_own_tensors_are_there_once_under_their_names(tmp_path: Path) -> None:
    bundle = adapted_bundle()
    found = list(final_tensors(run_of(tmp_path, bundle)))
    own = [tensor.name for tensor in own_tensors(bundle.manifest)]
    assert [name for name, _ in found] == [*own, "head.table"]
    assert set(own) == {
        "start.table", "mix0.scale", "mix0.mean", "mix1.scale", "mix1.mean", "fixed.w", "fixed.b",
        "block0.w", "block0.b", "block1.w", "block1.b",
    }  # fmt: skip
    for name, value in found:
        if name != "fixed.w":
            owner = bundle.manifest.tensor(name).tied_to or name
            np.testing.assert_array_equal(value, value_of(owner, value.shape))


@pytest.mark.parametrize("shipped", [False, True])
def test_an_adapter_is_merged_into_what_was_drawn_or_shipped(tmp_path: Path, shipped: bool) -> None:
    bundle = adapted_bundle()
    names = [tensor.name for tensor in bundle.manifest.tensors]
    frozen = draw_tensor(bundle.manifest, 11, names.index("fixed.w"))
    if shipped:
        frozen = value_of("elsewhere", (WIDTH, WIDTH))
        bundle = write_weighted(tmp_path / "bundle", bundle, {"fixed.w": frozen})
    merged = dict(final_tensors(run_of(tmp_path, bundle)))["fixed.w"]
    down, up = value_of(DOWN, (RANK, WIDTH)), value_of(UP, (WIDTH, RANK))
    wanted = frozen.astype(float) + SCALE * (up.astype(float) @ down.astype(float)).T
    np.testing.assert_array_equal(merged, wanted.astype(np.float32))


def test_the_safetensors_file_holds_the_same_and_names_its_framework(tmp_path: Path) -> None:
    run = run_of(tmp_path, adapted_bundle())
    file = decode_tensors(b"".join(safetensors_chunks(run)))
    assert file.metadata == {"format": "pt"}
    wanted = dict(final_tensors(run))
    assert list(file.tensors) == [tensor.name for tensor in own_tensors(run.bundle.manifest)]
    assert all(tensor_digest(v) == tensor_digest(wanted[n]) for n, v in file.tensors.items())


def test_a_damaged_segment_or_damaged_weights_are_told(tmp_path: Path) -> None:
    bundle = adapted_bundle()
    given = {"fixed.w": value_of("w", (WIDTH, WIDTH))}
    weighted = write_weighted(tmp_path / "bundle", bundle, given)
    assert weighted.directory is not None
    path = weighted.directory / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x99")
    with pytest.raises(BundleError, match="damaged"):
        list(final_tensors(run_of(tmp_path, weighted)))
    other = run_of(tmp_path / "other", bundle)
    other.directory.write_segment(STEP, 2, b"nothing")
    with pytest.raises(CheckpointError):
        list(safetensors_chunks(other))
