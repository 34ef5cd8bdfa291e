"""Export a model to a bundle: `python tools/export_model.py --help`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from p2ptrain.bundle.manifest import LOSSES, TASKS, Manifest
from p2ptrain.errors import ConfigError, P2PTrainError
from p2ptrain.graph.fine_tuning import FineTuning, parse_lora
from p2ptrain.graph.sources.choose import source_of, with_extras
from p2ptrain.graph.sources.requests import Request, parse_arguments

if TYPE_CHECKING:
    from p2ptrain.graph.export import Bundle
    from p2ptrain.graph.measured import Measured
    from p2ptrain.graph.source import Source


@click.command()
@click.option(
    "--model",
    required=True,
    help="What to export: MODULE:FUNCTION that makes a torch module, a Hugging Face model folder "
    "or its config.json, or an ONNX file.",
)
@click.option(
    "--arg",
    "arguments",
    multiple=True,
    help="NAME=VALUE for the function, or a field of the configuration; repeatable.",
)
@click.option("--task", help=f"What it learns: {', '.join(TASKS)}; else what the model says.")
@click.option("--loss", help=f"{', '.join(LOSSES)}; else the task's usual one.")
@click.option("--label-smoothing", default=0.0, show_default=True, help="Of cross-entropy.")
@click.option("--context", type=int, help="Tokens of a sample; else as many as the model takes.")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    help="NAME=DTYPE:batch,SIZE,... of a data input that the model does not describe; a size is a "
    "number or `sequence`; repeatable.",
)
@click.option("--no-weights", is_flag=True, help="Draw all parameters, whatever the folder holds.")
@click.option("--segments", type=int, help="About how many segments; else where little crosses.")
@click.option(
    "--cut",
    "cuts",
    multiple=True,
    help="Cut behind this value or module, and only there; repeatable.",
)
@click.option(
    "--lora",
    help="r=RANK,alpha=SCALE,targets=PATTERN,...: train low-rank adapters beside these matrices of "
    "linears (targets=all: beside all of them) and freeze the rest. [default alpha: r]",
)
@click.option(
    "--freeze", multiple=True, help="Leave parameters as they are; a pattern, repeatable."
)
@click.option(
    "--train", multiple=True, help="Train these and freeze the rest; a pattern, repeatable."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Bundle directory.")
@click.option(
    "--ort-artifacts",
    "artifacts",
    type=click.Path(path_type=Path),
    help="Also write onnxruntime-training's own training, evaluation and optimizer models and its "
    "checkpoint here, checked by three steps.",
)
@click.option("--name", required=True, help="The bundle's name.")
@click.option("--description", default="", help="One sentence for the manifest.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def main(
    model: str,
    arguments: tuple[str, ...],
    lora: str | None,
    freeze: tuple[str, ...],
    train: tuple[str, ...],
    out: Path,
    artifacts: Path | None,
    as_json: bool,
    no_weights: bool,
    **asked: Any,  # Any: the options that `Request` holds
) -> None:
    """Trace, cut, differentiate and check a model, then write its bundle."""
    try:
        adapters = None if lora is None else parse_lora(lora)
        request = Request(
            arguments=parse_arguments(arguments),
            tuning=FineTuning(lora=adapters, freeze=freeze, train=train),
            use_weights=not no_weights,
            **asked,
        )
        with os.fdopen(os.dup(2), "w") as stderr:  # the original, while the runtime's is away
            console = Console(file=stderr)
            _export(model, request, out, artifacts, console=console, as_json=as_json)
    except P2PTrainError as error:
        click.echo(f"p2ptrain: {error.message}", err=True)
        click.echo(f"p2ptrain: hint: {error.hint}", err=True)
        raise SystemExit(error.exit_code) from error


def _export(
    model: str,
    request: Request,
    out: Path,
    artifacts: Path | None,
    *,
    console: Console,
    as_json: bool,
) -> None:
    started = time.monotonic()
    with console.status("reading and tracing the model"), with_extras(), _quiet_runtime():
        from p2ptrain.graph.check import compare
        from p2ptrain.graph.check_parts import settle_parts
        from p2ptrain.graph.export import export
        from p2ptrain.graph.measured import refuse_failed
        from p2ptrain.graph.write import write_bundle

        source = source_of(model, request)
        frozen = frozenset(request.tuning.frozen(source.training.parameters))
    with console.status("cutting and differentiating"), _quiet_runtime():
        bundle = export(
            source,
            frozen=frozen,
            lora=request.tuning.lora,
            segments=request.segments,
            cuts=request.cuts,
        )
    with console.status("checking against the model"), _quiet_runtime():
        bundle = settle_parts(source, bundle)
        rows = compare(source, bundle)
        if artifacts is not None:
            rows += _artifacts(source, bundle, artifacts)
    if not as_json:
        _print_tables(console, bundle, rows)
    refuse_failed(rows)
    manifest = write_bundle(out, bundle, rows)
    seconds = time.monotonic() - started
    if as_json:
        click.echo(json.dumps(_report(manifest, bundle, rows, out, seconds), indent=1))
        return
    console.print(
        f"{out}: {manifest.parameter_count / 1e6:.2f} M parameters, "
        f"{_trained_count(manifest) / 1e6:.2f} M of them trained, "
        f"{len(bundle.files)} graphs, {_graph_bytes(bundle) / 1e3:.0f} kB, {seconds:.0f} s"
    )


def _artifacts(source: Source, bundle: Bundle, directory: Path) -> tuple[Measured, ...]:
    """Write onnxruntime-training's own files; the rows of their check, which must pass first."""
    from p2ptrain.graph.check_artifacts import artifact_rows
    from p2ptrain.graph.measured import refuse_failed
    from p2ptrain.graph.ort_artifacts import write_ort_artifacts
    from p2ptrain.training.contract import OptimizerChoice
    from p2ptrain.training.random import draw_tensor

    if any(tensor.binding == "frozen" for tensor in bundle.manifest.tensors):
        raise ConfigError(
            "--ort-artifacts writes models that are trained whole",
            hint="leave --freeze, --train and --lora out, or --ort-artifacts",
        )
    rows = artifact_rows(source, bundle)
    refuse_failed(rows)
    places = {tensor.name: index for index, tensor in enumerate(bundle.manifest.tensors)}
    start = {
        name: source.weights[name]
        if name in source.weights
        else draw_tensor(bundle.manifest, 0, places[name])
        for name in source.training.parameters
    }
    write_ort_artifacts(directory, source, start, optimizer=OptimizerChoice())
    return rows


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


