"""Whole models through the exporter: every family exports, agrees with its source, and trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from onnx_models.bert import bert
from onnx_models.mobilenet import mobilenet
from p2ptrain.errors import GraphError
from p2ptrain.graph.check import verify
from p2ptrain.graph.export import export
from p2ptrain.graph.lowering import registry
from p2ptrain.graph.lowering.normalisation import batch_norm_grad
from p2ptrain.graph.lowering.registry import Emitter
from p2ptrain.graph.source import Source
from p2ptrain.graph.sources.requests import Request
from p2ptrain.graph.sources.torch_factory import factory_source, module_source
from tests.export.configurations import Family
from tests.export.family_models import RegressionMlp, TextClassifier

pytestmark = pytest.mark.export

BATCH_NORM_GRAD = "com.microsoft.BatchNormalizationGrad"
FAMILIES = [
    ("gpt2", "language-modelling"),
    ("llama", "language-modelling"),
    ("bert", "sequence-classification"),
    ("vit", "image-classification"),
    ("resnet", "image-classification"),
]
MODULES: dict[str, tuple[Callable[[], Any], Request]] = {
    "lstm": (
        lambda: TextClassifier(nn.LSTM, layers=2, both_ways=True),
        Request(name="lstm", task="sequence-classification"),
    ),
    "gru": (
        lambda: TextClassifier(nn.GRU, layers=1, both_ways=False),
        Request(name="gru", task="sequence-classification"),
    ),
    "bert": (
        lambda: bert(layers=1, width=16, heads=2, vocabulary=30, context=8),
        Request(name="bert", task="sequence-classification"),
    ),
    **{
        loss: (RegressionMlp, Request(name=loss, task="regression", loss=loss))
        for loss in ("mse", "l1", "bce")
    },
}


def assert_exports_and_agrees(source: Source) -> None:
    bundle = export(source)
    rows = {row.name: row.error for row in verify(source, bundle)}
    assert rows["adamw, 3 steps"] < 1e-5
    assert max(rows.values()) < 1e-5
    assert len(bundle.manifest.segments) >= 2


def test_an_encoder_of_bytes_exports_with_its_special_tokens() -> None:
    arguments = {"layers": 2, "width": 32, "heads": 4, "context": 12, "classes": 3}
    request = Request(name="encoder", task="sequence-classification", arguments=arguments)
    source = factory_source("onnx_models.bert:bert", request)
    bundle = export(source)
    assert max(row.error for row in verify(source, bundle)) < 1e-5
    manifest = bundle.manifest
    assert manifest.data.special_tokens == {"pad": 256, "cls": 257, "sep": 258}


@pytest.mark.parametrize(("kind", "task"), FAMILIES)
def test_a_family_exports_and_agrees_with_its_model(kind: str, task: str, family: Family) -> None:
    assert_exports_and_agrees(family(kind, task))


@pytest.mark.parametrize("name", MODULES)
def test_a_module_exports_and_agrees_with_torch(name: str) -> None:
    torch.manual_seed(1)
    make, request = MODULES[name]
    assert_exports_and_agrees(module_source(make(), request))


@pytest.fixture(scope="module")
def deep() -> Source:
    """52 convolutions with BatchNorm and ReLU6: float32 flips some, in torch as here."""
    return module_source(mobilenet(), Request(name="deep", task="image-classification"))


def test_a_deep_network_with_kinks_agrees_in_float64(deep: Source) -> None:
    rows = {row.name: row for row in verify(deep, export(deep))}
    for masks in ("open masks", "random masks"):
        for what in ("loss", "gradients", "running values"):
            assert rows[f"{what} (float64 graphs, {masks})"].error < 1e-10
        assert "torch itself" in rows[f"gradients (portable, {masks})"].note
        assert rows[f"gradients (training against portable, {masks})"].error < 5e-3
    assert max(rows[name].error for name in ("adamw, 3 steps", "evaluation loss")) < 1e-5


def test_a_gradient_that_is_slightly_wrong_is_refused_there_too(
    deep: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(emit: Emitter, node: onnx.NodeProto) -> None:
        bias = node.output[2]
        node.output[2] = emit.graph.fresh("bias")
        batch_norm_grad(emit, node)
        emit.like("Mul", node.output[2], emit.scalar(1.0001), out=bias)

    monkeypatch.setitem(registry._RULES, BATCH_NORM_GRAD, wrong)
    with pytest.raises(GraphError, match=r"gradients \(float64 graphs, open masks\)") as caught:
        verify(deep, export(deep))
    assert "portable" not in str(caught.value)  # far below what float32 can show here
