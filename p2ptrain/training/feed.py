"""What a run's data gives: the samples of one microbatch, and how much a minibatch's labels weigh.

Shapes: B samples of a microbatch; what follows B is the model's own, as its ports say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from p2ptrain.ids import Digest

Array = NDArray[Any]  # Any: float32, int64 and bool, as the ports say


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """One microbatch: an array per data port of the first segment, in port order, and labels."""

    inputs: tuple[Array, ...]
    """Each (B, ...), contiguous, of its port's shape and dtype."""
    labels: Array
    """(B, ...) of the labels port's shape and dtype."""


class Samples(Protocol):
    """The samples of a run; what it gives follows from the seed, the step and the sample's number
    alone, so that every machine that holds the data gives the same bits."""

    @property
    def digest(self) -> Digest:
        """Of everything that decides the samples: content, fields, tokenizer."""
        ...

    def training(self, *, seed: int, step: int, first_sample: int, count: int) -> Feed:
        """Samples `first_sample` and the following of one step's minibatch, counted from 0.

        Raises:
            DataError: a sample cannot be read any more; names it.
        """
        ...

    def heldout(self, *, sample_count: int, first_sample: int, count: int) -> Feed:
        """Part of a fixed set of `sample_count` held-out samples; DataError as above."""
        ...
