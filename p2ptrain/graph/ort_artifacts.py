"""The whole model as onnxruntime-training's own four artifacts, for people who train with its API.

`training_model.onnx`, `eval_model.onnx`, `optimizer_model.onnx` and `checkpoint`, as its on-device
training reads them. They hold what a bundle does not need: one graph for the whole model, dropout
drawn by the runtime, AdamW with one weight decay for every parameter.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from p2ptrain.errors import ConfigError, GraphError
from p2ptrain.graph.canonical import state_extra_outputs
from p2ptrain.graph.ir import IR_VERSION, OPSET, Graph, to_model
from p2ptrain.graph.source import Source
from p2ptrain.graph.views import drop_identities
from p2ptrain.training.contract import OptimizerChoice

Array = NDArray[Any]  # Any: float32

TRAINING_MODEL: Final = "training_model.onnx"
EVALUATION_MODEL: Final = "eval_model.onnx"
OPTIMIZER_MODEL: Final = "optimizer_model.onnx"
CHECKPOINT: Final = "checkpoint"
_AS_TORCH: Final = 0


def write_ort_artifacts(
    directory: Path,
    source: Source,
    parameters: Mapping[str, Array],
    *,
    optimizer: OptimizerChoice,
    dropout: bool = True,
) -> None:
    """Write the four files.

    Args:
        directory: Made when it is missing.
        source: The model; its training graph ends in the scalar loss.
        parameters: Starting values by name, float32.
        optimizer: Moments, epsilon and weight decay of the AdamW that is written; its learning
            rate is set by whoever trains.
        dropout: False writes every dropout with probability 0, for comparisons.

    Raises:
        GraphError: the runtime's own gradient builder cannot train the whole graph (batch
            normalisation with running statistics), or is not installed.
        ConfigError: the directory cannot be written.
    """
    graph = _prepared(source, dropout=dropout)
    model = to_model(graph, name=source.name)
    for name in source.training.parameters:
        model.graph.initializer.append(numpy_helper.from_array(parameters[name], name))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _generate(model, source, optimizer, directory)
        for name in (TRAINING_MODEL, EVALUATION_MODEL, OPTIMIZER_MODEL):
            _settle(directory / name)
    except OSError as error:
        raise ConfigError(f"cannot write {directory}: {error.strerror}") from error


def _prepared(source: Source, *, dropout: bool) -> Graph:
    """The traced graph with the extra outputs that the gradient builder asks for."""
    graph = source.training.graph.copy()
    graph.inputs = {
        name: known
        for name, known in graph.inputs.items()
        if name not in source.training.parameters
    }
    unknown = set(graph.inputs) - {*source.data_inputs, "labels", "loss_weight"}
    if unknown:
        raise GraphError(
            f"onnxruntime-training cannot carry the running values {sorted(unknown)[:3]}",
            hint="leave --ort-artifacts out: it has no gradient for such normalisation",
        )
    state_extra_outputs(graph)
    drop_identities(graph)
    for node in graph.nodes:
        if node.op_type == "Dropout":
            _state_mask(graph, node, dropout=dropout)
    graph.prune()
    return graph


def _state_mask(graph: Graph, node: onnx.NodeProto, *, dropout: bool) -> None:
    if not dropout and len(node.input) > 1:
        node.input[1] = graph.constant(np.array(0.0, np.float32))
    del node.output[1:]
    node.output.append(graph.fresh("mask"))


def _generate(
    model: onnx.ModelProto, source: Source, optimizer: OptimizerChoice, directory: Path
) -> None:
    artifacts, blocks = _training_package()
    adamw = blocks.optim.AdamW(
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.epsilon,
        weight_decay=optimizer.weight_decay,
    )
    try:
        artifacts.generate_artifacts(
            model,
            requires_grad=list(source.training.parameters),
            frozen_params=[],
            loss=None,
            optimizer=adamw,
            artifact_directory=str(directory),
        )
    except Exception as error:  # the package raises its own untyped exceptions
        raise GraphError(
            f"onnxruntime-training refused the whole model: {str(error)[:200]}",
            hint="leave --ort-artifacts out; the bundle does not need them",
        ) from error


def _training_package() -> tuple[Any, Any]:  # Any: untyped modules
    """The artifact generator and its blocks.

    `onnxruntime.training` imports its optimizers for torch, of which nothing is needed here; it
    is present wherever models are exported.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    for unneeded in ("optim", "ortmodule"):
        name = f"onnxruntime.training.{unneeded}"
        sys.modules.setdefault(name, types.ModuleType(name))
    try:
        from onnxruntime.training import artifacts, onnxblock
    except ImportError as error:
        raise GraphError(
            "onnxruntime-training is not installed",
            hint="pip install 'p2ptrain[export]' on x86-64 Linux, Python 3.11 or 3.12",
        ) from error
    return artifacts, onnxblock


def _settle(path: Path) -> None:
    """onnx writes its newest IR, of which onnxruntime-training reads up to 10; and the generator
    chooses another AdamW than torch's: epsilon before the bias correction, decay after the step."""
    model = onnx.load(str(path))
    for node in model.graph.node:
        for entry in node.attribute:
            if entry.name == "adam_mode":
                entry.i = _AS_TORCH
    model.ir_version = IR_VERSION
    for entry in model.opset_import:
        if not entry.domain:
            entry.version = min(entry.version, OPSET)
    onnx.save(model, str(path))
