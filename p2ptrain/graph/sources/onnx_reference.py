"""An ONNX file in float64 as the reference of a bundle.

The file has no framework of its own, so its nodes are run one by one by torch functions in
float64, and torch's autograd differentiates them. What this shows: the loss, every gradient and
the running values of the file's graph *as the ONNX specification defines its operators*. What it
cannot show: that the file is what its author trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch.nn import functional

from p2ptrain.bundle.manifest import Loss
from p2ptrain.errors import GraphError
from p2ptrain.graph.ir import Graph, attribute
from p2ptrain.graph.source import LABELS, LOGITS, LOSS_WEIGHT, Step
from p2ptrain.graph.sources.onnx_operators import run_operator
from p2ptrain.graph.sources.torch_reference import summed_loss

Array = NDArray[Any]  # Any: float32, float64, int64 and bool


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxReference:
    """`source.Reference` of a graph that ends in `logits`."""

    graph: Graph
    """As the file has it: dropout and batch normalisation in place."""
    data_inputs: tuple[str, ...]
    parameters: tuple[str, ...]
    loss: Loss

    def step(
        self,
        parameters: Mapping[str, Array],
        inputs: Mapping[str, Array],
        masks: Sequence[Array],
        *,
        dtype: str = "float64",
    ) -> Step:
        """Loss and gradients in training mode; see `source.Reference`.

        Raises:
            GraphError: an operator that the reference does not know, or other masks than dropouts.
        """
        kind = getattr(torch, dtype)
        values = {n: torch.tensor(v, dtype=kind) for n, v in parameters.items()}
        trained = {n: values[n].requires_grad_() for n in self.parameters if n in values}
        run = _Run(graph=self.graph, masks=list(masks), training=True, kind=kind)
        logits = run.logits({**values, **self._data(inputs)})
        if run.masks:
            raise GraphError(f"the graph has {len(run.masks)} dropout masks too many")
        loss = summed_loss(self.loss, logits, torch.from_numpy(inputs[LABELS]))
        loss = loss * float(inputs[LOSS_WEIGHT])
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        return Step(
            loss=float(loss.detach()),
            gradients={
                name: np.zeros(value.shape) if gradient is None else gradient.numpy()
                for (name, value), gradient in zip(trained.items(), found, strict=True)
            },
            running={name: value.numpy() for name, value in run.running.items()},
        )

    def infer(self, parameters: Mapping[str, Array], inputs: Mapping[str, Array]) -> Array:
        """Logits in evaluation mode, float32."""
        values = {n: torch.tensor(v, dtype=torch.float64) for n, v in parameters.items()}
        run = _Run(graph=self.graph, masks=[], training=False, kind=torch.float64)
        logits: Array = run.logits({**values, **self._data(inputs)}).numpy()
        return logits.astype(np.float32)

    def _data(self, inputs: Mapping[str, Array]) -> dict[str, Any]:  # Any: torch tensors
        return {name: torch.from_numpy(inputs[name]) for name in self.data_inputs}


@dataclass(slots=True, kw_only=True)
class _Run:
    """One evaluation of the graph, node by node."""

    graph: Graph
    masks: list[Array]
    """Not yet used."""
    training: bool
    kind: Any  # Any: a torch dtype
    """Of every floating value."""
    running: dict[str, Any] = field(default_factory=dict)  # Any: torch tensors

    def logits(self, given: Mapping[str, Any]) -> Any:  # Any: torch tensors
        values = {n: torch.from_numpy(np.array(v)) for n, v in self.graph.constants.items()}
        values = {name: self._cast(value) for name, value in (values | dict(given)).items()}
        for node in self.graph.nodes:
            inputs = [values[name] if name else None for name in node.input]
            outputs = map(self._cast, self._node(node, inputs))
            values |= dict(zip(node.output, outputs, strict=False))
        return values[LOGITS]

    def _cast(self, value: Any) -> Any:  # Any: torch tensors
        return value.to(self.kind) if value.is_floating_point() else value

    def _node(self, node: onnx.NodeProto, inputs: Sequence[Any]) -> Sequence[Any]:
        """Outputs of a node; dropout and batch normalisation as the mode says. (Any: tensors.)"""
        if node.op_type == "Dropout":
            return (self._dropout(inputs[0]),)
        if node.op_type == "BatchNormalization":
            return (self._batch_norm(node, inputs),)
        return run_operator(node, inputs)

    def _dropout(self, value: Any) -> Any:  # Any: torch tensors
        if not self.training:
            return value
        if not self.masks:
            raise GraphError("the file drops out more often than the graph has masks")
        return value * torch.from_numpy(self.masks.pop(0)).to(value.dtype)

    def _batch_norm(self, node: onnx.NodeProto, inputs: Sequence[Any]) -> Any:  # Any: as above
        x, scale, bias = inputs[:3]
        kept = {
            name: old.detach().clone() for name, old in zip(node.input[3:], inputs[3:], strict=True)
        }
        result = functional.batch_norm(
            x,
            *kept.values(),
            scale,
            bias,
            training=self.training,
            momentum=1.0 - round(float(attribute(node, "momentum", 0.9)), 6),
            eps=attribute(node, "epsilon", 1e-5),
        )
        if self.training:
            self.running |= kept
        return result
