"""All samples of one item of a run and the weight of their labels: what a data holder feeds.

Who feeds a running stage and who gives a replayed one its data again read it here, so that both
get the same bits from (seed, step). Where the data has owners, each reads its own part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from p2ptrain.bundle.manifest import Loss
from p2ptrain.errors import DataError
from p2ptrain.training.arrivals import LOSS_WEIGHT_DTYPE
from p2ptrain.training.contract import Contract
from p2ptrain.training.feed import Array, Feed, Samples
from p2ptrain.training.loss import counted_labels, loss_weight
from p2ptrain.training.owners import DataOwner, own_microbatches, own_seed
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
        return fed_arrays(self.feeds[microbatch], kind, self.loss_weight)

    def packed(self, kind: FedKind) -> bytes:
        """All of one kind, as `step_tensors` packs it."""
        return pack([
            PackedTensor(microbatch=microbatch, index=index, body=encoded(array))
            for microbatch in range(len(self.feeds))
            for index, array in enumerate(self.arrays(kind, microbatch))
        ])  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnPart:
    """An owner's part of an item."""

    feeds: Mapping[int, Feed]
    """By microbatch of the item, ascending."""
    counted: int
    """Of its labels, those that the loss counts; perhaps none."""


def fed_arrays(feed: Feed, kind: FedKind, weight: float) -> tuple[Array, ...]:
    """A microbatch's arrays of one kind, in index order; labels come with their loss weight."""
    if kind == "input":
        return feed.inputs
    return (feed.labels, np.array([weight], LOSS_WEIGHT_DTYPE))


def read_minibatch(samples: Samples, contract: Contract, loss: Loss, item: Item) -> Minibatch:
    """Read an item of training or evaluation; blocking where the samples lie in files.

    Raises:
        DataError: a sample cannot be read, or no label of the item counts; the run ends.
    """
    count = contract.microbatches if item.kind == "train" else contract.heldout_microbatches
    feeds = tuple(_read(samples, contract, item, microbatch) for microbatch in range(count))
    counted = sum(counted_labels(loss, feed.labels) for feed in feeds)
    return Minibatch(feeds=feeds, loss_weight=item_weight(item, counted, count))


def item_weight(item: Item, counted: int, microbatches: int) -> float:
    """What each label of an item weighs, of so many in all its microbatches that count.

    Raises:
        DataError: none counts; the run ends.
    """
    if counted == 0:
        raise DataError(
            f"{item}: no label counts in all of its {microbatches} microbatches",
            hint="use larger minibatches, or data with more labels",
        )
    return loss_weight(counted)


def read_own_part(
    samples: Samples, contract: Contract, loss: Loss, owner: DataOwner, item: Item
) -> OwnPart:
    """Read an owner's microbatches of an item: the first of a step's samples are its first.

    `samples` are the owner's, for steps of as many samples as its microbatches have. Blocking.

    Raises:
        DataError: a sample cannot be read; the run ends.
    """
    count = contract.microbatches if item.kind == "train" else contract.heldout_microbatches
    own, size = own_microbatches(contract.owners, owner.device, count), contract.microbatch_size
    seed, feeds = own_seed(contract.seed, owner), {}
    for place, microbatch in enumerate(own):
        first = place * size
        if item.kind == "evaluate":
            feeds[microbatch] = samples.heldout(
                sample_count=size * len(own), first_sample=first, count=size
            )
        else:
            feeds[microbatch] = samples.training(
                seed=seed, step=item.step, first_sample=first, count=size
            )
    counted = sum(counted_labels(loss, feed.labels) for feed in feeds.values())
    return OwnPart(feeds=feeds, counted=counted)


def _read(samples: Samples, contract: Contract, item: Item, microbatch: int) -> Feed:
    size = contract.microbatch_size
    first_sample = microbatch * size
    if item.kind == "evaluate":
        sample_count = size * contract.heldout_microbatches
        return samples.heldout(sample_count=sample_count, first_sample=first_sample, count=size)
    return samples.training(
        seed=contract.seed, step=item.step, first_sample=first_sample, count=size
    )
