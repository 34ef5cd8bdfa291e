"""Optimizer scalars, by the names of the update graphs' inputs."""

from __future__ import annotations

import pytest

from p2ptrain.errors import InvariantBroken
from p2ptrain.training.contract import OptimizerChoice
from p2ptrain.training.optimizer import integer_power, optimizer_scalars
from tests.bundles import ADAMW_SCALARS, SGD_SCALARS


@pytest.mark.parametrize(("name", "scalars"), [("adamw", ADAMW_SCALARS), ("sgd", SGD_SCALARS)])
def test_optimizer_scalars_are_those_of_the_rule(name: str, scalars: tuple[str, ...]) -> None:
    values = optimizer_scalars(
        OptimizerChoice(name=name), step=1, learning_rate=0.1, clip_scale=0.5, decay=True
    )
    assert set(values) == set(scalars)
    assert (values["learning_rate"], values["clip_scale"]) == (0.1, 0.5)


def test_optimizer_scalars_follow_the_step_and_the_decay_flag() -> None:
    choice = OptimizerChoice(beta1=0.9, beta2=0.99, weight_decay=0.02)
    values = optimizer_scalars(choice, step=3, learning_rate=0.1, clip_scale=1.0, decay=False)
    assert values["weight_decay"] == 0.0
    assert values["correction1"] == pytest.approx(1 - 0.9**3, rel=1e-15)
    assert values["correction2_sqrt"] == pytest.approx((1 - 0.99**3) ** 0.5, rel=1e-14)
    assert values["one_minus_beta1"] == 1.0 - 0.9
    decayed = optimizer_scalars(choice, step=3, learning_rate=0.1, clip_scale=1.0, decay=True)
    assert decayed == {**values, "weight_decay": 0.02}


def test_optimizer_scalars_count_steps_from_one() -> None:
    with pytest.raises(InvariantBroken):
        optimizer_scalars(OptimizerChoice(), step=0, learning_rate=0.1, clip_scale=1.0, decay=True)


@pytest.mark.parametrize("exponent", [0, 1, 2, 3, 10, 1000, 1 << 20])
def test_integer_power_is_the_power(exponent: int) -> None:
    assert integer_power(0.999, exponent) == pytest.approx(0.999**exponent, rel=1e-10, abs=1e-300)
