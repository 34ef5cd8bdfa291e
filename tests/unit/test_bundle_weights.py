"""Bundles with weights as the exporter writes them: what the peer's side reads back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.errors import GraphError, InvariantBroken
from p2ptrain.graph.export import Bundle
from p2ptrain.graph.weights import with_weights
from p2ptrain.graph.write import write_bundle
from p2ptrain.store.bundles import load_bundle
from p2ptrain.store.weights import open_weights
from p2ptrain.training.random import parameters_digest
from p2ptrain.training.safetensors import decode_tensors, tensor_digest
from tests.bundles import graph_files
from tests.varied_bundle import varied_bundle
from tests.weights import some_weights

VARIED = varied_bundle()
NAMES = ("start.table", "mix1.mean", "fixed.w", "block0.b")
GIVEN = some_weights(VARIED, NAMES)


def exported(weights: dict[str, np.ndarray], **more: object) -> Bundle:
    return Bundle(
        manifest=with_weights(VARIED.manifest, weights), files=dict(graph_files(VARIED)),
        weights=weights, **more,
    )  # fmt: skip


def reads(directory: Path) -> Manifest:
    return load_bundle(directory).manifest


def test_written_weights_are_what_a_peer_maps(tmp_path: Path) -> None:
    manifest = write_bundle(tmp_path, exported({**GIVEN, "unknown": np.zeros(3)}), ())
    weights = open_weights(load_bundle(tmp_path))
    assert set(weights) == {*NAMES, "head.table"}
    for name in NAMES:
        np.testing.assert_array_equal(weights[name], GIVEN[name])
    np.testing.assert_array_equal(weights["head.table"], GIVEN["start.table"])
    assert manifest.weights is not None
    assert {t.name for t in manifest.tensors if t.digest is not None} == {*NAMES, "head.table"}


def test_a_tied_copy_is_not_written_twice(tmp_path: Path) -> None:
    write_bundle(tmp_path, exported(GIVEN), ())
    file = decode_tensors((tmp_path / "weights.safetensors").read_bytes())
    assert list(file.tensors) == [t.name for t in VARIED.manifest.tensors if t.name in NAMES]


def test_the_golden_digest_is_of_what_is_still_drawn() -> None:
    plain, shipped = VARIED.manifest, with_weights(VARIED.manifest, GIVEN)
    assert shipped.golden_parameters == parameters_digest(shipped, 0)
    assert shipped.golden_parameters != plain.golden_parameters
    assert with_weights(plain, {"unknown": np.zeros(3)}) is plain


def test_values_are_stored_with_the_manifests_dtype_and_in_order() -> None:
    turned = np.asfortranarray(GIVEN["fixed.w"].astype(np.float64))
    same = with_weights(VARIED.manifest, {"fixed.w": turned})
    assert same.tensor("fixed.w").digest == tensor_digest(GIVEN["fixed.w"])
    assert same == with_weights(VARIED.manifest, {"fixed.w": GIVEN["fixed.w"]})


def test_another_export_leaves_nothing_of_the_one_before(tmp_path: Path) -> None:
    write_bundle(tmp_path, exported(GIVEN, further={"tokenizer.json": b"{}"}), ())
    assert (tmp_path / "tokenizer.json").read_bytes() == b"{}"
    write_bundle(tmp_path, exported({}), ())
    assert {path.name for path in tmp_path.iterdir()} == {"graphs", "manifest.json"}
    assert reads(tmp_path).weights is None


def test_a_value_of_another_shape_is_refused() -> None:
    with pytest.raises(GraphError, match=r"have 'fixed\.w' as \(2, 2\), the graph as \(16, 16\)"):
        with_weights(VARIED.manifest, {"fixed.w": np.zeros((2, 2), np.float32)})


def test_a_file_without_a_place_in_a_bundle_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(InvariantBroken, match=r"\.\./elsewhere"):
        write_bundle(tmp_path, exported({}, further={"../elsewhere": b""}), ())
    assert list(tmp_path.iterdir()) == []
