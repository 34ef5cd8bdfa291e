"""The whole model as onnxruntime-training's own artifacts, compared with the bundle's graphs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from p2ptrain.errors import GraphError
from p2ptrain.graph import check_artifacts
from p2ptrain.graph.check_artifacts import artifact_rows
from p2ptrain.graph.export import Bundle
from p2ptrain.graph.ort_artifacts import (
    CHECKPOINT,
    EVALUATION_MODEL,
    OPTIMIZER_MODEL,
    TRAINING_MODEL,
    write_ort_artifacts,
)
from p2ptrain.graph.source import Source
from p2ptrain.training.contract import OptimizerChoice

pytestmark = pytest.mark.export
FILES = {CHECKPOINT, EVALUATION_MODEL, OPTIMIZER_MODEL, TRAINING_MODEL}


def test_three_steps_of_the_artifacts_equal_ours(source: Source, bundle: Bundle) -> None:
    for row in artifact_rows(source, bundle):
        assert row.passed, f"{row.name}: {row.error:.1e}, worst in {row.worst}"


def test_another_learning_rate_on_one_side_is_noticed(
    source: Source, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    decay = dataclasses.replace(check_artifacts.OPTIMIZER, weight_decay=0.5)
    original = check_artifacts.optimizer_scalars

    def other(choice: OptimizerChoice, **rest: float) -> dict[str, float]:
        return original(decay, **rest)  # type: ignore[arg-type]  # the keywords are passed on

    monkeypatch.setattr(check_artifacts, "optimizer_scalars", other)
    assert not all(row.passed for row in artifact_rows(source, bundle))


def test_four_files_are_written_with_dropout_and_load(source: Source, tmp_path: Path) -> None:
    from onnxruntime.training.api import CheckpointState, Module

    start = {
        name: np.zeros([int(a) for a in source.training.graph.axes(name)], np.float32)
        for name in source.training.parameters
    }
    write_ort_artifacts(tmp_path, source, start, optimizer=OptimizerChoice())
    assert {path.name for path in tmp_path.iterdir()} == FILES
    state = CheckpointState.load_checkpoint(str(tmp_path / CHECKPOINT))
    module = Module(str(tmp_path / TRAINING_MODEL), state, str(tmp_path / EVALUATION_MODEL))
    assert set(module.input_names()) == {*source.data_inputs, "labels", "loss_weight"}


def test_running_values_are_refused(source: Source, tmp_path: Path) -> None:
    graph = source.training.graph.copy()
    graph.inputs["norm.running_mean"] = graph.inputs["loss_weight"]
    traced = dataclasses.replace(source.training, graph=graph)
    with pytest.raises(GraphError, match=r"norm\.running_mean") as raised:
        write_ort_artifacts(
            tmp_path,
            dataclasses.replace(source, training=traced),
            {},
            optimizer=OptimizerChoice(),
        )
    assert "--ort-artifacts" in raised.value.hint
