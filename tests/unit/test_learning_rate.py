"""Warm-up and cosine decay, in arithmetic that every machine does alike."""

from __future__ import annotations

import math

import numpy as np
import pytest

from p2ptrain.training.contract import OptimizerChoice
from p2ptrain.training.learning_rate import cosine_half_turns, learning_rate

CHOICE = OptimizerChoice(peak_learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=10)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(1, 1e-3), (5, 5e-3), (10, 1e-2), (60, 5.5e-3), (110, 1e-3), (35, 8.681981e-3)],
)
def test_learning_rate_follows_the_schedule(step: int, expected: float) -> None:
    assert learning_rate(CHOICE, step=step, steps=110) == pytest.approx(expected, rel=1e-6)


def test_learning_rate_is_a_float32_and_falls_after_the_warm_up() -> None:
    rates = [learning_rate(CHOICE, step=step, steps=110) for step in range(1, 111)]
    assert all(rate == float(np.float32(rate)) for rate in rates)
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_learning_rate_without_warm_up_starts_below_the_peak() -> None:
    choice = OptimizerChoice(peak_learning_rate=1.0, final_learning_rate=0.0, warmup_steps=0)
    rates = [learning_rate(choice, step=step, steps=4) for step in (1, 2, 3, 4)]
    assert rates == pytest.approx([0.853553, 0.5, 0.146447, 0.0], abs=1e-6)


def test_learning_rate_when_all_steps_are_warm_up() -> None:
    assert learning_rate(CHOICE, step=3, steps=5) == pytest.approx(3e-3)


def test_cosine_agrees_with_the_library_and_at_the_ends() -> None:
    for turns in np.linspace(0.0, 1.0, 1001):
        exact = math.cos(math.pi * turns)
        assert cosine_half_turns(float(turns)) == pytest.approx(exact, abs=1e-15)
    assert [cosine_half_turns(t) for t in (0.0, 1.0)] == [1.0, -1.0]


def test_cosine_golden_bits() -> None:
    assert cosine_half_turns(0.25).hex() == "0x1.6a09e667f3bcdp-1"
