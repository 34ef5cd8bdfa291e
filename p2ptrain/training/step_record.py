"""What decides one optimizer step once all its gradients exist; durable before it is applied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from p2ptrain import limits


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """The outcome of a step: whoever has it and the step's gradients can apply the update.

    A replayed stage takes `clip_scale` from here, since it cannot know the other stages' norms.
    """

    step: int
    """Counted from 1."""
    loss: float
    """Mean loss of the minibatch."""
    gradient_norm: float
    clip_scale: float

    def __post_init__(self) -> None:
        if not 1 <= self.step <= limits.STEPS_MAX:
            raise ValueError("a step is counted from 1")
        if not all(map(math.isfinite, (self.loss, self.gradient_norm, self.clip_scale))):
            raise ValueError("a step whose numbers are not finite is never recorded")


def check_consecutive(records: Sequence[StepRecord]) -> None:
    """ValueError unless each record's step follows the one before."""
    first = records[0].step if records else 0
    if any(record.step != first + index for index, record in enumerate(records)):
        raise ValueError("records of steps follow each other without gaps")
