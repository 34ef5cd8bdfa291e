"""What the exporter works on, wherever the model came from: traced graphs and a reference.

Sources (a torch factory, a Hugging Face folder, an ONNX file) make a `Source`; cutting,
differentiating and checking know nothing else of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from numpy.typing import NDArray

from p2ptrain.bundle.manifest import DataSection, Initialiser, Loss
from p2ptrain.graph.ir import Graph

Array = NDArray[Any]  # Any: float32, float64, int64 and bool

LABELS: Final = "labels"
LOSS_WEIGHT: Final = "loss_weight"
LOSS: Final = "loss"
LOGITS: Final = "logits"


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """A traced graph; its parameters and buffers that may change are graph inputs under their own
    names, never initialisers."""

    graph: Graph
    parameters: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What the reference computes for one microbatch."""

    loss: float
    gradients: dict[str, Array]
    """By parameter name; one for a tied parameter, however often it is read."""
    running: dict[str, Array]
    """Running values after the forward, by name; empty without any."""


class Reference(Protocol):
    """The model as its own framework computes it: what every bundle is checked against."""

    def step(
        self,
        parameters: Mapping[str, Array],
        inputs: Mapping[str, Array],
        masks: Sequence[Array],
        *,
        dtype: str = "float64",
    ) -> Step:
        """Loss and gradients in training mode.

        Args:
            parameters: Trainable and frozen parameters and running values by name.
            inputs: Data by input name, `labels` and `loss_weight`.
            masks: For each dropout in the order of the calls, what to multiply by.
            dtype: `float64`, or `float32` to learn how far off the framework itself is.
        """
        ...

    def infer(self, parameters: Mapping[str, Array], inputs: Mapping[str, Array]) -> Array:
        """The model's result in evaluation mode, float32."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model ready to be cut."""

    name: str
    description: str
    task: str
    loss: Loss
    data: DataSection
    data_inputs: tuple[str, ...]
    """Names of the graph's data inputs, in the order in which a run feeds them."""
    training: Traced
    """Data inputs, `labels`, `loss_weight` and parameters in; `loss` out; dropout present."""
    inference: Traced
    """Data inputs and parameters in; `logits` out; evaluation mode."""
    initialisers: dict[str, Initialiser]
    reference: Reference
    weights: dict[str, Array] = field(default_factory=dict)
    """Values that the bundle ships, by parameter name; the rest is drawn."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Further files of the bundle by name: `tokenizer.json`."""
    example: dict[str, Array] = field(default_factory=dict)
    """Inputs of one microbatch that the model accepts, labels included: what checks run on."""
