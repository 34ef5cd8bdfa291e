"""Manifests of earlier format versions are still read."""

from pathlib import Path

from p2ptrain.bundle.manifest import VERSION, Loss, parse_manifest

GOLDEN = Path(__file__).parent / "golden"


def test_version_1_is_read_as_byte_level_language_modelling() -> None:
    manifest = parse_manifest((GOLDEN / "manifest-v1.json").read_bytes())
    assert manifest.task == "language-modelling"
    assert manifest.loss == Loss(kind="cross-entropy")
    assert manifest.data.kind == "windows"
    assert [value.name for value in manifest.inference.inputs] == ["ids"]
    assert [port.value.name for port in manifest.data_ports] == ["ids"]
    assert manifest.labels_port.value.name == "labels"


def test_version_1_is_written_as_the_present_version() -> None:
    manifest = parse_manifest((GOLDEN / "manifest-v1.json").read_bytes())
    again = parse_manifest(manifest.to_bytes())
    assert again == manifest
    assert f'"version": {VERSION}' in manifest.to_bytes().decode()
