"""Write `trained.onnx`: the inference graph with the run's tensors inside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from p2ptrain.bundle.onnx_reader import read_graph
from p2ptrain.bundle.protobuf import append_initialisers
from p2ptrain.engine.contract import Array
from p2ptrain.errors import ConfigError
from p2ptrain.store.atomic import write_atomic
from p2ptrain.store.bundles import Bundle
from p2ptrain.store.runs import CheckpointRecord, RunDirectory
from p2ptrain.store.weights import Weights
from p2ptrain.training.contract import Contract
from p2ptrain.training.random import draw_tensor
from p2ptrain.training.segment_state import read_segment_state


def write_trained_model(
    path: Path,
    *,
    bundle: Bundle,
    weights: Weights,
    contract: Contract,
    directory: RunDirectory,
    checkpoint: CheckpointRecord,
) -> None:
    """Turn a checkpoint into a model that stock onnxruntime loads; blocking.

    Raises:
        CheckpointError: a segment is damaged; the file is not written.
        BundleError: the weights are damaged, or the model is over 2 GiB; nor is it.
        ConfigError: the place cannot be written to; the run itself is safe.
    """
    graph = bundle.graph(bundle.manifest.inference.graph)
    read = {name for node in read_graph(graph).nodes for name in node.inputs}
    tensors = final_tensors(bundle, weights, contract, directory, checkpoint)
    needed = ((name, tensor) for name, tensor in tensors if name in read)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, append_initialisers(graph, needed))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror or error}",
            hint="the run is stored: write the model elsewhere with --resume RUN --out FILE",
        ) from error


def final_tensors(
    bundle: Bundle,
    weights: Weights,
    contract: Contract,
    directory: RunDirectory,
    checkpoint: CheckpointRecord,
) -> Iterator[tuple[str, Array]]:
    """Every tensor of the model after a checkpoint's step, segment by segment.

    What is trained and running values come from the checkpoint, one segment in memory at a time;
    frozen tensors come from the weights or are drawn. Errors are those of `write_trained_model`.
    """
    manifest = bundle.manifest
    names = [tensor.name for tensor in manifest.tensors]
    state_names = manifest.updates[contract.optimizer.name].state
    for saved in checkpoint.segments:
        content = directory.read_segment(checkpoint.step, saved)
        stored = read_segment_state(
            content, manifest, bundle=bundle.digest, state_names=state_names
        )
        yield from stored.state.tensors.items()
        yield from stored.state.running.items()
        for tensor in manifest.segment_tensors(saved.segment):
            if tensor.binding == "frozen" and tensor.digest is not None:
                yield tensor.name, weights[tensor.name]
            elif tensor.binding == "frozen":
                index = names.index(tensor.name)
                yield tensor.name, draw_tensor(manifest, contract.seed, index)
