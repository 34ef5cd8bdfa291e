"""Update graphs against the optimizers' formulas in float64, and the proof of in-place use."""

from __future__ import annotations

import numpy as np
import pytest

from p2ptrain.graph.ir import Graph, make, to_model
from p2ptrain.graph.runner import session_of
from p2ptrain.graph.update import Update, adamw, overwrite_is_safe, sgd

SCALARS = {
    "learning_rate": 0.01,
    "clip_scale": 0.5,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "one_minus_beta1": 0.1,
    "one_minus_beta2": 0.05,
    "epsilon": 1e-8,
    "momentum": 0.9,
}


def draw(seed: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(seed)).standard_normal(50)


def three_steps(update: Update) -> np.ndarray:
    session = session_of(to_model(update.graph).SerializeToString())
    outputs = [entry.name for entry in session.get_outputs()]
    values = {"parameter": draw(0).astype(np.float32)}
    values |= {f"state.{name}": np.zeros(50, np.float32) for name in update.state}
    for step in (1, 2, 3):
        scalars = SCALARS | {
            "correction1": 1 - 0.9**step,
            "correction2_sqrt": (1 - 0.95**step) ** 0.5,
        }
        feeds = values | {n: np.array(scalars[n], np.float32) for n in update.scalars}
        feeds["gradient"] = draw(step).astype(np.float32)
        found = dict(zip(outputs, session.run(outputs, feeds), strict=True))
        values = {name.removeprefix("new."): value for name, value in found.items()}
    return values["parameter"]


def test_adamw_follows_loshchilov_and_hutter() -> None:
    p, m, v = draw(0), np.zeros(50), np.zeros(50)
    for step in (1, 2, 3):
        g = 0.5 * draw(step)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        direction = m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.95**step)) + 1e-8)
        p = p - 0.01 * 0.1 * p - 0.01 * direction
    assert np.abs(three_steps(adamw()) - p).max() < 1e-6


def test_sgd_adds_weight_decay_to_the_gradient() -> None:
    p, buffer = draw(0), np.zeros(50)
    for step in (1, 2, 3):
        buffer = 0.9 * buffer + 0.5 * draw(step) + 0.1 * p
        p = p - 0.01 * buffer
    assert np.abs(three_steps(sgd()) - p).max() < 1e-6


@pytest.mark.parametrize("update", [adamw(), sgd()], ids=["adamw", "sgd"])
def test_updates_in_place_give_the_same_bits(update: Update) -> None:
    assert update.in_place
    session = session_of(to_model(update.graph).SerializeToString())
    vectors = ["parameter", *(f"state.{name}" for name in update.state)]
    scalars = SCALARS | {"correction1": 0.1, "correction2_sqrt": 0.3}
    feeds = {n: np.array(scalars[n], np.float32) for n in update.scalars}
    feeds |= {n: np.abs(draw(i)).astype(np.float32) for i, n in enumerate(vectors)}
    feeds["gradient"] = draw(9).astype(np.float32)
    outputs = [entry.name for entry in session.get_outputs()]
    apart = dict(zip(outputs, session.run(outputs, feeds), strict=True))
    binding = session.io_binding()
    for name, value in feeds.items():
        binding.bind_input(name, "cpu", 0, value.dtype, value.shape, value.ctypes.data)
    for name in outputs:
        shared = feeds[name.removeprefix("new.")]
        binding.bind_output(name, "cpu", 0, shared.dtype, shared.shape, shared.ctypes.data)
    session.run_with_iobinding(binding)
    for name in outputs:
        assert np.array_equal(feeds[name.removeprefix("new.")], apart[name])


def test_a_later_reader_of_the_old_value_forbids_in_place() -> None:
    graph = Graph(
        outputs=["new", "other"],
        nodes=[
            make("Mul", ["old", "s"], ["new"]),
            make("Add", ["old", "new"], ["other"]),
        ],
    )
    assert not overwrite_is_safe(graph, "new", "old")
    assert overwrite_is_safe(graph, "other", "old")


def test_an_unordered_reader_of_the_old_value_forbids_in_place() -> None:
    graph = Graph(
        outputs=["new", "other"],
        nodes=[make("Mul", ["old", "s"], ["new"]), make("Neg", ["old"], ["other"])],
    )
    assert not overwrite_is_safe(graph, "new", "old")
