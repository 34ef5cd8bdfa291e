"""Trace a torch decoder into ONNX: for training with its loss, and for inference.

torch is imported here only, and only when a function is called.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import onnx

from p2ptrain.bundle.manifest import DataSection, Initialiser, Loss
from p2ptrain.errors import GraphError
from p2ptrain.graph.ir import OPSET, Graph, apply_names, from_model
from p2ptrain.graph.source import LABELS, LOGITS, LOSS, LOSS_WEIGHT, Array, Source, Step, Traced

PREFIX = "model."
DATA = "ids"


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What the module itself cannot say."""

    name: str
    description: str
    vocabulary: int
    context: int


def decoder_source(module: Any, about: Description) -> Source:  # Any: a torch module
    """A decoder over bytes with next-token cross-entropy, ready to be cut.

    Raises:
        GraphError: torch could not export the module; change the module.
    """
    first = _first_names(module)
    training = _renamed(trace_training(module, context=about.context), first)
    inference = _renamed(trace_inference(module, context=about.context), first)
    for traced, result in ((training, LOSS), (inference, LOGITS)):
        apply_names(traced.graph, {traced.graph.outputs[0]: result})
    return Source(
        name=about.name,
        description=about.description,
        task="language-modelling",
        loss=Loss(kind="cross-entropy"),
        data=DataSection(
            kind="windows",
            tokenizer="bytes",
            vocabulary=about.vocabulary,
            context=about.context,
            sampling="philox-1",
        ),
        data_inputs=(DATA,),
        training=training,
        inference=inference,
        initialisers=initialisers(module),
        reference=DecoderReference(module=module),
    )


def _first_names(module: Any) -> dict[str, str]:  # Any: a torch module
    """Every name of a parameter -> its first one; tied parameters have several."""
    first: dict[int, str] = {}
    named = module.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(parameter), name) for name, parameter in named}


def _renamed(traced: Traced, names: Mapping[str, str]) -> Traced:
    apply_names(traced.graph, names)
    parameters = tuple(names[name] for name in traced.parameters)
    return Traced(graph=traced.graph, parameters=parameters)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderReference:
    """`source.Reference` of a torch decoder; the module itself is not changed."""

    module: Any  # Any: a torch module

    def step(
        self,
        parameters: Mapping[str, Array],
        inputs: Mapping[str, Array],
        masks: Sequence[Array],
    ) -> Step:
        """In float64, Dropout multiplying by the given masks in the order of the calls."""
        import torch

        wrapped = loss_module(self._loaded(parameters).double()).train()
        weight = torch.from_numpy(inputs[LOSS_WEIGHT]).double()
        with _given_masks(masks):
            loss = wrapped(torch.from_numpy(inputs[DATA]), torch.from_numpy(inputs[LABELS]), weight)
        loss.backward()
        gradients = {name: p.grad.numpy() for name, p in wrapped.model.named_parameters()}
        return Step(loss=float(loss.detach()), gradients=gradients, running={})

    def infer(self, parameters: Mapping[str, Array], inputs: Mapping[str, Array]) -> Array:
        """Logits in evaluation mode, float32."""
        import torch

        with torch.no_grad():
            logits: Array = self._loaded(parameters).eval()(torch.from_numpy(inputs[DATA])).numpy()
        return logits

    def _loaded(self, parameters: Mapping[str, Array]) -> Any:  # Any: a torch module
        import torch

        module = copy.deepcopy(self.module)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(torch.from_numpy(parameters[name]))
        return module


@contextlib.contextmanager
def _given_masks(masks: Sequence[Array]) -> Iterator[None]:
    import torch

    waiting = iter(masks)

    def forward(dropout: Any, value: Any) -> Any:  # Any: a torch module and tensor
        return value * torch.from_numpy(next(waiting)) if dropout.p > 0.0 else value

    with mock.patch.object(torch.nn.Dropout, "forward", forward):
        yield


def initialisers(module: Any) -> dict[str, Initialiser]:  # Any: a torch module
    """How each parameter is drawn: as the module says, else from the values it has now."""
    said = module.initialisers() if hasattr(module, "initialisers") else {}
    chosen = {}
    for name, parameter in module.named_parameters():
        kind, scale = said.get(name) or _measured(parameter)
        chosen[name] = Initialiser(kind=kind, scale=round(scale, 9))
    return chosen


def _measured(parameter: Any) -> tuple[str, float]:  # Any: a torch parameter
    low, high = float(parameter.min()), float(parameter.max())
    if low == high and low in (0.0, 1.0):
        return ("ones" if low else "zeros"), 0.0
    return "normal", float((parameter.detach() ** 2).mean() ** 0.5)


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
