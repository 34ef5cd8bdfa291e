"""Hold every shipped bundle against torch on several runtimes; write a table: `--help` says how.

Torch computes in float64 what is right, once; each runtime then computes the same in a process of
its own (`tools/bench/parity_worker.py`). Torch's own float32 stands beside them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from p2ptrain.store.bundles import load_bundle, shipped_bundles
from p2ptrain.training.random import draw_parameter

if TYPE_CHECKING:
    from p2ptrain.bundle.manifest import Manifest
    from p2ptrain.graph.runner import Arrays
    from p2ptrain.graph.source import Source

ROOT: Final = Path(__file__).resolve().parents[1]
PAGE: Final = ROOT / "onnx_models" / "README.md"
BEGIN: Final = "<!-- parity table: begin -->"
END: Final = "<!-- parity table: end -->"
STOCK: Final = (".venv-stock/bin/python", ".venv-stock-3.13/bin/python")
STEPS: Final = 20
LEARNING_RATE: Final = 0.01
LEARNING_RATE_NORMED: Final = 1e-5
"""Of a model with BatchNorm, where rounding grows from step to step."""
MOMENTUM: Final = 0.9
TIMEOUT_S: Final = 900
SOURCES: Final = {
    "bert-mini": ("onnx_models.bert:bert", "sequence-classification"),
    "gpt-nano": ("onnx_models.gpt:gpt", None),
    "llama-nano": ("onnx_models.llama:llama", None),
    "mlp": ("onnx_models.mlp:mlp", "image-classification"),
    "mobilenet-v2": ("onnx_models.mobilenet:mobilenet", "image-classification"),
    "vit-tiny": ("onnx_models.vit:vit", "image-classification"),
}
"""What each bundle was exported from: factory and task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One runtime and form beside torch in float64."""

    bundle: str
    runtime: str
    form: str
    gradient_error: float
    """DESIGN section 10; the worse of open and random masks."""
    worst: str
    loss: float
    """After STEPS steps."""
    loss_error: float
    """Relative."""


@click.command()
@click.option(
    "--python",
    "pythons",
    multiple=True,
    help="Interpreter of another runtime; repeatable. [default: the stock environments]",
)
@click.option("--check", is_flag=True, help="Only see whether every shipped bundle has its rows.")
def main(pythons: tuple[str, ...], check: bool) -> None:
    """Write the parity table into onnx_models/README.md, in the export environment."""
    if check:
        lacking = bundles_without_rows(PAGE.read_text(encoding="utf-8"), shipped_bundles())
        for name in lacking:
            click.echo(f"{PAGE.name}: the parity table has no row of {name}", err=True)
        raise SystemExit(1 if lacking else 0)
    stock = [str(ROOT / place) for place in STOCK if (ROOT / place).exists()]
    rows: list[Row] = []
    for name in sorted(shipped_bundles()):
        click.echo(f"{name} ...", err=True)
        with tempfile.TemporaryDirectory() as folder:
            rows += rows_of(name, Path(folder), (sys.executable, *(pythons or stock)))
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), table(rows)), encoding="utf-8")


def rows_of(name: str, folder: Path, pythons: Sequence[str]) -> list[Row]:
    """Torch in float32, then each interpreter's runtime."""
    from p2ptrain.graph.measured import gradient_error

    manifest = load_bundle(shipped_bundles()[name]).manifest
    source = source_named(name)
    exact, loss = by_torch(source, manifest, "float64")
    plain, plain_loss = by_torch(source, manifest, "float32")
    error, worst = max(gradient_error(*pair) for pair in zip(plain, exact, strict=True))
    rows = [row(name, "torch", "float32", error, worst, plain_loss, loss)]
    write_expected(folder, source, manifest, exact)
    for python in pythons:
        for found in ask_runtime(python, folder, name):
            rows.append(
                row(
                    name, found["runtime"], found["form"], found["error"], found["worst"],
                    found["loss"], loss,
                )
            )  # fmt: skip
    return rows


def row(
    name: str, runtime: str, form: str, error: float, worst: str, loss: float, wanted: float
) -> Row:
    """A row with the loss's relative error."""
    return Row(
        bundle=name,
        runtime=runtime,
        form=form,
        gradient_error=error,
        worst=worst,
        loss=loss,
        loss_error=abs(loss - wanted) / abs(wanted),
    )


def source_named(name: str) -> Source:
    """The torch side of a shipped bundle."""
    from p2ptrain.graph.sources.choose import source_of
    from p2ptrain.graph.sources.requests import Request

    model, task = SOURCES[name]
    return source_of(model, Request(name=name, task=task))


