"""Clipping by the global gradient norm, over all stages, in manifest order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from p2ptrain.errors import NumericsError


class Clip(NamedTuple):
    """The gradient norm before clipping, and the factor that every gradient is scaled by."""

    norm: float
    scale: float


def clip_scale(square_sums: Sequence[float], clip_norm: float) -> Clip:
    """Norm and scale from one float64 square sum per parameter.

    Args:
        square_sums: In manifest order, whatever the placement; added one by one.
        clip_norm: The largest norm that passes unscaled; 0 switches clipping off.

    Raises:
        NumericsError: a sum is not finite; the step is not applied anywhere.
    """
    total = 0.0
    for index, square in enumerate(square_sums):
        if not math.isfinite(square):
            raise NumericsError(f"the gradient of parameter {index} is not finite")
        total += float(square)
    if not math.isfinite(total):
        raise NumericsError("the gradient norm is not finite")
    norm = math.sqrt(total)
    if clip_norm <= 0.0 or norm <= clip_norm:
        return Clip(norm, 1.0)
    return Clip(norm, clip_norm / norm)
