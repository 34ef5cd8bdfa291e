"""The square sum of one gradient, the same wherever its segment is placed."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

CHUNK_ELEMENTS: Final = 65_536


def square_sum(gradient: NDArray[np.float32], scratch: NDArray[np.float64] | None = None) -> float:
    """Sum of squares in float64: chunks of 65,536 elements, added in order.

    Args:
        gradient: Contiguous float32 of any shape.
        scratch: At least min(65,536, size) float64 values to work in; allocated when None.

    Returns:
        The sum; infinite or NaN when the gradient is not finite, for `clip_scale` to refuse.
    """
    flat = gradient.reshape(-1)
    work = np.empty(min(flat.size, CHUNK_ELEMENTS)) if scratch is None else scratch
    total = 0.0
    with np.errstate(all="ignore"):
        for start in range(0, flat.size, CHUNK_ELEMENTS):
            chunk = flat[start : start + CHUNK_ELEMENTS]
            squares = work[: chunk.size]
            np.copyto(squares, chunk)
            np.multiply(squares, squares, out=squares)
            total += float(np.add.reduce(squares))
    return total
