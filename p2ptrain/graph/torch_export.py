"""Trace a torch decoder into ONNX: for training with its loss, and for inference.

torch is imported here only, and only when a function is called.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import onnx

from p2ptrain.errors import GraphError
from p2ptrain.graph.ir import OPSET, Graph, from_model

PREFIX = "model."


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """A traced graph; its parameters are graph inputs under their torch names."""

    graph: Graph
    parameters: tuple[str, ...]


def loss_module(module: Any) -> Any:  # Any: torch modules; torch is not imported here
    """ids, labels, loss_weight -> summed cross-entropy times loss_weight."""
    import torch

    class WithLoss(torch.nn.Module):  # type: ignore[misc]  # torch is untyped here
        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, ids: Any, labels: Any, loss_weight: Any) -> Any:  # Any: torch tensors
            logits = self.model(ids)
            total = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), reduction="sum"
            )
            return total * loss_weight

    return WithLoss()


def trace_training(module: Any, *, context: int) -> Traced:  # Any: a torch module
    """The forward graph with its loss, in training mode (dropout present), batch dynamic.

    Raises:
        GraphError: torch could not export the module; change the module.
    """
    import torch

    wrapped = loss_module(module).train()
    ids = torch.zeros((3, context - 1), dtype=torch.int64)
    axes = _dynamic_axes(context)
    model = _trace(
        wrapped,
        (ids, ids.clone(), torch.ones(())),
        {"ids": axes, "labels": axes, "loss_weight": None},
    )
    return _with_parameter_inputs(model)


def trace_inference(module: Any, *, context: int) -> Traced:  # Any: a torch module
    """ids -> logits in evaluation mode, batch and sequence dynamic.

    Raises:
        GraphError: as above.
    """
    import torch

    was_training = module.training
    ids = torch.zeros((3, context - 1), dtype=torch.int64)
    try:
        model = _trace(_prefixed(module).eval(), (ids,), {"ids": _dynamic_axes(context)})
    finally:
        module.train(was_training)
    return _with_parameter_inputs(model)


def _prefixed(module: Any) -> Any:  # Any: torch modules
    import torch

    class Plain(torch.nn.Module):  # type: ignore[misc]  # torch is untyped here
        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, ids: Any) -> Any:  # Any: torch tensors
            return self.model(ids)

    return Plain()


def _dynamic_axes(context: int) -> dict[int, Any]:  # Any: torch.export.Dim
    import torch

    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    sequence = torch.export.Dim("sequence", min=1, max=context)
    return {0: batch, 1: sequence}


def _trace(
    module: Any, arguments: tuple[Any, ...], dynamic: dict[str, Any]
) -> onnx.ModelProto:  # Any: torch modules and tensors
    import torch

    with _quiet():
        try:
            program = torch.onnx.export(
                module,
                arguments,
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                dynamic_shapes=dynamic,
                verbose=False,
            )
        except Exception as error:
            raise GraphError(
                f"torch could not export the module: {error}",
                hint="write the module in plain tensor operators; see onnx_models/gpt.py",
            ) from error
    if program is None:
        raise GraphError("torch exported nothing")
    model: onnx.ModelProto = program.model_proto
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch warns of training mode, of torchvision and of itself; none of it is news here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _with_parameter_inputs(model: onnx.ModelProto) -> Traced:
    """Move parameters from initialisers to inputs *before* any optimiser sees the graph.

    An optimiser merges initialisers of equal value: the LayerNorm weights of all blocks (all
    ones) would become one tensor, and training would be silently wrong.
    """
    names = []
    kept = []
    for tensor in model.graph.initializer:
        if tensor.name.startswith(PREFIX) and tensor.data_type == onnx.TensorProto.FLOAT:
            names.append(tensor.name)
            model.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
        else:
            kept.append(tensor)
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    optimised = _optimise(model)
    graph = from_model(optimised)
    for name in names:
        _strip_prefix(graph, name)
    return Traced(graph=graph, parameters=tuple(name.removeprefix(PREFIX) for name in names))


def _optimise(model: onnx.ModelProto) -> onnx.ModelProto:
    from onnxscript import optimizer

    optimise: Callable[..., onnx.ModelProto] = optimizer.optimize
    with _quiet():
        return optimise(model)


def _strip_prefix(graph: Graph, name: str) -> None:
    short = name.removeprefix(PREFIX)
    graph.rename(name, short)
    graph.inputs = {(short if n == name else n): t for n, t in graph.inputs.items()}
    graph.types[short] = graph.types.pop(name)
