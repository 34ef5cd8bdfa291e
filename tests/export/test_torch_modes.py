"""One trace for both modes where they only differ in dropout and BatchNorm; else one for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from onnx_models.gpt import gpt
from onnx_models.mobilenet import Bottleneck
from p2ptrain.graph.ir import Graph, to_model
from p2ptrain.graph.local import rename_inner
from p2ptrain.graph.sources import torch_tracing
from p2ptrain.graph.sources.inputs import Input
from p2ptrain.graph.sources.torch_model import TorchModel
from p2ptrain.graph.sources.torch_modes import evaluates_as_it_trains
from p2ptrain.graph.sources.torch_tracing import trace, trace_both
from tests.export.family_models import TextClassifier

pytestmark = pytest.mark.export

Calls = list[Any]


class Of(nn.Module):
    """A function of the module and its input, with the parts that it may use."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.linear, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(6)
        self.beside = torch.ones(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def rows(module: nn.Module) -> TorchModel:
    return TorchModel(module=module, inputs={"x": Input(name="x", dtype="float32", axes=AXES)})


AXES = ("batch", "6")
ALIKE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "nothing": lambda m, x: m.linear(x),
    "dropout": lambda m, x: m.linear(m.dropout(x)) + m.dropout(m.other(x)),
    "dropout without effect": lambda m, x: functional.dropout(
        m.linear(x), p=0.3 if m.training else 0.0, training=m.training
    ),
    "batch norm": lambda m, x: m.linear(functional.relu(m.norm(m.linear(x)))),
    "in place before a dropout": lambda m, x: m.dropout(m.linear(x).add_(1.0)),
}
APART: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "another part": lambda m, x: m.linear(x) if m.training else m.other(x),
    "another order": lambda m, x: x - m.linear(x) if m.training else m.linear(x) - x,
    "another result": lambda m, x: (m.linear(x), m.other(x))[m.training],
    "another number": lambda m, x: m.linear(x) * (2 if m.training else 2.0),
    "a further call": lambda m, x: m.linear(x) + m.other(x) if m.training else m.linear(x),
    "noise": lambda m, x: m.linear(x) + torch.randn(6) if m.training else m.linear(x),
    "dropout for ever": lambda m, x: functional.dropout(m.linear(x), 0.5, True),
    "dropout never": lambda m, x: functional.dropout(m.linear(x), 0.5, False),
    "dropout of channels": lambda m, x: functional.dropout1d(m.linear(x), 0.5, m.training),
    "in place after a dropout": lambda m, x: m.dropout(x := m.linear(x)).add_(1.0) + x,
    "statistics for ever": lambda m, x: functional.batch_norm(x, None, None, training=True),
    "a tensor from nowhere": lambda m, x: m.linear(x) + m.beside,
    "what cannot be run": lambda m, x: m.linear(x[:, :2]),
}  # fmt: skip


@pytest.mark.parametrize("name", ALIKE)
def test_dropout_and_batch_norm_are_no_difference(name: str) -> None:
    assert evaluates_as_it_trains(rows(Of(ALIKE[name])), (torch.ones(3, 6),))


@pytest.mark.parametrize("name", APART)
def test_whatever_else_depends_on_the_mode_is_one(name: str) -> None:
    assert not evaluates_as_it_trains(rows(Of(APART[name])), (torch.ones(3, 6),))


@pytest.mark.parametrize(("dropout", "alike"), [(0.0, True), (0.5, False)])
def test_a_recurrent_network_has_its_dropout_inside(dropout: float, alike: bool) -> None:
    module = TextClassifier(nn.LSTM, layers=2, both_ways=False)
    module.network.dropout = dropout
    ids = Input(name="ids", dtype="int64", axes=("batch", "6"), high=30)
    model = TorchModel(module=module, inputs={"ids": ids})
    assert evaluates_as_it_trains(model, (torch.ones(3, 6, dtype=torch.int64),)) == alike


def test_asking_leaves_module_and_generator_as_they_were() -> None:
    module = Of(ALIKE["batch norm"])
    before = {name: value.clone() for name, value in module.state_dict().items()}
    drawn = torch.get_rng_state()
    assert evaluates_as_it_trains(rows(module), (torch.ones(3, 6),))
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """One entry for each time that torch exports."""
    calls: Calls = []
    export = torch_tracing._export

    def counted(*given: Any) -> Any:
        calls.append(given)
        return export(*given)

    monkeypatch.setattr(torch_tracing, "_export", counted)
    return calls


def text(graph: Graph) -> bytes:
    """A graph in which only names of inner values are left out."""
    renamed = graph.copy()
    rename_inner(renamed, "v")
    for node in renamed.nodes:
        node.name = ""
        del node.metadata_props[:]
    content: bytes = to_model(renamed).SerializeToString()
    return content


def small_gpt() -> TorchModel:
    module = gpt(layers=1, width=8, heads=2, vocabulary=9, context=5, dropout=0.1)
    ids = Input(name="ids", dtype="int64", axes=("batch", "sequence"), high=9)
    return TorchModel(module=module, inputs={"ids_BT": ids})


def bottleneck() -> TorchModel:
    module = nn.Sequential(Bottleneck(4, 4, expansion=2, stride=1), nn.Dropout(0.2))
    image = Input(name="x", dtype="float32", axes=("batch", "4", "5", "5"))
    return TorchModel(module=module, inputs={"input": image})


@pytest.mark.parametrize("make", [small_gpt, bottleneck])
def test_one_trace_gives_what_two_would(make: Callable[[], TorchModel], exports: Calls) -> None:
    model = make()
    both = trace_both(model, context=5)
    assert len(exports) == 1
    apart = trace(model, context=5, training=False)
    assert both.inference.parameters == apart.parameters
    assert text(both.inference.graph) == text(apart.graph)
    assert text(both.training.graph) == text(trace(model, context=5, training=True).graph)
    assert any(node.op_type == "Dropout" for node in both.training.graph.nodes)


def test_modes_that_differ_are_traced_one_by_one(exports: Calls) -> None:
    both = trace_both(rows(Of(APART["another part"])), context=0)
    assert len(exports) == 2
    assert both.training.parameters == ("linear.weight", "linear.bias")
    assert both.inference.parameters == ("other.weight", "other.bias")
