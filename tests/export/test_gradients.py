"""Traced torch modules as one segment each: forward, gradients and running values against torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from p2ptrain.graph.batch_norm import canonicalise_batch_norm
from p2ptrain.graph.canonical import canonicalise
from p2ptrain.graph.ir import FLOAT, Graph
from p2ptrain.graph.measured import gradient_error
from p2ptrain.graph.sources.inputs import Input
from p2ptrain.graph.sources.torch_model import TorchModel
from p2ptrain.graph.sources.torch_tracing import trace
from p2ptrain.graph.split import differentiate
from tests.lowering import draw, run

torch = pytest.importorskip("torch")
nn, functional = torch.nn, torch.nn.functional
pytestmark = pytest.mark.export


def traced(module: Any, x: np.ndarray) -> Graph:
    """The module in training mode; its one input may be anything with the batch first."""
    axes = ("batch", *map(str, x.shape[1:]))
    parameter = next(iter(inspect.signature(module.forward).parameters))
    inputs = {parameter: Input(name="x", dtype=str(x.dtype), axes=axes)}
    model = TorchModel(module=module, inputs=inputs)
    return trace(model, context=0, training=True).graph


def compare(module: Any, x: np.ndarray) -> None:
    """Both forms within 1e-5 of torch in float64, by the definition of the numerics contract."""
    graph = traced(module, x)
    canonicalise(graph, data="x")
    sites = canonicalise_batch_norm(graph)
    result = graph.outputs[0]
    graph.rename(result, "y")
    for node in graph.nodes:
        node.output[:] = ["y" if name == result else name for name in node.output]
    graph.types["y"] = graph.types[result]
    values = {name: value.detach().numpy().copy() for name, value in module.state_dict().items()}
    names = [name for name, _ in module.named_parameters()]
    real = x.dtype == np.float32
    exact = module.double()
    leaf = torch.tensor(x, dtype=torch.float64 if real else None, requires_grad=real)
    y = exact(leaf)
    cotangent = np.asarray(draw(*y.shape, seed=7))
    y.backward(torch.tensor(cotangent, dtype=torch.float64))
    reference = {n: p.grad.numpy() for n, p in exact.named_parameters()}
    if real:
        reference["x"] = leaf.grad.numpy()
    wanted = {name: f"gradient.{name}" for name in (*(["x"] if real else []), *names)}
    for portable in (True, False):
        pair = differentiate(graph, wanted=wanted, reference="x", portable=portable)
        feeds = {"x": x, **{n: v for n, v in values.items() if n in graph.inputs}}
        made = run(pair.forward, feeds)
        back = run(pair.backward, {**feeds, **made, "cotangent.y": cotangent})
        found = {name: back[output] for name, output in wanted.items()}
        assert gradient_error(found, reference)[0] < 1e-5
        assert np.abs(made["y"] - y.detach().numpy()).max() < 1e-5 * np.abs(made["y"]).max()
        for site in sites:
            for old, new in ((site.mean, site.new_mean), (site.variance, site.new_variance)):
                expected = exact.state_dict()[old].numpy()
                assert np.abs(made[new] - expected).max() < 1e-6 * np.abs(expected).max()
        if portable:
            assert {n.domain for g in (pair.forward, pair.backward) for n in g.nodes} == {""}


class Of(nn.Module):  # type: ignore[misc]
    """A function as a module."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x)


class First(nn.Module):  # type: ignore[misc]
    """The first result of a recurrent module."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Any) -> Any:
        return self.inner(x)[0]


class Residual(nn.Module):  # type: ignore[misc]
    """Inverted residual of MobileNetV2: 1x1, depthwise with stride, 1x1, each normalised."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.layers = nn.Sequential(
            nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6(),
            nn.Conv2d(12, 12, 3, stride, 1, groups=12, bias=False), nn.BatchNorm2d(12),
            nn.ReLU6(), nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6, momentum=0.3),
        )  # fmt: skip
        for part in self.layers:
            if isinstance(part, nn.BatchNorm2d):  # at 1 and 0 some gradients are truly near zero
                nn.init.normal_(part.weight)
                nn.init.normal_(part.bias)

    def forward(self, x: Any) -> Any:
        y = self.layers(x)
        return x + y if self.stride == 1 else y


class Gated(nn.Module):  # type: ignore[misc]
    """SwiGLU after RMSNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(8, eps=1e-6)
        self.gate, self.up = nn.Linear(8, 12, bias=False), nn.Linear(8, 12, bias=False)
        self.down = nn.Linear(12, 8, bias=False)

    def forward(self, x: Any) -> Any:
        h = self.norm(x)
        return x + self.down(functional.silu(self.gate(h)) * self.up(h))


def rotated(x: Any) -> Any:
    """Rotary position embedding over the last axis."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1]).float()[:, None] * 10.0 ** -torch.arange(half).float()
    cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


