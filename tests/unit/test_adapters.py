"""Adapters as a pass over a graph: what they add, where they may be, and what they amount to."""

from __future__ import annotations

import numpy as np
import pytest

from p2ptrain.bundle.manifest import Adapter, Initialiser
from p2ptrain.errors import ConfigError
from p2ptrain.graph.adapters import add_adapters, without_adapters
from p2ptrain.graph.flow import Roles, analyse
from p2ptrain.graph.frontiers import allowed
from p2ptrain.graph.ir import FLOAT, Type
from p2ptrain.training.adapters import merged_weight
from tests.adapter_cases import PARAMETERS, drawn, lora, run, small_graph


def test_the_parts_have_names_shapes_and_initialisers() -> None:
    graph = small_graph()
    adapted = add_adapters(graph, lora("query", "mixer"), among=PARAMETERS)
    assert adapted.adapters == {
        "query.weight": Adapter(
            down="query.lora_down", up="query.lora_up", scale=1.5, transposed=False
        ),
        "mixer": Adapter(down="mixer.lora_down", up="mixer.lora_up", scale=1.5, transposed=True),
    }
    assert {name: graph.axes(name) for name in adapted.parameters} == {
        "query.lora_down": (2, 6),
        "query.lora_up": (4, 2),
        "mixer.lora_down": (2, 4),
        "mixer.lora_up": (6, 2),
    }
    assert adapted.initialisers["query.lora_down"] == Initialiser(kind="uniform", scale=0.40824829)
    assert adapted.initialisers["mixer.lora_up"] == Initialiser(kind="zeros")
    assert list(graph.inputs)[-4:] == list(adapted.parameters)


def test_a_graph_with_adapters_is_the_graph_with_merged_weights() -> None:
    graph, plain = small_graph(), small_graph()
    adapted = add_adapters(graph, lora("all"), among=PARAMETERS)
    assert set(adapted.adapters) == {"query.weight", "mixer", "twice"}
    values = drawn(graph)
    merged = dict(values)
    for name, adapter in adapted.adapters.items():
        down, up = values[adapter.down], values[adapter.up]
        merged[name] = merged_weight(values[name], down=down, up=up, adapter=adapter)
    wanted = run(plain, merged)
    assert np.abs(run(graph, values) - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert np.abs(run(plain, values) - wanted).max() > 0.1 * np.abs(wanted).max()


def test_a_fresh_adapter_changes_nothing() -> None:
    graph, plain = small_graph(), small_graph()
    adapted = add_adapters(graph, lora("all"), among=PARAMETERS)
    values = drawn(graph)
    values |= {a.up: np.zeros_like(values[a.up]) for a in adapted.adapters.values()}
    assert np.array_equal(run(graph, values), run(plain, values))


def test_without_adapters_the_graph_is_the_old_one() -> None:
    graph, plain = small_graph(), small_graph()
    add_adapters(graph, lora("all"), among=PARAMETERS)
    back = without_adapters(graph)
    assert list(back.inputs) == list(plain.inputs)
    assert [n.op_type for n in back.nodes] == [n.op_type for n in plain.nodes]
    values = drawn(plain)
    assert np.array_equal(run(back, values), run(plain, values))


def test_what_is_trained_itself_gets_no_adapter() -> None:
    adapted = add_adapters(small_graph(), lora("all"), among=("query.weight", "norm", "table"))
    assert set(adapted.adapters) == {"query.weight"}


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("table", "'table' is tied: Gather reads it as well as a linear"),
        ("norm", "'norm' is no matrix"),
        ("unread", "'unread' is read by nothing"),
        ("nothing", "--lora targets: no parameter's name fits 'nothing'"),
        ("mixer", "already has a value 'mixer.lora_down'"),
    ],
)
def test_a_target_that_is_no_linear_is_refused(target: str, said: str) -> None:
    graph = small_graph()
    graph.types["mixer.lora_down"] = Type(dtype=FLOAT, axes=(1,))
    with pytest.raises(ConfigError, match=said):
        add_adapters(graph, lora(target), among=PARAMETERS)


def test_no_cut_parts_a_matrix_from_its_adapter() -> None:
    graph = small_graph()
    adapted = add_adapters(graph, lora("all"), among=PARAMETERS)
    roles = Roles(data=("ids",), late=(), trainable=adapted.parameters, frozen=PARAMETERS)
    flow = analyse(graph, roles, {"batch": 1}, adapted.changes)
    made = [flow.order[position].output[0].partition("__")[0] for position in allowed(flow)]
    assert made == ["x", "change", "a", "change", "b", "change", "q", "change", "m", "scaled"]
    torn = {flow.order[position].output[0].partition("__")[0] for position in flow.torn()}
    assert torn == {"own", "low", "scaled"}


def test_an_embedding_alone_is_refused() -> None:
    graph = small_graph()
    graph.nodes.pop()
    with pytest.raises(ConfigError, match="'table' is read by Gather, not by a linear"):
        add_adapters(graph, lora("table"), among=PARAMETERS)
    graph.nodes = graph.nodes[:1]
    with pytest.raises(ConfigError, match="no linear whose matrix"):
        add_adapters(graph, lora("all"), among=PARAMETERS)


def test_a_matrix_in_both_layouts_is_refused() -> None:
    graph = small_graph()
    del graph.nodes[2].attribute[:]
    with pytest.raises(ConfigError, match="'twice' is read both as it is and transposed"):
        add_adapters(graph, lora("twice"), among=PARAMETERS)


def test_a_merged_weight_is_rounded_once() -> None:
    adapter = Adapter(down="d", up="u", scale=0.1, transposed=True)
    weight = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.float32)
    down, up = np.array([[0.3, 0.7]], np.float32), np.array([[1.1], [2.2], [3.3]], np.float32)
    merged = merged_weight(weight, down=down, up=up, adapter=adapter)
    wanted = weight.astype(float) + (0.1 * (up.astype(float) @ down.astype(float))).T
    assert merged.dtype == np.float32
    assert merged.flags.c_contiguous
    assert np.array_equal(merged, wanted.astype(np.float32))
