"""Hold onnxruntime-training's artifacts against the bundle: three steps of each, from one start."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from p2ptrain.graph.check import check_masks, check_values
from p2ptrain.graph.check_steps import sum_over_copies
from p2ptrain.graph.export import Bundle
from p2ptrain.graph.measured import Measured
from p2ptrain.graph.ort_artifacts import (
    CHECKPOINT,
    EVALUATION_MODEL,
    OPTIMIZER_MODEL,
    TRAINING_MODEL,
    write_ort_artifacts,
)
from p2ptrain.graph.runner import Arrays, Runner
from p2ptrain.graph.source import LABELS, LOSS_WEIGHT, Source
from p2ptrain.training.contract import OptimizerChoice
from p2ptrain.training.optimizer import optimizer_scalars

STEPS: Final = 3
RATE: Final = 1e-3
LOSS_ERROR_MAX: Final = 1e-5
MOVEMENT_ERROR_MAX: Final = 1e-3
FLOOR: Final = 0.1
OPTIMIZER: Final = OptimizerChoice(epsilon=1e-3)
"""A large epsilon: AdamW divides rounding noise by the size of a gradient, and where the true one
is zero (attention's key bias) its steps would be made of that noise, on either side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trained:
    losses: tuple[float, ...]
    parameters: Arrays


def artifact_rows(source: Source, bundle: Bundle) -> tuple[Measured, ...]:
    """Losses of three AdamW steps, and how far the parameters then are from each other.

    Both sides start from the same values and see the same microbatch, without dropout. The
    losses' difference is relative to the first one, since three steps may learn a few samples by
    heart; the parameters' to how far they moved, or to a tenth of the longest way.

    Raises:
        GraphError: onnxruntime-training refuses the model.
    """
    values = check_values(source, bundle.manifest)
    start = {name: values[name] for name in source.training.parameters}
    with tempfile.TemporaryDirectory(prefix="p2ptrain-artifacts-") as folder:
        write_ort_artifacts(Path(folder), source, start, optimizer=OPTIMIZER, dropout=False)
        theirs = _artifact_steps(Path(folder), source)
    ours = _bundle_steps(source, bundle, values)
    moved = {n: float(np.abs(theirs.parameters[n] - start[n]).max()) for n in start}
    least = FLOOR * max(moved.values())
    distances = {
        name: float(np.abs(ours.parameters[name] - theirs.parameters[name]).max())
        / max(moved[name], least)
        for name in start
    }
    worst = max(distances, key=lambda name: distances[name])
    pairs = zip(ours.losses, theirs.losses, strict=True)
    return (
        Measured(
            name=f"artifacts, losses of {STEPS} steps",
            error=max(abs(a - b) for a, b in pairs) / abs(theirs.losses[0]),
            limit=LOSS_ERROR_MAX,
        ),
        Measured(
            name=f"artifacts, {STEPS} AdamW steps",
            error=distances[worst],
            limit=MOVEMENT_ERROR_MAX,
            worst=worst,
        ),
    )


def _artifact_steps(folder: Path, source: Source) -> _Trained:
    from onnxruntime.training.api import CheckpointState, Module, Optimizer

    state = CheckpointState.load_checkpoint(str(folder / CHECKPOINT))
    module = Module(str(folder / TRAINING_MODEL), state, str(folder / EVALUATION_MODEL))
    optimizer = Optimizer(str(folder / OPTIMIZER_MODEL), module)
    optimizer.set_learning_rate(RATE)
    module.train()
    feeds = [source.example[name] for name in (*source.data_inputs, LABELS, LOSS_WEIGHT)]
    losses = []
    for _ in range(STEPS):
        losses.append(float(module(*feeds)))
        optimizer.step()
        module.lazy_reset_grad()
    found = {n: np.array(state.parameters[n].data) for n in source.training.parameters}
    return _Trained(losses=tuple(losses), parameters=found)


def _bundle_steps(source: Source, bundle: Bundle, values: Arrays) -> _Trained:
    manifest = bundle.manifest
    runner = Runner(manifest=manifest, files=bundle.files)
    masks = check_masks(manifest, source.example, masked=False)
    present = {name: values[name].copy() for name in source.training.parameters}
    moments: dict[str, Arrays] = {}
    losses = []
    for step in range(1, STEPS + 1):
        given = _with_copies(bundle, present, values)
        ran = runner.step(form="portable", parameters=given, inputs=source.example, masks=masks)
        losses.append(float(ran.loss))
        gradients = sum_over_copies(manifest, ran.gradients)
        for name, gradient in gradients.items():
            present[name] = _updated(runner, step, present[name], gradient, moments, name)
    return _Trained(losses=tuple(losses), parameters=present)


def _with_copies(bundle: Bundle, present: Arrays, values: Arrays) -> Arrays:
    given = dict(values)
    for tensor in bundle.manifest.tensors:
        given[tensor.name] = present.get(tensor.tied_to or tensor.name, values[tensor.name])
    return given


def _updated(
    runner: Runner, step: int, value: Any, gradient: Any, moments: dict[str, Arrays], name: str
) -> Any:  # Any: float32 arrays
    """One AdamW step by the bundle's graph, decaying every parameter as the artifacts do."""
    rule = runner.manifest.updates["adamw"]
    zero = {f"state.{each}": np.zeros(value.size, np.float32) for each in rule.state}
    scalars: Mapping[str, float] = optimizer_scalars(
        OPTIMIZER, step=step, learning_rate=RATE, clip_scale=1.0, decay=True
    )
    feeds = {
        "parameter": value.reshape(-1),
        "gradient": gradient.reshape(-1),
        **moments.get(name, zero),
        **{key: np.array(scalars[key], np.float32) for key in rule.scalars},
    }
    out = runner.run(rule.graph, feeds, frozen={})
    moments[name] = {f"state.{each}": out[f"new.state.{each}"] for each in rule.state}
    return out["new.parameter"].reshape(value.shape)