def by_torch(source: Source, manifest: Manifest, dtype: str) -> tuple[list[Arrays], float]:
    """Gradients with open and with random masks, and the loss after STEPS steps."""
    from p2ptrain.graph.check import check_masks, check_values

    values = check_values(source, manifest)
    gradients = []
    for masked in (False, True):
        masks = flat(check_masks(manifest, source.example, masked=masked))
        step = source.reference.step(values, source.example, masks, dtype=dtype)
        gradients.append(step.gradients)
    return gradients, descend(source, manifest, dtype)


def flat(masks: Iterable[Arrays]) -> list[np.ndarray]:
    """Masks in the order of the model's dropouts."""
    return [mask for segment in masks for mask in segment.values()]


def descend(source: Source, manifest: Manifest, dtype: str) -> float:
    """The loss after STEPS steps of SGD with momentum, from what seed 0 draws, on one batch."""
    from p2ptrain.graph.check import check_masks

    values = drawn(manifest)
    moving: Arrays = {}
    masks = flat(check_masks(manifest, source.example, masked=False))
    rate = learning_rate(manifest)
    for _ in range(STEPS):
        step = source.reference.step(values, source.example, masks, dtype=dtype)
        values |= step.running
        for name, gradient in step.gradients.items():
            moving[name] = MOMENTUM * moving.get(name, np.zeros_like(gradient)) + gradient
            values[name] = values[name] - rate * moving[name]
    return source.reference.step(values, source.example, masks, dtype=dtype).loss


def drawn(manifest: Manifest) -> Arrays:
    """Every tensor as a run with seed 0 draws it."""
    return {t.name: draw_parameter(0, t, index) for index, t in enumerate(manifest.tensors)}


def learning_rate(manifest: Manifest) -> float:
    """Of the descent."""
    normed = any(tensor.binding == "running" for tensor in manifest.tensors)
    return LEARNING_RATE_NORMED if normed else LEARNING_RATE


def write_expected(
    folder: Path, source: Source, manifest: Manifest, gradients: Sequence[Arrays]
) -> None:
    """Files for the workers: values, inputs, and per kind of masks the masks and gradients."""
    from p2ptrain.graph.check import check_masks, check_values

    np.savez(folder / "values.npz", **check_values(source, manifest))
    np.savez(folder / "inputs.npz", **source.example)
    for index, masked in enumerate((False, True)):
        masks = check_masks(manifest, source.example, masked=masked)
        named = {f"{n}/{mask}": v for n, part in enumerate(masks) for mask, v in part.items()}
        np.savez(folder / f"masks-{index}.npz", **named)
        np.savez(folder / f"gradients-{index}.npz", **gradients[index])


def ask_runtime(python: str, folder: Path, name: str) -> list[dict[str, Any]]:  # Any: JSON
    """What an interpreter's runtime computes, form by form."""
    line = [python, "-m", "tools.bench.parity_worker", str(folder), name]
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1"}
    ran = subprocess.run(
        line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        timeout=TIMEOUT_S,
    )  # fmt: skip
    if ran.returncode != 0:
        raise SystemExit(f"parity_table: {python}: {ran.stderr[-2000:]}")
    found: list[dict[str, Any]] = json.loads(ran.stdout)  # Any: JSON
    return found


def table(rows: Sequence[Row]) -> str:
    """Markdown, a line a row."""
    lines = [
        "| model | runtime | form | worst gradient error | in "
        f"| loss after {STEPS} steps | off by |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r.bundle} | {r.runtime} | {r.form} | {r.gradient_error:.1e} | `{r.worst}` "
        f"| {r.loss:.6f} | {r.loss_error:.1e} |"
        for r in rows
    ]
    return "\n".join(lines)


def with_table(page: str, made: str) -> str:
    """The page with the table between its markers."""
    before, _, rest = page.partition(BEGIN)
    _, marker, after = rest.partition(END)
    if not marker:
        raise SystemExit(f"parity_table: {PAGE.name} lacks the markers {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def bundles_without_rows(page: str, names: Iterable[str]) -> list[str]:
    """Bundles that the page's table does not show on both kinds of runtime."""
    _, _, rest = page.partition(BEGIN)
    shown, marker, _ = rest.partition(END)
    lines = shown.splitlines() if marker else []
    return [
        name
        for name in names
        if not all(
            any(line.startswith(f"| {name} | {runtime} ") for line in lines)
            for runtime in ("torch", "onnxruntime-training", "onnxruntime")
        )
    ]


if __name__ == "__main__":
    main()
