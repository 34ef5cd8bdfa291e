"""Trace a torch module into a graph that ends in its logits.

Parameters are moved from initialisers to inputs *before* any optimiser sees the graph: an
optimiser merges initialisers of equal value, the LayerNorm weights of all blocks (all ones) would
become one tensor, and training would be silently wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import onnx
import torch
from onnx import helper

from p2ptrain.bundle.manifest import BATCH
from p2ptrain.errors import GraphError
from p2ptrain.graph.ir import OPSET, Graph, apply_names, from_model
from p2ptrain.graph.source import LOGITS, Traced
from p2ptrain.graph.sources.inputs import EXAMPLE_BATCH, SEQUENCE
from p2ptrain.graph.sources.simplify import quiet, simplify
from p2ptrain.graph.sources.torch_model import TorchModel, logits_of
from p2ptrain.graph.sources.torch_modes import evaluates_as_it_trains

PREFIX: Final = "model."
RECURRENT: Final = frozenset({"LSTM", "GRU", "RNN"})
BATCH_MAX: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class BothModes:
    """One module as it trains and as it evaluates."""

    training: Traced
    inference: Traced


def trace_both(model: TorchModel, *, context: int) -> BothModes:
    """A module's graphs in training and in evaluation mode; see `trace`.

    Where the modes differ by nothing but dropout and BatchNorm (`torch_modes`), the second follows
    from the first: it takes as long as the first to trace, and comes out the same.
    """
    training = _exported(model, context, training=True)
    if evaluates_as_it_trains(model, training.tensors):
        inference = _as_traced(_without_dropout(training.proto), training.found)
    else:
        inference = trace(model, context=context, training=False)
    return BothModes(training=training.traced, inference=inference)


def trace(model: TorchModel, *, context: int, training: bool) -> Traced:
    """Data inputs, parameters and running values in, `logits` out.

    Batch is a symbol. The sequence is one too, unless torch cannot export the module so or it is
    recurrent: then its length is `context`.

    Args:
        training: Dropout is present; otherwise evaluation mode. BatchNormalization is written as
            for evaluation in both: torch does so, and `batch_norm` makes it train.

    Raises:
        GraphError: torch could not export the module; change the module.
    """
    return _exported(model, context, training=training).traced


@dataclass(frozen=True, slots=True, kw_only=True)
class _Exported:
    """What torch made of a module in one mode."""

    tensors: tuple[Any, ...]  # Any: torch tensors
    """What the module was traced with."""
    proto: onnx.ModelProto
    """As torch wrote it, with parameters as inputs."""
    found: _Found
    traced: Traced


def _exported(model: TorchModel, context: int, *, training: bool) -> _Exported:
    dynamic_first = model.has_sequence and context > 2 and not model.is_recurrent
    try:
        exported = _trace(model, context, training=training, dynamic=dynamic_first)
    except GraphError:
        if not dynamic_first:
            raise
    else:
        if not dynamic_first or not _is_recurrent(exported.traced.graph):
            return exported
    return _trace(model, context, training=training, dynamic=False)


def _is_recurrent(graph: Graph) -> bool:
    return any(node.op_type in RECURRENT for node in graph.nodes)


def _trace(model: TorchModel, context: int, *, training: bool, dynamic: bool) -> _Exported:
    wrapped = _wrapper(model)
    wrapped.train() if training else wrapped.eval()
    # A symbol must not have the size of its bound in the example, or torch fixes it there.
    length = context - 1 if dynamic else context
    tensors = tuple(
        torch.zeros(each.shape(batch=EXAMPLE_BATCH, sequence=length), dtype=_dtype(each.dtype))
        for each in model.inputs.values()
    )
    shapes = _dynamic_shapes(model, context, dynamic=dynamic)
    proto = _export(wrapped, tensors, shapes, model)
    found = _inputs_of_initialisers(proto, model.parameter_names())
    return _Exported(tensors=tensors, proto=proto, found=found, traced=_as_traced(proto, found))


def _without_dropout(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which nothing drops out."""
    copied = onnx.ModelProto()
    copied.CopyFrom(proto)
    for node in copied.graph.node:
        if node.op_type == "Dropout":
            node.CopyFrom(helper.make_node("Identity", node.input[:1], node.output[:1]))
    return copied