def _print_tables(console: Console, bundle: Bundle, rows: tuple[Measured, ...]) -> None:
    manifest = bundle.manifest
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
    checks = Table("against the model", "error", "limit", "worst in")
    for row in rows:
        worst = "; ".join(filter(None, (row.worst, row.note)))
        checks.add_row(row.name, f"{row.error:.1e}", f"{row.limit:.0e}", worst)
    segments = Table("segment", "bytes crossing per sample", "values", "cut because")
    for cut in bundle.cuts.rows:
        segments.add_row(cut.segment, str(cut.bytes), ", ".join(cut.values), cut.reason)
    console.print(segments)
    for note in bundle.cuts.notes:
        console.print(note)
    console.print(kinds)
    console.print(checks)


def _trained_count(manifest: Manifest) -> int:
    """Elements of trainable tensors; a tied one counts once, as it has one gradient."""
    trained = (t for t in manifest.tensors if t.binding == "trainable" and t.tied_to is None)
    return sum(tensor.elements for tensor in trained)


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
        "trained": _trained_count(manifest),
        "segments": [segment.name for segment in manifest.segments],
        "cuts": [
            {"segment": cut.segment, "bytes": cut.bytes, "reason": cut.reason}
            for cut in bundle.cuts.rows
        ],
        "graph_bytes": _graph_bytes(bundle),
        "stash_bytes_per_sample": sum(
            manifest.stash_bytes(i, form="portable", batch=1) for i in range(len(manifest.segments))
        ),
        "checks": {row.name: row.error for row in rows},
        "seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    main()
