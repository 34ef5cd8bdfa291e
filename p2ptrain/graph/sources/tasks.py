"""What a task means for the graph and the data: labels, loss and how samples are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from p2ptrain.bundle.manifest import LOSSES, TASKS, DataSection, Loss
from p2ptrain.errors import ConfigError
from p2ptrain.graph.ir import Axis
from p2ptrain.graph.source import LABELS, LOSS_WEIGHT
from p2ptrain.graph.sources.inputs import EXAMPLE_BATCH, Input
from p2ptrain.ids import Digest

Array = NDArray[Any]  # Any: float32, int64 and bool

SAMPLING: Final = "philox-1"
MASK_PROBABILITY: Final = 0.15
"""Of a token to be predicted in masked language modelling, as Devlin et al. 2018, section 3.1."""
_TEXT_KINDS: Final = {
    "language-modelling": "windows",
    "masked-language-modelling": "masked-windows",
    "sequence-classification": "texts",
    "token-classification": "words",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """How text becomes tokens."""

    vocabulary: int
    context: int
    tokenizer: str = "bytes"
    tokenizer_digest: Digest | None = None
    special_tokens: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """How pixels of 0 to 1 are normalised; empty: they are not."""

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task with its loss."""

    name: str
    loss: Loss

    @property
    def integer_labels(self) -> bool:
        return self.loss.kind == "cross-entropy"


def choose_task(name: str, *, loss: str | None, label_smoothing: float) -> Task:
    """A task with the loss that was asked for, or its usual one.

    Raises:
        ConfigError: an unknown task or loss, or two that do not go together.
    """
    if name not in TASKS:
        raise ConfigError(f"unknown task {name!r}", hint=f"tasks: {', '.join(TASKS)}")
    kind = loss or ("mse" if name == "regression" else "cross-entropy")
    if kind not in LOSSES:
        raise ConfigError(f"unknown loss {kind!r}", hint=f"losses: {', '.join(LOSSES)}")
    fitting = _losses_of(name)
    if kind not in fitting:
        raise ConfigError(
            f"{name} does not go with the loss {kind!r}", hint=f"choose one of {', '.join(fitting)}"
        )
    if not 0.0 <= label_smoothing < 1.0 or (label_smoothing and kind != "cross-entropy"):
        raise ConfigError(
            f"--label-smoothing {label_smoothing} does not go with the loss {kind!r}",
            hint="0 to below 1, with cross-entropy only",
        )
    return Task(name=name, loss=Loss(kind=kind, label_smoothing=label_smoothing))


def _losses_of(task: str) -> tuple[str, ...]:
    if task == "regression":
        return ("mse", "l1", "bce")
    if task in ("sequence-classification", "image-classification"):
        return ("cross-entropy", "bce")
    return ("cross-entropy",)


def data_section(
    task: Task,
    *,
    text: Text | None,
    images: Images | None,
    classes: int,
    class_names: tuple[str, ...] = (),
) -> DataSection:
    """How the samples of a task are made from files; `classes` is the number of logits."""
    kind = _TEXT_KINDS.get(task.name, "arrays") if text is not None else "arrays"
    if images is not None:
        kind = "images" if task.name == "image-classification" and task.integer_labels else kind
    if kind == "texts" and not task.integer_labels:
        kind = "arrays"
    has_classes = kind not in ("windows", "masked-windows") and task.name != "regression"
    return DataSection(
        kind=kind,
        sampling=SAMPLING,
        tokenizer=text.tokenizer if text else "",
        tokenizer_digest=text.tokenizer_digest if text else None,
        vocabulary=text.vocabulary if text else 0,
        context=text.context if text else 0,
        classes=classes if has_classes else 0,
        class_names=class_names if len(class_names) == classes and has_classes else (),
        special_tokens=dict(text.special_tokens) if text else {},
        mask_probability=MASK_PROBABILITY if kind == "masked-windows" else 0.0,
        image_mean=images.mean if images else (),
        image_std=images.std if images else (),
    )


def example_of(
    task: Task, inputs: tuple[Input, ...], logits: tuple[int, ...], *, sequence: int
) -> dict[str, Array]:
    """A seeded microbatch: data, labels (some of them ignored) and the weight of one label.

    Args:
        logits: Shape of the model's result for the example's batch and sequence.
    """
    generator = np.random.Generator(np.random.Philox(12))
    example = {
        each.name: each.example(generator, batch=EXAMPLE_BATCH, sequence=sequence)
        for each in inputs
    }
    labels: Array
    if task.integer_labels:
        labels = generator.integers(0, logits[-1], logits[:-1])
        if labels.ndim > 1:
            labels[0, :2] = task.loss.ignore_index
    elif task.loss.kind == "bce":
        labels = generator.integers(0, 2, logits).astype(np.float32)
    else:
        labels = generator.standard_normal(logits).astype(np.float32)
    counted = int((labels != task.loss.ignore_index).sum())
    return {**example, LABELS: labels, LOSS_WEIGHT: np.array(1.0 / counted, np.float32)}


def refuse_misfit(task: Task, logits: tuple[Axis, ...]) -> None:
    """ConfigError unless the logits have the axes that a task needs."""
    per_token = {"language-modelling", "masked-language-modelling", "token-classification"}
    per_sample = {"sequence-classification", "image-classification"}
    wanted = 3 if task.name in per_token else 2 if task.name in per_sample else None
    if wanted is not None and len(logits) != wanted:
        raise ConfigError(
            f"{task.name} needs logits of {wanted} axes, the model gives {logits}",
            hint="choose another --task, or let the model end in one logit per class",
        )
