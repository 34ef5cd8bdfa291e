"""Bundles are hostile until checked."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import p2ptrain
from p2ptrain.errors import BundleError, NotFound
from p2ptrain.ids import Digest
from p2ptrain.store.bundles import (
    Bundle,
    bundle_from_parts,
    find_bundle,
    load_bundle,
    shipped_bundles,
)
from tests.bundles import graph_files, tiny_bundle, write_bundle


@pytest.fixture(scope="module")
def tiny() -> Bundle:
    return tiny_bundle(blocks=1)


@pytest.fixture
def directory(tmp_path: Path, tiny: Bundle) -> Path:
    return write_bundle(tmp_path / "tiny", tiny)


def first_graph(directory: Path) -> Path:
    return sorted((directory / "graphs").iterdir())[0]


def test_load_bundle_reads_what_was_written(directory: Path, tiny: Bundle) -> None:
    loaded = load_bundle(directory)
    loaded.check()
    assert loaded.digest == tiny.digest == tiny.manifest.digest
    assert graph_files(loaded) == graph_files(tiny)


def test_load_bundle_has_one_digest_however_the_file_is_laid_out(
    directory: Path, tiny: Bundle
) -> None:
    document = json.loads((directory / "manifest.json").read_bytes())
    (directory / "manifest.json").write_text(json.dumps(document))
    assert load_bundle(directory).digest == tiny.digest


def test_load_bundle_says_what_is_missing(tmp_path: Path, directory: Path) -> None:
    with pytest.raises(NotFound, match="no bundle directory"):
        load_bundle(tmp_path / "absent")
    with pytest.raises(BundleError, match="not a bundle"):
        load_bundle(tmp_path)
    first_graph(directory).unlink()
    with pytest.raises(BundleError, match="lacks"):
        load_bundle(directory).check()


def test_load_bundle_refuses_an_unknown_version(directory: Path) -> None:
    document = json.loads((directory / "manifest.json").read_bytes())
    (directory / "manifest.json").write_text(json.dumps({**document, "version": 99}))
    with pytest.raises(BundleError, match="version 99") as caught:
        load_bundle(directory)
    assert "update" in caught.value.hint


@pytest.mark.parametrize("damage", ["flip", "shorter", "longer"])
def test_load_bundle_refuses_a_damaged_graph(directory: Path, damage: str) -> None:
    path = first_graph(directory)
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    path.write_bytes(
        content[:-1] if damage == "shorter" else content + b"\0" * (damage == "longer")
    )
    with pytest.raises(BundleError, match=r"damaged|bytes"):
        load_bundle(directory).check()


@pytest.mark.skipif(os.name != "posix", reason="symbolic links")
def test_load_bundle_refuses_files_outside_the_bundle(directory: Path, tmp_path: Path) -> None:
    path = first_graph(directory)
    outside = path.rename(tmp_path / "outside.onnx")
    path.symlink_to(outside)
    with pytest.raises(BundleError, match="outside the bundle"):
        load_bundle(directory).check()
    manifest = (directory / "manifest.json").rename(tmp_path / "manifest.json")
    (directory / "manifest.json").symlink_to(manifest)
    with pytest.raises(BundleError, match="outside the bundle"):
        load_bundle(directory)


def test_load_bundle_refuses_a_directory_in_place_of_a_graph(directory: Path) -> None:
    path = first_graph(directory)
    path.unlink()
    path.mkdir()
    with pytest.raises(BundleError, match="not a regular file"):
        load_bundle(directory).check()


def test_bundle_graph_opens_nothing_the_manifest_does_not_list(directory: Path) -> None:
    (directory / "secret.onnx").write_bytes(b"x")
    with pytest.raises(BundleError, match="no graph"):
        load_bundle(directory).graph(Digest("../secret"))


def test_bundle_from_parts_refuses_wrong_graphs(tiny: Bundle) -> None:
    digest, content = next(iter(graph_files(tiny).items()))
    for wrong in (content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
        with pytest.raises(BundleError):
            bundle_from_parts(tiny.manifest_bytes, {digest: wrong})
    with pytest.raises(BundleError, match="not in the manifest"):
        bundle_from_parts(tiny.manifest_bytes, {Digest("0" * 64): content})
    with pytest.raises(BundleError, match="came without"):
        bundle_from_parts(tiny.manifest_bytes, {}).check()


def test_find_bundle_prefers_a_path_then_what_is_shipped(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "p2ptrain"
    package.mkdir(parents=True)
    monkeypatch.setattr(p2ptrain, "__file__", str(package / "__init__.py"))
    shipped = package / "bundles" / "small"
    shipped.parent.mkdir()
    directory.rename(shipped)
    assert find_bundle(str(shipped)) == shipped
    assert find_bundle("small") == find_bundle("onnx_models/small") == shipped
    assert shipped_bundles() == {"small": shipped}
    with pytest.raises(NotFound, match="'other'") as caught:
        find_bundle("other")
    assert "small" in caught.value.hint
