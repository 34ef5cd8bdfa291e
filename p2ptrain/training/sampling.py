"""Which windows or records a microbatch holds: a function of (seed, step, sample).

Windows of a text draw an offset per sample. Records are visited once per data epoch, in an order
that is computed where it is needed and never stored.

Shapes: B samples of a microbatch, T context positions.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from p2ptrain.errors import DataError, InvariantBroken

WINDOW_STREAM: Final = 3 << 56
"""Second word of the Philox key: keeps windows apart from parameters and masks."""
ORDER_STREAM: Final = 4 << 56
"""As above, for the order of records."""
SPLIT_STREAM: Final = 5 << 56
"""As above, for which records are held out."""
_ROUNDS: Final = 8
_MULTIPLIERS: Final = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93))

Tokens = NDArray[Any]  # Any: uint8, uint16 or uint32, often memory-mapped
Numbers = NDArray[np.int64]


class Windows(NamedTuple):
    """Token ids and the ids that follow them, both int64 of shape (B, T)."""

    inputs: NDArray[np.int64]
    labels: NDArray[np.int64]


def training_windows(
    tokens: Tokens, *, seed: int, step: int, first_sample: int, count: int, context: int
) -> Windows:
    """Samples `first_sample` to `first_sample + count - 1` of one step's minibatch.

    Raises:
        DataError: the text is shorter than one sample.
    """
    taken = training_spans(
        tokens, seed=seed, step=step, first_sample=first_sample, count=count, length=context + 1
    )
    return _windows(taken)


def heldout_windows(
    tokens: Tokens, *, sample_count: int, first_sample: int, count: int, context: int
) -> Windows:
    """Part of a fixed set of `sample_count` windows, spread evenly over the text.

    They do not overlap while the text holds `sample_count` of them; DataError as above.
    """
    taken = heldout_spans(
        tokens,
        sample_count=sample_count,
        first_sample=first_sample,
        count=count,
        length=context + 1,
    )
    return _windows(taken)


def training_spans(
    tokens: Tokens, *, seed: int, step: int, first_sample: int, count: int, length: int
) -> Numbers:
    """`count` runs of `length` tokens, int64 (count, length); DataError as above.

    Each sample draws its own offset, so that any split into microbatches gives the same samples.
    """
    offset_count = window_count(tokens, context=length - 1)
    samples = range(first_sample, first_sample + count)
    offsets = [_drawn_offset(seed, step, sample, offset_count) for sample in samples]
    return _spans(tokens, offsets, length)


def heldout_spans(
    tokens: Tokens, *, sample_count: int, first_sample: int, count: int, length: int
) -> Numbers:
    """Part of a fixed, evenly spread set of runs of `length` tokens; DataError as above."""
    last_offset = window_count(tokens, context=length - 1) - 1
    gaps = max(sample_count - 1, 1)
    samples = range(first_sample, first_sample + count)
    return _spans(tokens, [sample * last_offset // gaps for sample in samples], length)


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


def _spans(tokens: Tokens, offsets: list[int], length: int) -> Numbers:
    starts = np.asarray(offsets, np.int64)[:, None]
    return np.asarray(tokens[starts + np.arange(length)]).astype(np.int64)


def _windows(taken: Numbers) -> Windows:
    return Windows(np.ascontiguousarray(taken[:, :-1]), np.ascontiguousarray(taken[:, 1:]))


class Permutation:
    """A keyed pseudorandom order of the numbers 0 to `count` - 1, in constant memory.

    A Feistel network of eight rounds permutes the smallest 2^(2h) >= count; numbers that leave
    the range are sent through it again until they are back, which keeps it a bijection.

    Source: cycle walking after Black and Rogaway 2002, section 4; the round function is ours.
    """

    def __init__(self, count: int, keys: NDArray[np.uint64]) -> None:
        if count < 1:
            raise InvariantBroken(f"a permutation of {count} numbers")
        self._count = np.uint64(count)
        self._half_bits = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
        self._keys = keys

    def at(self, positions: Numbers) -> Numbers:
        """The numbers at these positions, int64 of the same shape (n,)."""
        numbers = self._rounds(positions.astype(np.uint64))
        while (outside := numbers >= self._count).any():
            numbers[outside] = self._rounds(numbers[outside])
        return numbers.astype(np.int64)

    def _rounds(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        bits, low = self._half_bits, (np.uint64(1) << self._half_bits) - np.uint64(1)
        left, right = numbers >> bits, numbers & low
        for key in self._keys:
            left, right = right, left ^ (_mixed(right ^ key) >> (np.uint64(64) - bits))
        return (left << bits) | right


def record_order(count: int, *, seed: int, data_epoch: int) -> Permutation:
    """The order in which a data epoch visits `count` records."""
    return Permutation(count, _keys(seed, ORDER_STREAM, data_epoch))


def split_order(count: int) -> Permutation:
    """The fixed order whose first records are held out and whose others are trained on."""
    return Permutation(count, _keys(0, SPLIT_STREAM, 0))


def training_records(
    record_count: int, *, seed: int, step: int, minibatch_size: int, first_sample: int, count: int
) -> Numbers:
    """Which records one step's samples `first_sample` and the following are, int64 (count,).

    Steps count from 1; each record is visited once before any is visited again.
    """
    first = (step - 1) * minibatch_size + first_sample
    data_epochs, positions = np.divmod(first + np.arange(count, dtype=np.int64), record_count)
    records = np.empty(count, np.int64)
    for data_epoch in np.unique(data_epochs):
        here = data_epochs == data_epoch
        order = record_order(record_count, seed=seed, data_epoch=int(data_epoch))
        records[here] = order.at(positions[here])
    return records


def heldout_records(
    record_count: int, *, sample_count: int, first_sample: int, count: int
) -> Numbers:
    """Part of a fixed set of `sample_count` records, spread evenly; int64 (count,)."""
    samples = np.arange(first_sample, first_sample + count, dtype=np.int64)
    return samples * record_count // sample_count


def _keys(seed: int, stream: int, data_epoch: int) -> NDArray[np.uint64]:
    generator = np.random.Philox(
        key=np.array([seed, stream], np.uint64),
        counter=np.array([0, data_epoch, 0, 0], np.uint64),
    )
    return generator.random_raw(_ROUNDS)


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread every bit of a word upwards; wraps modulo 2^64."""
    words = words * _MULTIPLIERS[0]
    words ^= words >> np.uint64(32)
    return words * _MULTIPLIERS[1]
