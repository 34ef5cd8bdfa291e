"""The learning rate of a step: linear warm-up, then a cosine down to the final rate."""

from __future__ import annotations

from typing import Final

import numpy as np

from p2ptrain.training.contract import OptimizerChoice

_PI: Final = 3.141592653589793
_TERMS: Final = 12


def learning_rate(choice: OptimizerChoice, *, step: int, steps: int) -> float:
    """The rate for `step`, 1 <= step <= steps, rounded to float32.

    The cosine is a fixed polynomial in IEEE additions and multiplications, because the last bit
    of a C library's cosine differs between machines, and a step may be replayed elsewhere.
    """
    if step <= choice.warmup_steps:
        rate = choice.peak_learning_rate * (step / choice.warmup_steps)
    else:
        span = max(steps - choice.warmup_steps, 1)
        progress = min((step - choice.warmup_steps) / span, 1.0)
        height = 0.5 * (1.0 + cosine_half_turns(progress))
        drop = choice.peak_learning_rate - choice.final_learning_rate
        rate = choice.final_learning_rate + drop * height
    return float(np.float32(rate))


def cosine_half_turns(turns: float) -> float:
    """cos(pi * turns) for 0 <= turns <= 1, the same bits everywhere, within 1e-15."""
    if turns > 0.5:
        return -cosine_half_turns(1.0 - turns)
    square = (_PI * turns) * (_PI * turns)
    value = 1.0
    for term in range(_TERMS, 0, -1):  # Horner's scheme of the Taylor series
        value = 1.0 - value * square / float((2 * term - 1) * (2 * term))
    return value
