"""Write what a run has made: `trained.onnx` for inference, and a safetensors file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from p2ptrain.bundle.onnx_reader import read_graph
from p2ptrain.bundle.protobuf import append_initialisers
from p2ptrain.errors import ConfigError
from p2ptrain.runtime.home.trained_weights import TrainedRun, final_tensors, safetensors_chunks
from p2ptrain.store.atomic import write_atomic


def write_trained_model(path: Path, run: TrainedRun) -> None:
    """Turn a checkpoint into a model that stock onnxruntime loads; blocking.

    Raises:
        CheckpointError: a segment is damaged; the file is not written.
        BundleError: the weights are damaged, or the model is over 2 GiB; nor is it.
        ConfigError: the place cannot be written to; the run itself is safe.
    """
    graph = run.bundle.graph(run.bundle.manifest.inference.graph)
    read = {name for node in read_graph(graph).nodes for name in node.inputs}
    needed = ((name, tensor) for name, tensor in final_tensors(run) if name in read)
    _write(path, append_initialisers(graph, needed), option="--out")


def write_trained_safetensors(path: Path, run: TrainedRun) -> None:
    """Write the model's tensors under their own names; blocking, and raises as above."""
    _write(path, safetensors_chunks(run), option="--safetensors")


def _write(path: Path, chunks: Iterable[bytes | memoryview], *, option: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, chunks)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror or error}",
            hint=f"the run is stored: write the model elsewhere with --resume RUN {option} FILE",
        ) from error
