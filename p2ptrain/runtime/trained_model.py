"""Write `trained.onnx`: the inference graph with the run's parameters inside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from p2ptrain.bundle.protobuf import append_initialisers
from p2ptrain.errors import ConfigError
from p2ptrain.store.atomic import write_atomic
from p2ptrain.store.bundles import Bundle
from p2ptrain.store.runs import CheckpointRecord, RunDirectory
from p2ptrain.training.segment_state import read_segment_state


def write_trained_model(
    path: Path,
    *,
    bundle: Bundle,
    optimizer: str,
    directory: RunDirectory,
    checkpoint: CheckpointRecord,
) -> None:
    """Turn a checkpoint into a model that stock onnxruntime loads; blocking.

    Raises:
        CheckpointError: a segment is damaged; the file is not written.
        ConfigError: the place cannot be written to; the run itself is safe.
    """
    graph = bundle.graph(bundle.manifest.inference.graph)
    tensors = _tensors(bundle, bundle.manifest.updates[optimizer].state, directory, checkpoint)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, append_initialisers(graph, tensors))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror or error}",
            hint="the run is stored: write the model elsewhere with --resume RUN --out FILE",
        ) from error


def _tensors(
    bundle: Bundle,
    state_names: tuple[str, ...],
    directory: RunDirectory,
    checkpoint: CheckpointRecord,
) -> Iterator[tuple[str, np.ndarray]]:
    for saved in checkpoint.segments:
        content = directory.read_segment(checkpoint.step, saved)
        stored = read_segment_state(
            content, bundle.manifest, bundle=bundle.digest, state_names=state_names
        )
        yield from stored.state.tensors.items()
        yield from stored.state.running.items()
