"""Counting what a classifier gets right, with an engine that knows only the first byte."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from p2ptrain.bundle.manifest import Inference, Manifest, Value
from p2ptrain.data.options import DataOptions
from p2ptrain.data.records import Records
from p2ptrain.errors import ConfigError, DataError, NumericsError
from p2ptrain.ids import Digest
from tests.data_cases import text_model
from tools.evaluate_classifier import BATCH_MAX, count, evaluate, read_records, read_trained

Logits = Callable[[Any], Any]  # Any: arrays


class FirstByteEngine:
    """Computes logits from the first token of each sample, and counts its runs."""

    def __init__(self, logits: Logits) -> None:
        self._logits = logits
        self._bound: dict[str, Any] = {}  # Any: arrays
        self.runs = 0

    def compile(self, graph: bytes) -> FirstByteEngine:
        assert graph == b"trained"
        return self

    def bind(self) -> FirstByteEngine:
        self._bound = {}
        return self

    def wrap(self, array: Any) -> Any:
        return SimpleNamespace(host=lambda: array)

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Any:
        return self.wrap(np.zeros(shape, dtype))

    def set_input(self, name: str, buffer: Any) -> None:
        self._bound[name] = buffer.host()

    def set_output(self, name: str, buffer: Any) -> None:
        assert name == "logits"
        self._bound[name] = buffer.host()

    def run(self) -> None:
        self._bound["logits"][:] = self._logits(self._bound["input_ids"][:, 0])
        self.runs += 1


def model(kind: str = "texts", **changes: object) -> Manifest:
    manifest = text_model(kind, **changes)
    shape = ("batch", "3") if kind == "texts" else ("batch", "sequence", "256")
    inference = Inference(
        graph=Digest("0" * 64),
        inputs=(Value(name="input_ids", shape=("batch", "sequence"), dtype="int64"),),
        output=Value(name="logits", shape=shape, dtype="float32"),
    )
    return dataclasses.replace(manifest, inference=inference)


def by_first_letter(first_B: Any) -> Any:
    return np.eye(3)[np.clip(first_B - ord("a"), 0, 2)]


def records(folder: Path, rows: list[tuple[str, str]], training: Path | None = None) -> Records:
    path = folder / "heldout.jsonl"
    path.write_text("".join(json.dumps({"text": t, "label": n}) + "\n" for t, n in rows))
    return read_records(model(), folder, path, training, DataOptions(), folder / "cache")


def test_every_record_counts_once_and_in_its_class(tmp_path: Path) -> None:
    rows = [("a b", "ant"), ("b b", "bee"), ("c b", "cat"), ("a c", "cat")] * 10 + [("b", "ant")]
    engine = FirstByteEngine(by_first_letter)
    found = evaluate(engine, b"trained", model(), records(tmp_path, rows))  # type: ignore[arg-type]  # a fake
    shown = [(each.name, each.records, each.right, each.chosen) for each in found.classes]
    assert shown == [("ant", 11, 10, 20), ("bee", 10, 10, 11), ("cat", 20, 10, 10)]
    assert (found.records, found.right) == (41, 30)
    assert found.accuracy == 30 / 41
    assert found.commonest_share == 20 / 41
    assert engine.runs == -(-41 // BATCH_MAX)


def test_a_class_that_is_not_there_is_named_by_the_training_data(tmp_path: Path) -> None:
    training = tmp_path / "train.jsonl"
    training.write_text(
        "".join(json.dumps({"text": "x", "label": n}) + "\n" for n in ("cat", "ant", "bee"))
    )
    rows = [("c", "cat"), ("b", "bee")]
    with pytest.raises(DataError, match="2 different labels"):
        records(tmp_path, rows)
    engine = FirstByteEngine(by_first_letter)
    some = records(tmp_path, rows, training)
    found = evaluate(engine, b"trained", model(), some)  # type: ignore[arg-type]  # a fake
    assert [each.records for each in found.classes] == [0, 1, 1]
    assert found.accuracy == 1.0


def test_one_hot_labels_are_classes(tmp_path: Path) -> None:
    manifest = model(labels=(("3",), "float32"), loss="bce")
    path = tmp_path / "heldout.jsonl"
    path.write_text('{"text": "a", "label": 0}\n{"text": "c", "label": 1}\n')
    some = read_records(manifest, tmp_path, path, None, DataOptions(), tmp_path / "cache")
    engine = FirstByteEngine(by_first_letter)
    found = evaluate(engine, b"trained", manifest, some)  # type: ignore[arg-type]  # a fake
    assert [(each.name, each.records, each.chosen) for each in found.classes] == [
        ("0", 1, 1),
        ("1", 1, 0),
        ("2", 0, 1),
    ]


def test_a_logit_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    rows = [("a", "ant"), ("b", "bee"), ("c", "cat")]
    engine = FirstByteEngine(lambda first_B: np.full((len(first_B), 3), np.nan))
    with pytest.raises(NumericsError, match="not finite"):
        evaluate(engine, b"trained", model(), records(tmp_path, rows))  # type: ignore[arg-type]  # a fake


def test_a_model_without_one_choice_per_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one of several classes"):
        read_records(
            model("windows"), tmp_path, tmp_path / "x", None, DataOptions(), tmp_path / "cache"
        )


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nothing\.onnx"):
        read_trained(tmp_path / "nothing.onnx")


def test_counting_names_every_class() -> None:
    found = count(np.array([0, 0, 1]), np.array([0, 1, 1]), ["no", "yes"])
    assert [(each.records, each.right, each.chosen) for each in found.classes] == [
        (2, 1, 1),
        (1, 1, 2),
    ]
