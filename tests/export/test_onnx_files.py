"""ONNX inference files as sources: parameters found again, agreement with torch, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from p2ptrain.errors import ConfigError
from p2ptrain.graph.check import verify
from p2ptrain.graph.export import export
from p2ptrain.graph.sources.onnx_file import file_source
from p2ptrain.graph.sources.requests import Request
from p2ptrain.graph.sources.simplify import quiet

pytestmark = pytest.mark.export


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A regression MLP and its inference file."""
    torch.manual_seed(5)
    module = nn.Sequential(
        nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 2)
    )
    path = tmp_path_factory.mktemp("mlp") / "mlp.onnx"
    axes = {"input": {0: torch.export.Dim("n", min=1)}}
    x = torch.zeros(3, 6)
    with quiet():
        torch.onnx.export(
            module.eval(), (x,), path, dynamo=True, dynamic_shapes=axes, verbose=False
        )
    return module, path


def test_a_file_becomes_a_bundle_that_agrees_with_torch(mlp: tuple[Any, Path]) -> None:
    module, path = mlp
    source = file_source(path, Request(name="mlp", task="regression"))
    assert set(source.training.parameters) == set(dict(module.named_parameters()))
    for name, value in module.named_parameters():
        assert (source.weights[name] == value.detach().numpy()).all()
    assert max(row.error for row in verify(source, export(source))) < 1e-5
    x = torch.tensor(source.example["input"], dtype=torch.float64)
    y = torch.tensor(source.example["labels"])
    loss = ((module.double()(x) - y) ** 2).sum() * float(source.example["loss_weight"])
    loss.backward()
    step = source.reference.step(source.weights, source.example, [])
    assert step.loss == pytest.approx(float(loss.detach()), rel=1e-7)  # float32 constants
    for name, parameter in module.named_parameters():
        error = np.abs(step.gradients[name] - parameter.grad.numpy()).max()
        assert error < 1e-7 * np.abs(parameter.grad.numpy()).max()


def test_parameters_can_be_drawn_instead(mlp: tuple[Any, Path]) -> None:
    source = file_source(mlp[1], Request(name="mlp", task="regression", use_weights=False))
    assert source.weights == {}
    assert set(source.initialisers) == set(source.training.parameters)


def test_a_file_needs_a_task_and_has_to_be_a_model(mlp: tuple[Any, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not say its task"):
        file_source(mlp[1], Request(name="mlp"))
    with pytest.raises(ConfigError, match="cannot read"):
        file_source(tmp_path / "none.onnx", Request(name="x", task="regression"))
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ConfigError, match="not an ONNX model"):
        file_source(tmp_path / "text.onnx", Request(name="x", task="regression"))


def test_half_precision_is_refused(mlp: tuple[Any, Path], tmp_path: Path) -> None:
    model = onnx.load(mlp[1])
    first = model.graph.initializer[0]
    halved = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(first).astype(np.float16))
    halved.name = first.name + ".half"
    model.graph.initializer.append(halved)
    onnx.save(model, tmp_path / "half.onnx")
    with pytest.raises(ConfigError, match="is not float32"):
        file_source(tmp_path / "half.onnx", Request(name="x", task="regression"))
