"""From a torch module with known inputs to a `Source`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from p2ptrain.graph.ir import Axis
from p2ptrain.graph.source import LOGITS, Source
from p2ptrain.graph.sources.inputs import EXAMPLE_BATCH, SEQUENCE
from p2ptrain.graph.sources.losses import append_loss
from p2ptrain.graph.sources.requests import Request
from p2ptrain.graph.sources.tasks import (
    Images,
    Task,
    Text,
    data_section,
    example_of,
    refuse_misfit,
)
from p2ptrain.graph.sources.torch_model import TorchModel
from p2ptrain.graph.sources.torch_reference import TorchReference
from p2ptrain.graph.sources.torch_tracing import trace_both

Array = NDArray[Any]  # Any: float32 values


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What goes into the bundle beside the graphs."""

    text: Text | None = None
    images: Images | None = None
    class_names: tuple[str, ...] = ()
    weights: Mapping[str, Array] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)


def torch_source(model: TorchModel, task: Task, request: Request, about: About) -> Source:
    """Trace the module and put its loss behind it.

    Raises:
        GraphError: torch cannot export the module.
        ConfigError: the module's result does not fit the task.
    """
    context = about.text.context if about.text is not None else 0
    both = trace_both(model, context=context)
    training = both.training
    logits = training.graph.axes(LOGITS)
    refuse_misfit(task, logits)
    append_loss(training.graph, task.loss)
    classes = int(logits[-1]) if isinstance(logits[-1], int) else 0
    drawn = model.initialisers()
    example = example_of(
        task, tuple(model.inputs.values()), _sizes(logits, context), sequence=context
    )
    return Source(
        name=request.name,
        description=request.description,
        task=task.name,
        loss=task.loss,
        data=data_section(
            task,
            text=about.text,
            images=about.images,
            classes=classes,
            class_names=about.class_names,
        ),
        data_inputs=model.names,
        training=training,
        inference=both.inference,
        initialisers={name: drawn[name] for name in training.graph.inputs if name in drawn},
        reference=TorchReference(model=model, loss=task.loss),
        weights={name: v for name, v in about.weights.items() if name in training.graph.inputs},
        files=dict(about.files),
        example=example,
    )


def _sizes(axes: tuple[Axis, ...], context: int) -> tuple[int, ...]:
    sizes = {"batch": EXAMPLE_BATCH, SEQUENCE: context}
    return tuple(axis if isinstance(axis, int) else sizes[axis] for axis in axes)
