"""What the loss of a microbatch is multiplied by, so that a step's losses add up to the mean."""

from __future__ import annotations


def loss_weight(*, samples: int, context: int) -> float:
    """One over the labels of `samples` windows: graphs return the summed cross-entropy times it.

    With the samples of a whole minibatch (or held-out set), the losses of its microbatches add up
    to the mean per token, however it is split.
    """
    return 1.0 / (samples * context)