def _dtype(name: str) -> Any:  # Any: a torch dtype
    return getattr(torch, name)


def _wrapper(model: TorchModel) -> Any:  # Any: a torch module
    class Plain(torch.nn.Module):  # type: ignore[misc]  # torch is untyped here
        def __init__(self) -> None:
            super().__init__()
            self.model = model.own_copy()

        def forward(self, *tensors: Any) -> Any:  # Any: torch tensors
            given = dict(zip(model.names, tensors, strict=True))
            return logits_of(self.model(**model.arguments(given)))

    return Plain()


def _dynamic_shapes(
    model: TorchModel, context: int, *, dynamic: bool
) -> tuple[tuple[dict[int, Any], ...]]:  # Any: torch.export.Dim
    symbols = {BATCH: torch.export.Dim(BATCH, min=1, max=BATCH_MAX)}
    if dynamic:
        symbols[SEQUENCE] = torch.export.Dim(SEQUENCE, min=1, max=context)
    axes = [
        {index: symbols[axis] for index, axis in enumerate(each.axes) if axis in symbols}
        for each in model.inputs.values()
    ]
    return (tuple(axes),)


def _export(
    wrapped: Any, tensors: tuple[Any, ...], shapes: Any, model: TorchModel
) -> onnx.ModelProto:  # Any: torch modules, tensors and dimensions
    with quiet(), model.plain_operators():
        try:
            program = torch.onnx.export(
                wrapped,
                tensors,
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                input_names=list(model.names),
                dynamic_shapes=shapes,
                verbose=False,
            )
        except Exception as error:
            raise GraphError(
                f"torch could not export the module: {_first_cause(error)}",
                hint="write the module in plain tensor operators; see onnx_models/gpt.py",
            ) from error
    if program is None:
        raise GraphError("torch exported nothing")
    proto: onnx.ModelProto = program.model_proto
    return proto


def _first_cause(error: BaseException) -> str:
    """The first line of the innermost exception; torch wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _as_traced(proto: onnx.ModelProto, found: _Found) -> Traced:
    graph = from_model(simplify(proto))
    _use_module_names(graph, [*found.parameters, *found.running])
    apply_names(graph, {graph.outputs[0]: LOGITS})
    read = {name for node in graph.nodes for name in node.input}
    parameters = tuple(n for n in map(_unprefixed, found.parameters) if n in read)
    unread = {_unprefixed(name) for name in (*found.parameters, *found.running)} - read
    graph.inputs = {name: t for name, t in graph.inputs.items() if name not in unread}
    return Traced(graph=graph, parameters=parameters)


def _unprefixed(name: str) -> str:
    return name.removeprefix(PREFIX)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    parameters: tuple[str, ...]
    running: tuple[str, ...]


def _inputs_of_initialisers(proto: onnx.ModelProto, parameter_names: Mapping[str, str]) -> _Found:
    """Move parameters and running values to the inputs; a tied one becomes one input."""
    running = _running_names(proto)
    moved: dict[str, str] = {}
    parameters: list[str] = []
    states: list[str] = []
    kept = []
    for tensor in proto.graph.initializer:
        owner = parameter_names.get(_unprefixed(tensor.name))
        name = tensor.name if owner is None else PREFIX + owner
        if owner is None and tensor.name not in running:
            kept.append(tensor)
            continue
        moved[tensor.name] = name
        if name not in parameters and name not in states:
            (parameters if owner is not None else states).append(name)
            proto.graph.input.append(
                helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))
            )
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    for node in proto.graph.node:
        node.input[:] = [moved.get(name, name) for name in node.input]
    return _Found(parameters=tuple(parameters), running=tuple(states))


def _running_names(proto: onnx.ModelProto) -> set[str]:
    """Means and variances of the BatchNormalization nodes."""
    nodes = [node for node in proto.graph.node if node.op_type == "BatchNormalization"]
    return {name for node in nodes for name in node.input[3:5]}


def _use_module_names(graph: Graph, names: list[str]) -> None:
    """Strip the wrapper's prefix; inner values that have a parameter's name step aside."""
    short = {name: _unprefixed(name) for name in names}
    taken = set(short.values()) & {name for node in graph.nodes for name in node.output}
    apply_names(graph, {name: graph.fresh(name) for name in taken})
    apply_names(graph, short)
