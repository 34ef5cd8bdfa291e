"""Write a checked bundle to a directory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from p2ptrain.bundle.graph_checks import check_graph
from p2ptrain.bundle.manifest import Manifest, parse_manifest
from p2ptrain.errors import ConfigError
from p2ptrain.graph.export import Bundle
from p2ptrain.graph.measured import Measured


def write_bundle(directory: Path, bundle: Bundle, checks: Iterable[Measured]) -> Manifest:
    """Write graphs, then the manifest, which makes the directory a bundle; gives the manifest.

    Graph files of an earlier export that the new manifest does not name are removed.

    Raises:
        BundleError: a peer would refuse the bundle; nothing was written.
        ConfigError: the directory cannot be written.
    """
    noted = {row.name: float(f"{row.error:.2g}") for row in checks}
    manifest = replace(bundle.manifest, checks=noted)
    content = manifest.to_bytes()
    parse_manifest(content)
    for digest, graph in bundle.files.items():
        check_graph(manifest, digest, graph)
    try:
        graphs = directory / "graphs"
        graphs.mkdir(parents=True, exist_ok=True)
        (directory / "manifest.json").unlink(missing_ok=True)
        for old in graphs.glob("*.onnx"):
            if old.stem not in manifest.graphs:
                old.unlink()
        for digest, graph in bundle.files.items():
            (graphs / f"{digest}.onnx").write_bytes(graph)
        (directory / "manifest.json").write_bytes(content)
    except OSError as error:
        raise ConfigError(f"cannot write {directory}: {error.strerror}") from error
    return manifest
