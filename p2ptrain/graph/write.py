"""Write a checked bundle to a directory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Final

from p2ptrain.bundle.graph_checks import check_graph
from p2ptrain.bundle.manifest import Manifest
from p2ptrain.bundle.reading import parse_manifest
from p2ptrain.errors import ConfigError, InvariantBroken
from p2ptrain.graph.export import Bundle
from p2ptrain.graph.measured import Measured
from p2ptrain.graph.weights import weights_file

MANIFEST: Final = "manifest.json"
WEIGHTS: Final = "weights.safetensors"
FURTHER: Final = ("tokenizer.json",)
"""What else a bundle may hold."""


def write_bundle(directory: Path, bundle: Bundle, checks: Iterable[Measured]) -> Manifest:
    """Write graphs and weights, then the manifest, which makes the directory a bundle.

    Files of an earlier export that do not belong to this one are removed. Gives the manifest.

    Raises:
        BundleError: a peer would refuse the bundle; nothing was written.
        ConfigError: the directory cannot be written.
    """
    noted = {row.name: float(f"{row.error:.2g}") for row in checks}
    manifest = replace(bundle.manifest, checks=noted)
    content = manifest.to_bytes()
    parse_manifest(content)
    unknown = set(bundle.further) - set(FURTHER)
    if unknown:
        raise InvariantBroken(f"{sorted(unknown)} have no place in a bundle")
    for digest, graph in bundle.files.items():
        check_graph(manifest, digest, graph)
    try:
        (directory / "graphs").mkdir(parents=True, exist_ok=True)
        (directory / MANIFEST).unlink(missing_ok=True)
        _remove_old(directory, bundle)
        for digest, graph in bundle.files.items():
            (directory / "graphs" / f"{digest}.onnx").write_bytes(graph)
        for name, further in bundle.further.items():
            (directory / name).write_bytes(further)
        _write_weights(directory / WEIGHTS, bundle)
        (directory / MANIFEST).write_bytes(content)
    except OSError as error:
        raise ConfigError(f"cannot write {directory}: {error.strerror}") from error
    return manifest


def _remove_old(directory: Path, bundle: Bundle) -> None:
    for old in (directory / "graphs").glob("*.onnx"):
        if old.stem not in bundle.manifest.graphs:
            old.unlink()
    for name in (WEIGHTS, *FURTHER):
        if name not in bundle.further:
            (directory / name).unlink(missing_ok=True)


def _write_weights(path: Path, bundle: Bundle) -> None:
    if bundle.manifest.weights is None:
        return
    with path.open("wb") as file:
        file.writelines(weights_file(bundle.manifest, bundle.weights))
