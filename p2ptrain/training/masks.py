"""Dropout masks that anybody can draw again: a function of the place they are used in.

A mask depends on (seed, step, microbatch, segment, site) and on nothing else: not on the stage,
the peer, the threads, or on how often it was drawn. ONNX's seeded Dropout advances with every run
and cannot be replayed, so masks are graph inputs (DESIGN section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from p2ptrain.errors import InvariantBroken

MASK_STREAM: Final = 2 << 56
"""Second word of the Philox key: keeps masks apart from parameters (1 << 56)."""
_WORDS_PER_CHUNK: Final = 8192
_BITS: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskPlace:
    """Which mask: indices are global, so any placement draws the same."""

    seed: int
    step: int
    """Counted from 1."""
    microbatch: int
    """Index within the step, over all replicas."""
    segment: int
    """Index within the model."""
    site: int
    """Index of the dropout site within its segment."""


def draw_mask(place: MaskPlace, probability: float, out: NDArray[np.float32]) -> None:
    """Fill `out` with a dropout mask.

    Args:
        place: Which mask to draw.
        probability: Of a zero, 0 <= probability < 1; realised in steps of 1 / 65536.
        out: Contiguous float32 of any shape; each element becomes 0 or float32(1 / (1 - p)).

    Four elements come from one 64-bit Philox word, lowest 16 bits first.
    """
    if not 0.0 <= probability < 1.0:
        raise InvariantBroken(f"dropout probability {probability} is not in [0, 1)")
    if probability == 0.0:
        out.fill(1.0)
        return
    flat = out.reshape(-1)
    generator = _generator(place)
    threshold = np.uint16(min(round(probability * (1 << _BITS)), (1 << _BITS) - 1))
    scale = np.float32(1.0 / (1.0 - probability))
    for start in range(0, flat.size, 4 * _WORDS_PER_CHUNK):
        part = flat[start : start + 4 * _WORDS_PER_CHUNK]
        words = generator.random_raw(-(-part.size // 4)).astype("<u8", copy=False)
        kept = words.view("<u2")[: part.size] >= threshold
        np.multiply(kept, scale, out=part)


def _generator(place: MaskPlace) -> np.random.Philox:
    """The counter's lowest word counts blocks; the other three hold the place."""
    where = (place.segment << 32) | place.site
    return np.random.Philox(
        key=np.array([place.seed, MASK_STREAM], np.uint64),
        counter=np.array([0, where, place.microbatch, place.step], np.uint64),
    )
