"""The model that a run has made: each of its own tensors, wherever its values lie.

Trained tensors and running values come from the checkpoint, frozen ones from the bundle's weights
or from the draw. Adapters are merged into what they adapt, and copies of a tied tensor are left
out, so that names, shapes and values are those of the model before it was cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from p2ptrain.bundle.manifest import Manifest, Tensor
from p2ptrain.engine.contract import Array
from p2ptrain.store.bundles import Bundle
from p2ptrain.store.runs import CheckpointRecord, RunDirectory
from p2ptrain.store.weights import open_weights
from p2ptrain.training.adapters import merged_weight
from p2ptrain.training.contract import Contract
from p2ptrain.training.random import draw_tensor
from p2ptrain.training.safetensors import encode_head, raw_bytes
from p2ptrain.training.segment_state import read_segment_state


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedRun:
    """A checkpoint, and what it is read with."""

    bundle: Bundle
    contract: Contract
    directory: RunDirectory
    checkpoint: CheckpointRecord


def own_tensors(manifest: Manifest) -> tuple[Tensor, ...]:
    """The tensors that the model had before it was cut, segment by segment."""
    segments = range(len(manifest.segments))
    return tuple(tensor for index in segments for tensor in _segment_tensors(manifest, index))


def trained_tensors(run: TrainedRun) -> Iterator[tuple[str, Array]]:
    """Name and value of every own tensor, in the order of `own_tensors`; blocking.

    One segment is in memory at a time.

    Raises:
        CheckpointError: a segment is damaged.
        BundleError: the bundle's weights are missing or damaged.
    """
    manifest = run.bundle.manifest
    weights = open_weights(run.bundle)
    state_names = manifest.updates[run.contract.optimizer.name].state
    for saved in run.checkpoint.segments:
        content = run.directory.read_segment(run.checkpoint.step, saved)
        stored = read_segment_state(
            content, manifest, bundle=run.bundle.digest, state_names=state_names
        )
        values = {**stored.state.tensors, **stored.state.running}
        for tensor in _segment_tensors(manifest, saved.segment):
            value = values.get(tensor.name)
            if value is None:
                value = _frozen(manifest, tensor, weights, seed=run.contract.seed)
            yield tensor.name, _merged(tensor, value, values)


def safetensors_chunks(run: TrainedRun) -> Iterator[bytes | memoryview]:
    """The model as a safetensors file that torch and transformers load; raises as above."""
    own = own_tensors(run.bundle.manifest)
    # transformers refuses a file that does not name its framework.
    yield encode_head({t.name: (np.dtype(t.dtype), t.shape) for t in own}, {"format": "pt"})
    for _, value in trained_tensors(run):
        yield raw_bytes(value)


def _segment_tensors(manifest: Manifest, segment_index: int) -> tuple[Tensor, ...]:
    adapters = [tensor.adapter for tensor in manifest.tensors if tensor.adapter is not None]
    parts = {name for adapter in adapters for name in (adapter.down, adapter.up)}
    return tuple(
        tensor
        for tensor in (
            *manifest.segment_tensors(segment_index),
            *manifest.segment_running(segment_index),
        )
        if tensor.tied_to is None and tensor.name not in parts
    )


def _frozen(
    manifest: Manifest, tensor: Tensor, weights: Mapping[str, Array], *, seed: int
) -> Array:
    if tensor.digest is not None:
        return weights[tensor.name]
    names = [each.name for each in manifest.tensors]
    return draw_tensor(manifest, seed, names.index(tensor.name))


def _merged(tensor: Tensor, value: Array, values: Mapping[str, Array]) -> Array:
    adapter = tensor.adapter
    if adapter is None:
        return value
    down, up = values[adapter.down], values[adapter.up]
    return merged_weight(value, down=down, up=up, adapter=adapter)
