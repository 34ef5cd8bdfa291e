"""Gradients of adapters: the chain rule from the merged matrix's, and nothing for the frozen."""

from __future__ import annotations

import numpy as np
import pytest

from p2ptrain.graph.adapters import add_adapters
from p2ptrain.graph.check import session_of
from p2ptrain.graph.ir import Graph, to_model
from p2ptrain.graph.split import Pair, differentiate
from p2ptrain.training.adapters import merged_weight
from tests.adapter_cases import PARAMETERS, drawn, lora, small_graph

pytest.importorskip("onnxruntime.capi._pybind_state")
try:
    from onnxruntime.capi._pybind_state import GradientGraphBuilder  # noqa: F401
except ImportError:
    pytest.skip("stock onnxruntime has no gradient builder", allow_module_level=True)


def gradients(pair: Pair, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    forward = run(pair.forward, values)
    return run(pair.backward, {**values, **forward})


def run(graph: Graph, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = session_of(to_model(graph).SerializeToString())
    found = session.run(graph.outputs, {name: values[name] for name in graph.inputs})
    return dict(zip(graph.outputs, found, strict=True))


def pair_of(graph: Graph, wanted: tuple[str, ...], *, portable: bool) -> Pair:
    named = {name: f"gradient.{name}" for name in wanted}
    return differentiate(graph, wanted=named, reference="ids", portable=portable)


@pytest.mark.parametrize("portable", [True, False])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_gradients_follow_from_those_of_the_merged_matrix(portable: bool, rank: int) -> None:
    graph = small_graph()
    adapted = add_adapters(graph, lora("all", rank=rank), among=PARAMETERS)
    values = drawn(graph)
    seed = np.random.Generator(np.random.Philox(9)).standard_normal((3, 7)).astype(np.float32)
    values["cotangent.y"] = seed
    pair = pair_of(graph, adapted.parameters, portable=portable)
    found = gradients(pair, values)
    assert set(found) == {f"gradient.{name}" for name in adapted.parameters}
    whole = pair_of(small_graph(), tuple(adapted.adapters), portable=portable)
    merged = dict(values)
    for name, adapter in adapted.adapters.items():
        down, up = values[adapter.down], values[adapter.up]
        merged[name] = merged_weight(values[name], down=down, up=up, adapter=adapter)
    reference = gradients(whole, merged)
    for name, adapter in adapted.adapters.items():
        plain = reference[f"gradient.{name}"].astype(float)
        plain = (plain.T if adapter.transposed else plain) * adapter.scale
        for part, wanted in (
            (adapter.up, plain @ values[adapter.down].T),
            (adapter.down, values[adapter.up].T @ plain),
        ):
            error = np.abs(found[f"gradient.{part}"] - wanted).max()
            assert error < 1e-5 * np.abs(wanted).max(), part


def test_no_product_as_large_as_a_frozen_matrix_is_made() -> None:
    graph = small_graph()
    adapted = add_adapters(graph, lora("query"), among=PARAMETERS)
    backward = pair_of(graph, adapted.parameters, portable=True).backward
    made = {backward.types[n].axes for node in backward.nodes for n in node.output}
    frozen = {graph.axes(name) for name in ("query.weight", "mixer", "table", "twice")}
    assert not made & frozen
    assert set(backward.outputs) == {f"gradient.{name}" for name in adapted.parameters}
