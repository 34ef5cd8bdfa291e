"""A torch module in float64 as the reference of a bundle.

Its losses are torch's own and its forward is the module's own: nothing of the exporter's patches
or graphs is used here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from p2ptrain.bundle.manifest import Loss
from p2ptrain.errors import GraphError
from p2ptrain.graph.source import LABELS, LOSS_WEIGHT, Step
from p2ptrain.graph.sources.torch_model import TorchModel, logits_of

Array = NDArray[Any]  # Any: float32, float64, int64 and bool

_DRAW: Final = torch.ops.aten.bernoulli_.float
_CONVERT: Final = torch.ops.aten._to_copy.default


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchReference:
    """`source.Reference` of a module; the module itself is never changed."""

    model: TorchModel
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
            GraphError: the module drops out more or less often than there are masks.
        """
        kind = getattr(torch, dtype)
        module = self.model.own_copy().to(kind).train()
        values = {n: torch.tensor(v, dtype=kind) for n, v in parameters.items()}
        trained = {
            n: values[n].requires_grad_() for n, _ in module.named_parameters() if n in values
        }
        running = {n: values[n] for n, _ in module.named_buffers() if n in values}
        with _Given(masks, kind) as given:
            logits = self._logits(module, values, inputs, kind)
        given.refuse_left_over()
        loss = summed_loss(self.loss, logits, torch.from_numpy(inputs[LABELS]))
        loss = loss * float(inputs[LOSS_WEIGHT])
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        return Step(
            loss=float(loss.detach()),
            gradients={
                name: np.zeros(value.shape) if gradient is None else gradient.numpy()
                for (name, value), gradient in zip(trained.items(), found, strict=True)
            },
            running={name: value.numpy() for name, value in running.items()},
        )

    def infer(self, parameters: Mapping[str, Array], inputs: Mapping[str, Array]) -> Array:
        """Logits in evaluation mode, float32."""
        module = self.model.own_copy().float().eval()
        values = {n: torch.tensor(v, dtype=torch.float32) for n, v in parameters.items()}
        with torch.no_grad():
            result: Array = self._logits(module, values, inputs, torch.float32).numpy()
        return result

    def _logits(
        self, module: Any, values: Mapping[str, Any], inputs: Mapping[str, Array], dtype: Any
    ) -> Any:  # Any: torch modules, tensors and dtypes
        tensors = {name: torch.from_numpy(inputs[name]) for name in self.model.names}
        given = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
        arguments = self.model.arguments(given)
        return logits_of(torch.func.functional_call(module, dict(values), (), arguments))


def summed_loss(loss: Loss, logits: Any, labels: Any) -> Any:  # Any: torch tensors
    """torch's own loss, summed over counted labels."""
    if loss.kind == "cross-entropy":
        return functional.cross_entropy(
            logits.flatten(0, -2),
            labels.flatten(),
            reduction="sum",
            ignore_index=loss.ignore_index,
            label_smoothing=loss.label_smoothing,
        )
    functions = {
        "mse": functional.mse_loss,
        "l1": functional.l1_loss,
        "bce": functional.binary_cross_entropy_with_logits,
    }
    return functions[loss.kind](logits, labels.to(logits.dtype), reduction="sum")


class _Given(TorchDispatchMode):  # type: ignore[misc]  # torch is untyped here
    """Two things that a module does itself are done otherwise while this is entered.

    Every dropout, wherever it is called, draws its noise by one operator and divides it by the
    probability: that operator gives our masks, in the order of the calls. And where a module asks
    for float32 (a softmax, a norm) it gets the type of the step.
    """

    def __init__(self, masks: Sequence[Array], kind: Any) -> None:  # Any: a torch dtype
        super().__init__()
        self._masks = list(masks)
        self._kind = kind
        self._given = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:  # Any: torch's own protocol
        named = dict(named or {})
        if function is _CONVERT and named.get("dtype") is torch.float32:
            named["dtype"] = self._kind
        if function is not _DRAW:
            return function(*arguments, **named)
        noise, kept = arguments[0], arguments[1] if len(arguments) > 1 else 0.5
        if self._given == len(self._masks):
            raise GraphError(
                f"the module drops out more often than the graph, which has {self._given} masks",
                hint="a dropout was traced into other operators; use torch.nn.Dropout",
            )
        mask = torch.from_numpy(self._masks[self._given]).to(noise.dtype)
        self._given += 1
        if mask.shape != noise.shape:
            raise GraphError(
                f"dropout {self._given} has masks of {tuple(mask.shape)} in the graph and of"
                f" {tuple(noise.shape)} in the module"
            )
        return noise.copy_(mask * kept)

    def refuse_left_over(self) -> None:
        """GraphError unless every mask was used."""
        if self._given != len(self._masks):
            raise GraphError(
                f"the graph has {len(self._masks)} dropout masks, the module used {self._given}"
            )
