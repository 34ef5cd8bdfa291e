"""Losses as graph nodes behind a model's logits: a sum over counted labels times `loss_weight`.

Shapes: logits (B, ..., C) with labels (B, ...) for cross-entropy, else labels like the logits.
"""

from __future__ import annotations

import numpy as np

from p2ptrain.bundle.manifest import Loss
from p2ptrain.errors import GraphError
from p2ptrain.graph.ir import FLOAT, INT64, Axis, Graph, Type, make
from p2ptrain.graph.source import LABELS, LOGITS, LOSS, LOSS_WEIGHT
from p2ptrain.graph.views import product

_SCALAR = Type(dtype=FLOAT, axes=())


def append_loss(graph: Graph, loss: Loss) -> None:
    """Add the loss to a graph that ends in `logits`; `labels` and `loss_weight` become inputs.

    Raises:
        GraphError: the logits have too few axes for the loss.
    """
    axes = graph.axes(LOGITS)
    if loss.kind == "cross-entropy":
        _input(graph, LABELS, Type(dtype=INT64, axes=axes[:-1]))
        total = _cross_entropy(graph, loss, axes)
    else:
        _input(graph, LABELS, Type(dtype=FLOAT, axes=axes))
        total = _bce(graph, axes) if loss.kind == "bce" else _distance(graph, loss.kind, axes)
    _input(graph, LOSS_WEIGHT, _SCALAR)
    graph.types[LOSS] = _SCALAR
    graph.nodes.append(make("Mul", [total, LOSS_WEIGHT], [LOSS]))
    graph.outputs = [LOSS]


def _input(graph: Graph, name: str, known: Type) -> None:
    graph.inputs[name] = graph.types[name] = known


def _add(graph: Graph, op: str, inputs: list[str], known: Type, **attributes: object) -> str:
    name = graph.fresh(f"loss_{op.lower()}")
    graph.types[name] = known
    graph.nodes.append(make(op, inputs, [name], **attributes))
    return name


def _cross_entropy(graph: Graph, loss: Loss, axes: tuple[Axis, ...]) -> str:
    """(1 - s) * -log p[label] - s * mean over classes of log p, summed over counted labels."""
    if len(axes) < 2:
        raise GraphError(
            f"cross-entropy needs logits of (batch, ..., classes), not {axes}",
            hint="choose another --loss, or let the model end in one logit per class",
        )
    logits, labels = LOGITS, LABELS
    rows, classes = product(axes[:-1]), axes[-1]
    if len(axes) > 2:
        flat = Type(dtype=FLOAT, axes=(rows, classes))
        logits = _add(graph, "Flatten", [LOGITS], flat, axis=len(axes) - 1)
        every = graph.constant(np.array([-1], np.int64), "shape")
        labels = _add(graph, "Reshape", [LABELS, every], Type(dtype=INT64, axes=(rows,)))
    hard = _add(
        graph,
        "SoftmaxCrossEntropyLoss",
        [logits, labels],
        _SCALAR,
        reduction="sum",
        ignore_index=loss.ignore_index,
    )
    if loss.label_smoothing == 0.0:
        return hard
    soft = _counted_log_probabilities(graph, loss, logits, labels)
    if not isinstance(classes, int):
        raise GraphError("label smoothing needs a fixed number of classes")
    return _weighted(graph, hard, 1.0 - loss.label_smoothing, soft, -loss.label_smoothing / classes)


def _counted_log_probabilities(graph: Graph, loss: Loss, logits: str, labels: str) -> str:
    """The sum of log p over all classes of the rows whose label counts."""
    rows, classes = graph.axes(logits)
    logarithm = _add(graph, "LogSoftmax", [logits], graph.types[logits], axis=1)
    ignored = graph.constant(np.array(loss.ignore_index, np.int64))
    boolean = Type(dtype=9, axes=(rows,))  # 9: onnx.TensorProto.BOOL
    left_out = _add(graph, "Equal", [labels, ignored], boolean)
    counted = _add(graph, "Not", [left_out], boolean)
    number = _add(graph, "Cast", [counted], Type(dtype=FLOAT, axes=(rows,)), to=FLOAT)
    last = graph.constant(np.array([1], np.int64))
    column = _add(graph, "Unsqueeze", [number, last], Type(dtype=FLOAT, axes=(rows, 1)))
    kept = _add(graph, "Mul", [logarithm, column], Type(dtype=FLOAT, axes=(rows, classes)))
    return _add(graph, "ReduceSum", [kept], _SCALAR, keepdims=0)


def _weighted(graph: Graph, one: str, one_factor: float, two: str, two_factor: float) -> str:
    terms = []
    for name, factor in ((one, one_factor), (two, two_factor)):
        scale = graph.constant(np.array(factor, np.float32))
        terms.append(_add(graph, "Mul", [name, scale], _SCALAR))
    return _add(graph, "Add", terms, _SCALAR)


def _bce(graph: Graph, axes: tuple[Axis, ...]) -> str:
    """-(y log sigmoid(x) + (1 - y) log sigmoid(-x)) as the log-softmax of the pair (0, x), which
    is exact for large x and has the right gradient where x is 0, unlike relu(x) + log(1 + ...)."""
    pairs = Type(dtype=FLOAT, axes=(*axes, 2))
    single = Type(dtype=FLOAT, axes=(*axes, 1))
    last = graph.constant(np.array([len(axes)], np.int64))
    logit = _add(graph, "Unsqueeze", [LOGITS, last], single)
    label = _add(graph, "Unsqueeze", [LABELS, last], single)
    second = graph.constant(np.array([0.0, 1.0], np.float32))
    sign = graph.constant(np.array([-1.0, 1.0], np.float32))
    first = graph.constant(np.array([1.0, 0.0], np.float32))
    pair = _add(graph, "Mul", [logit, second], pairs)
    logarithm = _add(graph, "LogSoftmax", [pair], pairs, axis=len(axes))
    signed = _add(graph, "Mul", [label, sign], pairs)
    target = _add(graph, "Add", [signed, first], pairs)
    agreed = _add(graph, "Mul", [logarithm, target], pairs)
    total = _add(graph, "ReduceSum", [agreed], _SCALAR, keepdims=0)
    return _add(graph, "Neg", [total], _SCALAR)


def _distance(graph: Graph, kind: str, axes: tuple[Axis, ...]) -> str:
    """Squared (mse) or absolute (l1) differences, summed."""
    known = Type(dtype=FLOAT, axes=axes)
    difference = _add(graph, "Sub", [LOGITS, LABELS], known)
    if kind == "mse":
        size = _add(graph, "Mul", [difference, difference], known)
    else:
        size = _add(graph, "Abs", [difference], known)
    return _add(graph, "ReduceSum", [size], _SCALAR, keepdims=0)
