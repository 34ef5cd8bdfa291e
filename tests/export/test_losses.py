"""Losses as graph nodes against torch's own, value and gradient, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from p2ptrain.bundle.manifest import Loss
from p2ptrain.errors import GraphError
from p2ptrain.graph.canonical import state_extra_outputs
from p2ptrain.graph.check import loss_of_logits
from p2ptrain.graph.ir import FLOAT, Graph, Type, make, to_model
from p2ptrain.graph.runner import session_of
from p2ptrain.graph.source import LABELS, LOGITS, LOSS, LOSS_WEIGHT
from p2ptrain.graph.sources.losses import append_loss
from p2ptrain.graph.sources.torch_reference import summed_loss
from p2ptrain.graph.vjp import build_gradient

pytestmark = pytest.mark.export

CASES = [
    (Loss(kind="cross-entropy"), (4, 7)),
    (Loss(kind="cross-entropy"), (2, 5, 7)),
    (Loss(kind="cross-entropy", label_smoothing=0.1), (4, 7)),
    (Loss(kind="cross-entropy", label_smoothing=0.3), (2, 5, 7)),
    (Loss(kind="mse"), (4, 3)),
    (Loss(kind="mse"), (4,)),
    (Loss(kind="l1"), (4, 3)),
    (Loss(kind="bce"), (4, 6)),
]


def graph_of(loss: Loss, shape: tuple[int, ...]) -> Graph:
    """x -> logits -> loss; the batch is a symbol."""
    known = Type(dtype=FLOAT, axes=("batch", *shape[1:]))
    graph = Graph(inputs={"x": known}, types={"x": known, LOGITS: known}, outputs=[LOGITS])
    graph.nodes.append(make("Identity", ["x"], [LOGITS]))
    append_loss(graph, loss)
    return graph


def feeds_of(loss: Loss, shape: tuple[int, ...]) -> dict[str, np.ndarray[Any, Any]]:
    generator = np.random.Generator(np.random.Philox(3))
    logits = (4.0 * generator.standard_normal(shape)).astype(np.float32)
    logits.reshape(-1)[:2] = 0.0, 80.0  # where sloppy forms lose their gradient or overflow
    labels: np.ndarray[Any, Any]
    if loss.kind == "cross-entropy":
        labels = generator.integers(0, shape[-1], shape[:-1])
        labels.reshape(-1)[-1] = loss.ignore_index
    elif loss.kind == "bce":
        labels = generator.integers(0, 2, shape).astype(np.float32)
    else:
        labels = generator.standard_normal(shape).astype(np.float32)
    return {"x": logits, LABELS: labels, LOSS_WEIGHT: np.array(0.25, np.float32)}


@pytest.mark.parametrize(("loss", "shape"), CASES)
def test_value_and_gradient_are_torchs(loss: Loss, shape: tuple[int, ...]) -> None:
    feeds = feeds_of(loss, shape)
    logits = torch.tensor(feeds["x"], dtype=torch.float64, requires_grad=True)
    expected = summed_loss(loss, logits, torch.tensor(feeds[LABELS])) * 0.25
    expected.backward()
    value = float(expected.detach())
    graph = graph_of(loss, shape)
    state_extra_outputs(graph)
    whole = build_gradient(graph, wanted=["x"])
    one = {f"cotangent.{LOSS}": np.array(1.0, np.float32)}
    found = session_of(to_model(whole).SerializeToString()).run(None, {**feeds, **one})
    assert found[0] == pytest.approx(value, rel=1e-6)
    scale = float(logits.grad.abs().max())
    assert np.abs(found[1] - logits.grad.numpy()).max() < 1e-6 * scale
    assert loss_of_logits(loss, feeds["x"].astype(float), feeds[LABELS]) == pytest.approx(
        4.0 * value, rel=1e-9
    )


@pytest.mark.parametrize(("loss", "shape"), CASES)
def test_the_nodes_are_standard_onnx(loss: Loss, shape: tuple[int, ...]) -> None:
    feeds = feeds_of(loss, shape)
    model = to_model(graph_of(loss, shape))
    found = ReferenceEvaluator(model).run(None, feeds)[0]
    summed = loss_of_logits(loss, feeds["x"].astype(float), feeds[LABELS])
    assert float(found) == pytest.approx(0.25 * summed, rel=1e-5)


def test_cross_entropy_refuses_logits_without_classes() -> None:
    with pytest.raises(GraphError, match="needs logits"):
        graph_of(Loss(kind="cross-entropy"), (4,))
