"""The scalar inputs of the update graphs, computed alike on every peer."""

from __future__ import annotations

import math

from p2ptrain.errors import InvariantBroken
from p2ptrain.training.contract import OptimizerChoice


def optimizer_scalars(
    choice: OptimizerChoice, *, step: int, learning_rate: float, clip_scale: float, decay: bool
) -> dict[str, float]:
    """Every scalar of the chosen update rule, by input name, in float64 before rounding.

    Args:
        choice: The run's optimizer and hyperparameters.
        step: The update's number, counted from 1; Adam's bias correction follows from it.
        learning_rate: This step's rate.
        clip_scale: Factor on the gradient.
        decay: Whether weight decay applies to the tensors at hand.
    """
    if step < 1:
        raise InvariantBroken("steps are counted from 1")
    common = {
        "learning_rate": learning_rate,
        "clip_scale": clip_scale,
        "weight_decay": choice.weight_decay if decay else 0.0,
    }
    if choice.name == "sgd":
        return {**common, "momentum": choice.momentum}
    return {
        **common,
        "beta1": choice.beta1,
        "beta2": choice.beta2,
        "one_minus_beta1": 1.0 - choice.beta1,
        "one_minus_beta2": 1.0 - choice.beta2,
        "epsilon": choice.epsilon,
        "correction1": 1.0 - integer_power(choice.beta1, step),
        "correction2_sqrt": math.sqrt(1.0 - integer_power(choice.beta2, step)),
    }


def integer_power(base: float, exponent: int) -> float:
    """`base` to a whole power by repeated squaring: IEEE multiplications in a fixed order.

    A C library's `pow` may differ in the last bit from machine to machine.
    """
    result, square, left = 1.0, base, exponent
    while left:
        if left & 1:
            result *= square
        square *= square
        left >>= 1
    return result
