"""What the loss of a microbatch is multiplied by, so that a step's losses add up to the mean."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2ptrain.bundle.manifest import Loss

Array = NDArray[Any]  # Any: int64 class numbers, or float32 targets


def counted_labels(loss: Loss, labels: Array) -> int:
    """How many labels of a microbatch the loss counts.

    Cross-entropy leaves out labels equal to `ignore_index`; for the other losses every element of
    the labels counts.
    """
    if loss.kind == "cross-entropy":
        return int(np.count_nonzero(labels != loss.ignore_index))
    return int(labels.size)


def loss_weight(count: int) -> float:
    """One over the labels that count in a whole minibatch or held-out set, at least one.

    Graphs return the summed loss of a microbatch times it. So the losses of the microbatches add
    up to the mean per label, however the minibatch is split and wherever ignored labels lie.
    """
    return 1.0 / count