IMAGES = {
    "conv": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "conv_strided": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "conv_dilated": lambda: nn.Conv2d(4, 6, 3, dilation=2),
    "conv_grouped": lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "conv_transpose": lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1),
    "batch_norm": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)),
    "residual": lambda: Residual(1),
    "residual_strided": lambda: Residual(2),
    "group_norm": lambda: nn.GroupNorm(2, 4),
    "instance_norm": lambda: nn.InstanceNorm2d(4, affine=True),
    "max_pool": lambda: nn.MaxPool2d(3, 2, 1),
    "average_pool": lambda: nn.AvgPool2d(3, 2, 1),
    "adaptive_average": lambda: nn.AdaptiveAvgPool2d(1),
    "adaptive_average_2": lambda: nn.AdaptiveAvgPool2d(2),
    "adaptive_max": lambda: nn.AdaptiveMaxPool2d(1),
    "upsample": lambda: nn.Upsample(scale_factor=2),
    "pixel_shuffle": lambda: nn.PixelShuffle(2),
}
ROWS = {
    "lstm": lambda: First(nn.LSTM(8, 5, batch_first=True)),
    "lstm_deep": lambda: First(nn.LSTM(8, 5, num_layers=2, bidirectional=True, batch_first=True)),
    "gru": lambda: First(nn.GRU(8, 5, batch_first=True)),
    "gru_deep": lambda: First(nn.GRU(8, 5, num_layers=2, bidirectional=True, batch_first=True)),
    "gated": Gated,
    "rotary": lambda: Of(rotated),
    "gelu_tanh": lambda: nn.Sequential(nn.Linear(8, 9), nn.GELU(approximate="tanh")),
    "variance": lambda: Of(lambda x: x.var(1)),
    "deviation": lambda: Of(lambda x: x.std(-1)),
    "norm": lambda: Of(lambda x: x.norm(dim=-1)),
    "largest": lambda: Of(lambda x: x.amax(1)),
    "log_sum_exp": lambda: Of(lambda x: x.logsumexp(1)),
    "class_token": lambda: Of(lambda x: x[:, 0]),
    "last": lambda: Of(lambda x: x[:, -1]),
    "chunk": lambda: Of(lambda x: x.chunk(2, -1)[0].exp()),
    "repeat": lambda: Of(lambda x: x.repeat_interleave(2, 1)),
    "einsum": lambda: Of(lambda x: torch.einsum("bij,bkj->bik", x, x)),
    "attention": lambda: Of(
        lambda x: functional.scaled_dot_product_attention(
            *[x.unflatten(-1, (2, 4)).transpose(1, 2)] * 3, is_causal=True
        )
    ),
    "smooth_l1": lambda: Of(lambda x: functional.smooth_l1_loss(x, x * x, reduction="none")),
    "log_sigmoid": lambda: Of(functional.logsigmoid),
    **{
        name: (lambda name=name: Of(getattr(functional, name)))
        for name in (
            "hardswish", "hardsigmoid", "silu", "softplus", "elu", "selu", "celu", "mish",
            "leaky_relu", "gelu", "relu6", "softsign",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGES)
def test_module_over_images_agrees_with_torch(name: str) -> None:
    torch.manual_seed(3)
    compare(IMAGES[name](), draw(3, 6 if "residual" in name else 4, 8, 8))


@pytest.mark.parametrize("name", ROWS)
def test_module_over_rows_agrees_with_torch(name: str) -> None:
    torch.manual_seed(3)
    compare(ROWS[name](), draw(3, 4, 8))


def test_embedding_agrees_with_torch() -> None:
    torch.manual_seed(3)
    compare(nn.Embedding(7, 4), np.array([[1, 2, 1], [6, 0, 1]]))


def test_log_sigmoid_stays_finite_where_the_sigmoid_vanishes() -> None:
    graph = traced(Of(functional.logsigmoid), draw(3, 4))
    canonicalise(graph, data="x")
    x = np.full((3, 4), -200, np.float32)
    assert np.array_equal(next(iter(run(graph, {"x": x}).values())), x)


def test_parameters_keep_their_names() -> None:
    graph = traced(nn.Linear(4, 3), draw(3, 4))
    assert {n for n, t in graph.inputs.items() if t.dtype == FLOAT} == {"x", "weight", "bias"}
