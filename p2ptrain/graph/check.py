"""Compare a bundle with its source before it is written: losses, gradients, updates, inference.

The bundle's graphs run segment by segment, as a run would; the source's reference computes the
model in float64 with the same parameters, inputs and dropout masks.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from p2ptrain.bundle.manifest import Loss, Manifest
from p2ptrain.bundle.protobuf import append_initialisers
from p2ptrain.graph.check_steps import Microbatch, step_rows, wanted_step
from p2ptrain.graph.check_updates import update_row
from p2ptrain.graph.export import Bundle
from p2ptrain.graph.measured import (
    GRADIENT_ERROR_MAX,
    Measured,
    refuse_failed,
    relative_error,
)
from p2ptrain.graph.runner import Arrays, Runner, session_of
from p2ptrain.graph.source import LABELS, LOSS_WEIGHT, Source
from p2ptrain.training.adapters import merged_weight
from p2ptrain.training.random import draw_parameter

SEQUENCE: Final = "sequence"


def verify(source: Source, bundle: Bundle) -> tuple[Measured, ...]:
    """Compare everything; the rows are also what the manifest keeps.

    Raises:
        GraphError: a row is over its limit; nothing may be written.
    """
    rows = compare(source, bundle)
    refuse_failed(rows)
    return rows


def compare(source: Source, bundle: Bundle) -> tuple[Measured, ...]:
    """All rows, whether they pass or not."""
    manifest = bundle.manifest
    runner = Runner(manifest=manifest, files=bundle.files)
    values = check_values(source, manifest)
    merged = merge_adapters(manifest, values)
    rows: list[Measured] = []
    gradients: list[Arrays] = []
    has_masks = any(kind.masks for kind in manifest.kinds.values())
    for masked in ("open masks", "random masks") if has_masks else ("",):
        masks = check_masks(manifest, source.example, masked=masked == "random masks")
        on = Microbatch(masked=masked, values=values, merged=merged, masks=masks)
        wanted = wanted_step(source, manifest, on, dtype="float64")
        gradients.append(wanted.gradients)
        rows += step_rows(source, runner, on, wanted)
    moved = {name: values[name] for name in gradients[0]}
    rows += [update_row(runner, moved, gradients, name) for name in sorted(manifest.updates)]
    rows.append(_evaluation_row(source, runner, values, merged))
    rows.append(_inference_row(source, bundle, merged))
    return tuple(rows)


def check_values(source: Source, manifest: Manifest) -> Arrays:
    """Every tensor: shipped values as they are, drawn ones with some noise, copies alike.

    The noise moves zeros and ones off their values, and gives attention something to attend to;
    running values keep their sign, since variances are among them.
    """
    generator = np.random.Generator(np.random.Philox(11))
    values: Arrays = {}
    for index, tensor in enumerate(manifest.tensors):
        if tensor.tied_to is not None:
            values[tensor.name] = values[tensor.tied_to]
        elif tensor.name in source.weights:
            values[tensor.name] = source.weights[tensor.name].astype(np.float32)
        else:
            noise = generator.standard_normal(tensor.shape).astype(np.float32)
            drawn = draw_parameter(0, tensor, index)
            if tensor.binding == "running" and tensor.initialiser.kind == "ones":
                noise = np.abs(noise)
            values[tensor.name] = drawn + np.float32(0.05) * noise
    return values


def check_masks(manifest: Manifest, example: Arrays, *, masked: bool) -> list[Arrays]:
    """Per segment: masks of ones, or of 0 and 1 / (1 - p)."""
    generator = np.random.Generator(np.random.Philox(13))
    batch = example[manifest.data_ports[0].value.name].shape[0]
    drawn = []
    for segment in manifest.segments:
        masks: Arrays = {}
        for site in manifest.kinds[segment.kind].masks:
            shape = manifest.shape(site.value, batch=batch)
            open_ = generator.random(shape) >= site.probability * masked
            scale = 1.0 / (1.0 - site.probability) if masked else 1.0
            masks[site.value.name] = open_.astype(np.float32) * np.float32(scale)
        drawn.append(masks)
    return drawn


def merge_adapters(manifest: Manifest, values: Arrays) -> Arrays:
    """The model's own tensors: copies and adapters left out, adapters added to what they adapt."""
    merged: Arrays = {}
    parts = {name for t in manifest.tensors if t.adapter for name in (t.adapter.down, t.adapter.up)}
    for tensor in manifest.tensors:
        if tensor.tied_to is not None or tensor.name in parts:
            continue
        merged[tensor.name] = values[tensor.name]
        if tensor.adapter is not None:
            down, up = values[tensor.adapter.down], values[tensor.adapter.up]
            merged[tensor.name] = merged_weight(
                values[tensor.name], down=down, up=up, adapter=tensor.adapter
            )
    return merged


def _evaluation_row(source: Source, runner: Runner, values: Arrays, merged: Arrays) -> Measured:
    """The loss of an evaluation against the loss of the reference's logits."""
    masks = check_masks(runner.manifest, source.example, masked=False)
    found = runner.evaluate(parameters=values, inputs=source.example, masks=masks)
    logits = source.reference.infer(merged, source.example)
    summed = loss_of_logits(source.loss, logits.astype(float), source.example[LABELS])
    wanted = summed * float(source.example[LOSS_WEIGHT])
    error = abs(found - wanted) / abs(wanted)
    return Measured(name="evaluation loss", error=error, limit=GRADIENT_ERROR_MAX)


def loss_of_logits(loss: Loss, logits: NDArray[Any], labels: NDArray[Any]) -> float:
    """The summed loss in float64. (Any: float64 logits; int64 or float32 labels.)"""
    if loss.kind == "mse":
        return float(((logits - labels) ** 2).sum())
    if loss.kind == "l1":
        return float(np.abs(logits - labels).sum())
    if loss.kind == "bce":
        return float((np.logaddexp(0.0, logits) - labels * logits).sum())
    rows, flat = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    logarithms = rows - np.logaddexp.reduce(rows, axis=1, keepdims=True)
    counted = np.flatnonzero(flat != loss.ignore_index)
    hard = -logarithms[counted, flat[counted]].sum()
    soft = -logarithms[counted].mean(axis=1).sum()
    return float((1.0 - loss.label_smoothing) * hard + loss.label_smoothing * soft)


def _inference_row(source: Source, bundle: Bundle, merged: Arrays) -> Measured:
    """Logits of the inference graph with its weights appended, on half the context if it can."""
    inference = bundle.manifest.inference
    content = bundle.files[inference.graph]
    session = session_of(b"".join(append_initialisers(content, merged.items())))
    feeds = {}
    for value in inference.inputs:
        array = source.example[value.name]
        half = tuple(
            slice(0, max(1, size // 2)) if axis == SEQUENCE else slice(None)
            for axis, size in zip(value.shape, array.shape, strict=True)
        )
        feeds[value.name] = np.ascontiguousarray(array[half])
    found = session.run([inference.output.name], feeds)[0]
    error, _ = relative_error({"logits": found}, {"logits": source.reference.infer(merged, feeds)})
    return Measured(name="inference logits", error=error, limit=GRADIENT_ERROR_MAX)
