"""Export a torch decoder to a bundle: `python tools/export_model.py --help`."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.errors import ConfigError, P2PTrainError
from p2ptrain.graph.check import Measured, verify
from p2ptrain.graph.export import Bundle, export
from p2ptrain.graph.torch_export import Description, decoder_source
from p2ptrain.graph.write import write_bundle


@click.command()
@click.option("--model", required=True, help="Factory of the torch module, MODULE:FUNCTION.")
@click.option("--arg", "arguments", multiple=True, help="NAME=VALUE for the factory; repeatable.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Bundle directory.")
@click.option("--name", required=True, help="The bundle's name.")
@click.option("--description", default="", help="One sentence for the manifest.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def main(
    model: str, arguments: tuple[str, ...], out: Path, name: str, description: str, as_json: bool
) -> None:
    """Trace, cut, differentiate and check a torch decoder, then write its bundle."""
    console = Console(stderr=True)
    started = time.monotonic()
    try:
        module = _build(model, arguments)
        about = Description(
            name=name,
            description=description,
            vocabulary=module.vocabulary,
            context=module.context,
        )
        with _quiet_runtime():
            bundle = export(decoder_source(module, about))
            rows = verify(module, bundle)
        manifest = write_bundle(out, bundle, rows)
    except P2PTrainError as error:
        click.echo(f"p2ptrain: {error.message}", err=True)
        click.echo(f"p2ptrain: hint: {error.hint}", err=True)
        raise SystemExit(error.exit_code) from error
    seconds = time.monotonic() - started
    if as_json:
        click.echo(json.dumps(_report(manifest, bundle, rows, out, seconds), indent=1))
    else:
        _print_tables(console, manifest, rows)
        console.print(
            f"{out}: {manifest.parameter_count / 1e6:.2f} M parameters, "
            f"{len(bundle.files)} graphs, {_graph_bytes(bundle) / 1e3:.0f} kB, {seconds:.0f} s"
        )


def _build(model: str, arguments: tuple[str, ...]) -> Any:  # Any: a torch module
    place, separator, factory_name = model.partition(":")
    if not separator:
        raise ConfigError(f"--model {model!r} is not MODULE:FUNCTION")
    try:
        factory = getattr(importlib.import_module(place), factory_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"--model {model!r}: {error}") from error
    given = dict(_argument(text) for text in arguments)
    try:
        module = factory(**given)
    except TypeError as error:
        raise ConfigError(f"--model {model!r}: {error}") from error
    for needed in ("vocabulary", "context"):
        if not isinstance(getattr(module, needed, None), int):
            raise ConfigError(f"--model {model!r}: the module has no integer {needed!r}")
    return module


def _argument(text: str) -> tuple[str, Any]:  # Any: numbers, true, false or text
    name, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"--arg {text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


@contextlib.contextmanager
def _quiet_runtime() -> Iterator[None]:
    """onnxruntime's gradient builder writes its log to file descriptor 2; keep ours readable."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def _print_tables(console: Console, manifest: Manifest, rows: tuple[Measured, ...]) -> None:
    kinds = Table("kind", "segments", "MFLOP forward", "backward", "stash kB per sample")
    for name, kind in manifest.kinds.items():
        places = [i for i, segment in enumerate(manifest.segments) if segment.kind == name]
        stash = manifest.stash_bytes(places[0], form="portable", batch=1)
        kinds.add_row(
            name,
            str(len(places)),
            f"{kind.forward_flops / 1e6:.1f}",
            f"{kind.backward_flops / 1e6:.1f}",
            f"{stash / 1e3:.0f}",
        )
    checks = Table("against torch", "error", "limit", "worst in")
    for row in rows:
        checks.add_row(row.name, f"{row.error:.1e}", f"{row.limit:.0e}", row.worst)
    console.print(kinds)
    console.print(checks)


def _graph_bytes(bundle: Bundle) -> int:
    return sum(len(content) for content in bundle.files.values())


def _report(
    manifest: Manifest, bundle: Bundle, rows: tuple[Measured, ...], out: Path, seconds: float
) -> dict[str, Any]:  # Any: JSON
    return {
        "version": 1,
        "path": str(out),
        "digest": manifest.digest,
        "parameters": manifest.parameter_count,
        "segments": [segment.name for segment in manifest.segments],
        "graph_bytes": _graph_bytes(bundle),
        "stash_bytes_per_sample": sum(
            manifest.stash_bytes(i, form="portable", batch=1) for i in range(len(manifest.segments))
        ),
        "checks": {row.name: row.error for row in rows},
        "seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    main()
