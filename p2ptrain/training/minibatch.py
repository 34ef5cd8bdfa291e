"""All samples of one item of a run and the weight of their labels: what a data holder feeds.

Who feeds a running stage and who gives a replayed one its data again read it here, so that both
get the same bits from (seed, step).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from p2ptrain.bundle.manifest import Loss
from p2ptrain.errors import DataError
from p2ptrain.training.arrivals import LOSS_WEIGHT_DTYPE
from p2ptrain.training.contract import Contract
from p2ptrain.training.feed import Array, Feed, Samples
from p2ptrain.training.loss import counted_labels, loss_weight
from p2ptrain.training.program import Item
from p2ptrain.training.step_tensors import PackedTensor, encoded, pack

FedKind = Literal["input", "labels"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Minibatch:
    """An item's microbatches, read whole: what a label weighs depends on all of them."""

    feeds: tuple[Feed, ...]
    """By microbatch."""
    loss_weight: float

    def arrays(self, kind: FedKind, microbatch: int) -> tuple[Array, ...]:
        """What the first or the last stage gets for a microbatch, in index order."""
        feed = self.feeds[microbatch]
        if kind == "input":
            return feed.inputs
        return (feed.labels, np.array([self.loss_weight], LOSS_WEIGHT_DTYPE))

    def packed(self, kind: FedKind) -> bytes:
        """All of one kind, as `step_tensors` packs it."""
        return pack([
            PackedTensor(microbatch=microbatch, index=index, body=encoded(array))
            for microbatch in range(len(self.feeds))
            for index, array in enumerate(self.arrays(kind, microbatch))
        ])  # fmt: skip


def read_minibatch(samples: Samples, contract: Contract, loss: Loss, item: Item) -> Minibatch:
    """Read an item of training or evaluation; blocking where the samples lie in files.

    Raises:
        DataError: a sample cannot be read, or no label of the item counts; the run ends.
    """
    count = contract.microbatches if item.kind == "train" else contract.heldout_microbatches
    feeds = tuple(_read(samples, contract, item, microbatch) for microbatch in range(count))
    counted = sum(counted_labels(loss, feed.labels) for feed in feeds)
    if counted == 0:
        raise DataError(
            f"{item}: no label counts in all of its {len(feeds)} microbatches",
            hint="use larger minibatches, or data with more labels",
        )
    return Minibatch(feeds=feeds, loss_weight=loss_weight(counted))


def _read(samples: Samples, contract: Contract, item: Item, microbatch: int) -> Feed:
    size = contract.microbatch_size
    first_sample = microbatch * size
    if item.kind == "evaluate":
        sample_count = size * contract.heldout_microbatches
        return samples.heldout(sample_count=sample_count, first_sample=first_sample, count=size)
    return samples.training(
        seed=contract.seed, step=item.step, first_sample=first_sample, count=size
    )
