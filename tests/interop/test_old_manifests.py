"""Manifests of earlier format versions are still read."""

import hashlib
from pathlib import Path

from p2ptrain.bundle.manifest import Loss
from p2ptrain.bundle.reading import parse_manifest

GOLDEN = Path(__file__).parent / "golden"


def test_version_1_is_read_as_byte_level_language_modelling() -> None:
    manifest = parse_manifest((GOLDEN / "manifest-v1.json").read_bytes())
    assert manifest.task == "language-modelling"
    assert manifest.loss == Loss(kind="cross-entropy")
    assert manifest.data.kind == "windows"
    assert [value.name for value in manifest.inference.inputs] == ["ids"]
    assert [port.value.name for port in manifest.data_ports] == ["ids"]
    assert manifest.labels_port.value.name == "labels"


def test_version_1_is_written_as_one_that_has_its_fields() -> None:
    manifest = parse_manifest((GOLDEN / "manifest-v1.json").read_bytes())
    again = parse_manifest(manifest.to_bytes())
    assert again == manifest
    assert '"version": 2' in manifest.to_bytes().decode()


def test_version_2_keeps_its_digest_and_has_no_backwards_in_parts() -> None:
    content = (GOLDEN / "manifest-v2.json").read_bytes()
    manifest = parse_manifest(content)
    assert manifest.digest == hashlib.sha256(content).hexdigest()
    assert all(
        pair.parts is None for kind in manifest.kinds.values() for pair in kind.forms.values()
    )


def test_version_3_keeps_its_digest_and_cannot_be_sharded() -> None:
    content = (GOLDEN / "manifest-v3.json").read_bytes()
    manifest = parse_manifest(content)
    assert manifest.digest == hashlib.sha256(content).hexdigest()
    assert not manifest.sharding


def test_version_4_keeps_its_digest_and_its_numbers_of_units() -> None:
    content = (GOLDEN / "manifest-v4.json").read_bytes()
    manifest = parse_manifest(content)
    assert manifest.digest == hashlib.sha256(content).hexdigest()
    assert {
        mode: manifest.units(sharding.kinds["attention"])
        for mode, sharding in manifest.sharding.items()
    } == {"tensor": {"units0": 7}, "sequence": {"positions": 12}}


def test_version_5_is_written_as_it_was_read() -> None:
    content = (GOLDEN / "manifest-v5.json").read_bytes()
    manifest = parse_manifest(content)
    assert manifest.to_bytes() == content
    assert manifest.sharding["sequence"].kinds["attention"].axes == {"positions": "sequence"}
