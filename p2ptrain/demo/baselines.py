"""What counting alone reaches: the loss of byte unigrams and bigrams on held-out text.

A model that has learnt nothing but letter frequencies gets the unigram figure; one that has
learnt which byte follows which gets the bigram figure. Both are in nats per byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

BYTES: Final = 256
UNIGRAM_WEIGHT: Final = 2.0
"""How many observations the unigram distribution counts for behind each bigram."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Baselines:
    """Held-out losses of counting, nats per byte."""

    unigram: float
    bigram: float


def baselines(train: bytes, heldout: bytes) -> Baselines:
    """Count in `train`, measure on `heldout`; ValueError when either has under two bytes."""
    if len(train) < 2 or len(heldout) < 2:
        raise ValueError("a text to count in has at least two bytes")
    train_N = np.frombuffer(train, dtype=np.uint8)
    heldout_M = np.frombuffer(heldout, dtype=np.uint8)
    unigram_V = unigram_probabilities(train_N)
    bigram_VV = bigram_probabilities(train_N, unigram_V)
    return Baselines(
        unigram=float(-np.log(unigram_V[heldout_M[1:]]).mean()),
        bigram=float(-np.log(bigram_VV[heldout_M[:-1], heldout_M[1:]]).mean()),
    )


def unigram_probabilities(train_N: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Byte frequencies with one added to each count, shape (256,), summing to 1."""
    counts_V = np.bincount(train_N, minlength=BYTES).astype(np.float64) + 1.0
    normalised_V: NDArray[np.float64] = counts_V / counts_V.sum()
    return normalised_V


def bigram_probabilities(
    train_N: NDArray[np.uint8], unigram_V: NDArray[np.float64]
) -> NDArray[np.float64]:
    """P(next | previous), shape (256, 256), rows summing to 1; unigrams fill what was not seen."""
    pairs_N = train_N[:-1].astype(np.int64) * BYTES + train_N[1:]
    counts_VV = np.bincount(pairs_N, minlength=BYTES * BYTES).reshape(BYTES, BYTES)
    smoothed_VV = counts_VV + UNIGRAM_WEIGHT * unigram_V[None, :]
    normalised_VV: NDArray[np.float64] = smoothed_VV / smoothed_VV.sum(axis=1, keepdims=True)
    return normalised_VV
