"""The model that a run has made: its tensors, wherever their values lie.

Trained tensors and running values come from the checkpoint, frozen ones from the bundle's weights
or from the draw, and adapters are merged into what they adapt. So names, shapes and values are
those of the model before it was cut; only copies of tied tensors are there beside their owners.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from p2ptrain.bundle.manifest import Manifest, Tensor
from p2ptrain.engine.contract import Array
from p2ptrain.store.bundles import Bundle
from p2ptrain.store.runs import CheckpointRecord, RunDirectory
from p2ptrain.store.weights import Weights
from p2ptrain.training.adapters import merged_weight
from p2ptrain.training.contract import Contract
from p2ptrain.training.random import draw_tensor
from p2ptrain.training.safetensors import encode_head, raw_bytes
from p2ptrain.training.segment_state import read_segment_state


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedRun:
    """A checkpoint, and what it is read with."""

    bundle: Bundle
    weights: Weights
    contract: Contract
    directory: RunDirectory
    checkpoint: CheckpointRecord


def own_tensors(manifest: Manifest) -> tuple[Tensor, ...]:
    """The tensors that the model had before it was cut, segment by segment."""
    segments = range(len(manifest.segments))
    every = (tensor for index in segments for tensor in _merged_tensors(manifest, index))
    return tuple(tensor for tensor in every if tensor.tied_to is None)


def final_tensors(run: TrainedRun) -> Iterator[tuple[str, Array]]:
    """Name and value of every tensor but the parts of adapters, segment by segment; blocking.

    One segment is in memory at a time.

    Raises:
        CheckpointError: a segment is damaged.
        BundleError: the weights are damaged.
    """
    manifest = run.bundle.manifest
    state_names = manifest.updates[run.contract.optimizer.name].state
    for saved in run.checkpoint.segments:
        content = run.directory.read_segment(run.checkpoint.step, saved)
        stored = read_segment_state(
            content, manifest, bundle=run.bundle.digest, state_names=state_names
        )
        values = {**stored.state.tensors, **stored.state.running}
        for tensor in _merged_tensors(manifest, saved.segment):
            value = values.get(tensor.name)
            yield (
                tensor.name,
                _merged(tensor, _frozen(run, tensor) if value is None else value, values),
            )


def safetensors_chunks(run: TrainedRun) -> Iterator[bytes | memoryview]:
    """The model as a safetensors file that torch and transformers load; raises as above."""
    own = {tensor.name: tensor for tensor in own_tensors(run.bundle.manifest)}
    described = {name: (np.dtype(t.dtype), t.shape) for name, t in own.items()}
    # transformers refuses a file that does not name its framework.
    yield encode_head(described, {"format": "pt"})
    for name, value in final_tensors(run):
        if name in own:
            yield raw_bytes(value)


def _merged_tensors(manifest: Manifest, segment_index: int) -> tuple[Tensor, ...]:
    """Parameters and running values of a segment without the parts of adapters."""
    adapters = [tensor.adapter for tensor in manifest.tensors if tensor.adapter is not None]
    parts = {name for adapter in adapters for name in (adapter.down, adapter.up)}
    tensors = manifest.segment_tensors(segment_index) + manifest.segment_running(segment_index)
    return tuple(tensor for tensor in tensors if tensor.name not in parts)


def _frozen(run: TrainedRun, tensor: Tensor) -> Array:
    if tensor.digest is not None:
        return run.weights[tensor.name]
    manifest = run.bundle.manifest
    names = [each.name for each in manifest.tensors]
    return draw_tensor(manifest, run.contract.seed, names.index(tensor.name))


def _merged(tensor: Tensor, value: Array, values: Mapping[str, Array]) -> Array:
    adapter = tensor.adapter
    if adapter is None:
        return value
    down, up = values[adapter.down], values[adapter.up]
    return merged_weight(value, down=down, up=up, adapter=adapter)
