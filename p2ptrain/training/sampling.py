"""Which windows of the text a microbatch holds: a function of (seed, step, sample).

Shapes: B samples of a microbatch, T context positions.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from p2ptrain.errors import DataError

WINDOW_STREAM: Final = 3 << 56
"""Second word of the Philox key: keeps windows apart from parameters and masks."""

Tokens = NDArray[np.uint8]


class Windows(NamedTuple):
    """Token ids and the ids that follow them, both int64 of shape (B, T)."""

    inputs: NDArray[np.int64]
    labels: NDArray[np.int64]


def training_windows(
    tokens: Tokens, *, seed: int, step: int, first_sample: int, count: int, context: int
) -> Windows:
    """Samples `first_sample` to `first_sample + count - 1` of one step's minibatch.

    Each sample draws its own offset, so that any split into microbatches gives the same samples.

    Raises:
        DataError: the text is shorter than one sample.
    """
    offset_count = window_count(tokens, context=context)
    samples = range(first_sample, first_sample + count)
    offsets = [_drawn_offset(seed, step, sample, offset_count) for sample in samples]
    return _windows(tokens, offsets, context)


def heldout_windows(
    tokens: Tokens, *, sample_count: int, first_sample: int, count: int, context: int
) -> Windows:
    """Part of a fixed set of `sample_count` windows, spread evenly over the text.

    They do not overlap while the text holds `sample_count` of them; DataError as above.
    """
    last_offset = window_count(tokens, context=context) - 1
    gaps = max(sample_count - 1, 1)
    samples = range(first_sample, first_sample + count)
    return _windows(tokens, [sample * last_offset // gaps for sample in samples], context)


def window_count(tokens: Tokens, *, context: int) -> int:
    """Offsets at which a sample may start: each needs `context` tokens and one more.

    Raises:
        DataError: there is none.
    """
    count = int(tokens.size) - context
    if count < 1:
        raise DataError(
            f"the text has {tokens.size} tokens; one sample needs {context + 1}",
            hint="give a longer text, or a model with a shorter context",
        )
    return count


def _drawn_offset(seed: int, step: int, sample: int, offset_count: int) -> int:
    generator = np.random.Philox(
        key=np.array([seed, WINDOW_STREAM], np.uint64),
        counter=np.array([0, sample, step, 0], np.uint64),
    )
    return (int(generator.random_raw()) * offset_count) >> 64


def _windows(tokens: Tokens, offsets: list[int], context: int) -> Windows:
    starts = np.asarray(offsets, np.int64)[:, None]
    taken = tokens[starts + np.arange(context + 1)].astype(np.int64)
    return Windows(np.ascontiguousarray(taken[:, :-1]), np.ascontiguousarray(taken[:, 1:]))
