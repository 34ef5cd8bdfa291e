"""How often a trained classifier is right: accuracy on a file of labelled records, and by class.

    python tools/evaluate_classifier.py --model BUNDLE --trained trained.onnx --data heldout.jsonl

The records are read as training reads them. A bundle without class names takes them from the
training data, so give that with --training if the records may lack a class.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.data.opening import open_records, wanted_by
from p2ptrain.data.options import DataOptions
from p2ptrain.data.records import Records
from p2ptrain.engine.contract import Engine, Program
from p2ptrain.engine.onnxruntime_engine import open_engine
from p2ptrain.errors import ConfigError, NumericsError, P2PTrainError
from p2ptrain.store.bundles import find_bundle, load_bundle

Array = NDArray[Any]  # Any: the ports' dtypes
BATCH_MAX = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassCount:
    """How the records of one class fared."""

    name: str
    records: int
    """That have this label."""
    right: int
    """Of them, how many the model knew."""
    chosen: int
    """How many records the model took for this class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a model did on labelled records."""

    classes: tuple[ClassCount, ...]

    @property
    def records(self) -> int:
        return sum(each.records for each in self.classes)

    @property
    def right(self) -> int:
        return sum(each.right for each in self.classes)

    @property
    def accuracy(self) -> float:
        return self.right / self.records

    @property
    def commonest_share(self) -> float:
        """The accuracy of always saying the commonest class."""
        return max(each.records for each in self.classes) / self.records


@click.command()
@click.option("--model", required=True, help="The bundle's folder, or its name.")
@click.option("--trained", type=click.Path(path_type=Path), required=True, help="Its ONNX file.")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Labelled records.")
@click.option(
    "--training", type=click.Path(path_type=Path), help="Data that names the classes, if not these."
)
@click.option("--text-field", help="As for `p2ptrain train`.")
@click.option("--label-field", help="As for `p2ptrain train`.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def main(
    model: str,
    trained: Path,
    data: Path,
    training: Path | None,
    text_field: str | None,
    label_field: str | None,
    threads: int,
    as_json: bool,
) -> None:
    """Print how many records of --data a trained classifier gets right."""
    options = DataOptions(text_field=text_field, label_field=label_field)
    try:
        folder = find_bundle(model)
        manifest = load_bundle(folder).manifest
        with tempfile.TemporaryDirectory() as cache:
            records = read_records(manifest, folder, data, training, options, Path(cache))
            engine = open_engine(threads=threads)
            evaluation = evaluate(engine, read_trained(trained), manifest, records)
    except P2PTrainError as error:
        click.echo(f"p2ptrain: {error.message}", err=True)
        click.echo(f"p2ptrain: hint: {error.hint}", err=True)
        raise SystemExit(error.exit_code) from error
    click.echo(json.dumps(_report(evaluation), indent=1) if as_json else _table(evaluation))


def read_records(
    manifest: Manifest,
    folder: Path,
    data: Path,
    training: Path | None,
    options: DataOptions,
    cache: Path,
) -> Records:
    """The records, with classes numbered as training numbers them.

    Raises:
        ConfigError: the model tells no classes apart, or one per token.
        DataError: as for training.
    """
    classes = manifest.data.classes
    if classes < 2 or manifest.shape(manifest.inference.output, batch=1) != (1, classes):
        raise ConfigError("the model does not choose one of several classes for each record")
    wanted = wanted_by(manifest, folder, options, cache)
    if training is not None:
        names = open_records(training, wanted).class_names
        wanted = dataclasses.replace(wanted, class_names=names)
    return open_records(data, wanted)


def read_trained(path: Path) -> bytes:
    """The content of a trained model; ConfigError when there is none."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def evaluate(engine: Engine, trained: bytes, manifest: Manifest, records: Records) -> Evaluation:
    """Ask the model about every record once.

    Raises:
        DataError: a record cannot be read.
        EngineError: onnxruntime refuses the file.
        NumericsError: a logit is not finite.
    """
    program = engine.compile(trained)
    labels, chosen = [], []
    for first in range(0, records.count, BATCH_MAX):
        feed = records.feed(range(first, min(first + BATCH_MAX, records.count)))
        values = {
            port.value.name: array
            for port, array in zip(manifest.data_ports, feed.inputs, strict=True)
        }
        logits_BC = run(engine, program, manifest, values, size=len(feed.labels))
        labels.append(_class_indices(feed.labels))
        chosen.append(logits_BC.argmax(axis=1))
    classes = manifest.data.classes
    names = records.class_names or tuple(str(index) for index in range(classes))
    return count(np.concatenate(labels), np.concatenate(chosen), names)


def run(
    engine: Engine,
    program: Program,
    manifest: Manifest,
    values: Mapping[str, Array],
    *,
    size: int,
) -> Array:
    """Logits (B, C) of one batch of `size` records; raises as `evaluate`."""
    output = manifest.inference.output
    logits = engine.allocate(manifest.shape(output, batch=size), output.dtype)
    binding = program.bind()
    for value in manifest.inference.inputs:
        binding.set_input(value.name, engine.wrap(values[value.name]))
    binding.set_output(output.name, logits)
    binding.run()
    if not np.isfinite(logits.host()).all():
        raise NumericsError("the model gives a logit that is not finite")
    return logits.host()


def count(labels_N: Array, chosen_N: Array, names: Sequence[str]) -> Evaluation:
    """How each class fared, from labels and choices, numbers from 0 to C - 1."""
    right_N = labels_N == chosen_N
    return Evaluation(
        classes=tuple(
            ClassCount(
                name=name,
                records=int((labels_N == index).sum()),
                right=int(right_N[labels_N == index].sum()),
                chosen=int((chosen_N == index).sum()),
            )
            for index, name in enumerate(names)
        )
    )


def _class_indices(labels: Array) -> Array:
    """Labels (B,) as they are; one-hot ones (B, C) by their largest value."""
    return labels.argmax(axis=1) if labels.ndim == 2 else labels


def _report(evaluation: Evaluation) -> dict[str, Any]:  # Any: JSON
    return {
        "version": 1,
        "records": evaluation.records,
        "right": evaluation.right,
        "accuracy": evaluation.accuracy,
        "commonest_share": evaluation.commonest_share,
        "classes": [dataclasses.asdict(each) for each in evaluation.classes],
    }


def _table(evaluation: Evaluation) -> str:
    lines = [f"{'class':20} {'records':>8} {'right':>8} {'chosen':>8}"]
    lines += [
        f"{each.name:20} {each.records:8} {each.right:8} {each.chosen:8}"
        for each in evaluation.classes
    ]
    lines.append(
        f"accuracy {evaluation.accuracy:.1%}: {evaluation.right} of {evaluation.records} records; "
        f"always the commonest class: {evaluation.commonest_share:.1%}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
