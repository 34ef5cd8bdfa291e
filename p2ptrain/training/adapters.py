"""Low-rank adapters: the matrix that a frozen one and its adapter amount to."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2ptrain.bundle.manifest import Adapter

Array = NDArray[Any]  # Any: float32 or float64


def merged_weight(weight: Array, *, down: Array, up: Array, adapter: Adapter) -> Array:
    """W + scale * up @ down, computed in float64 and rounded once, to the dtype of `weight`.

    Args:
        weight: The frozen matrix, (out, in), or (in, out) where the adapter says transposed.
        down: (r, in).
        up: (out, r).
        adapter: Scale and layout.

    Source: LoRA, Hu et al. 2021, section 4.1.
    """
    change = adapter.scale * (up.astype(np.float64) @ down.astype(np.float64))
    if adapter.transposed:
        change = change.T
    merged: Array = np.ascontiguousarray((weight + change).astype(weight.dtype))
    return merged
