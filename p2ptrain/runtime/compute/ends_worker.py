"""The first and the last stage of a private run, both on the device that owns the data.

Each end computes on its own, microbatch by microbatch; gradients, updates and states are those of
one device.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from p2ptrain.engine.contract import Array
from p2ptrain.errors import InvariantBroken
from p2ptrain.runtime.compute.segment_memory import FloatArray
from p2ptrain.runtime.compute.stage import StageWorker
from p2ptrain.training.segment_image import SegmentImage
from p2ptrain.training.segment_state import SegmentState, StateHeader


class EndsWorker:
    """Two stages that take part in every commit together; blocking, as `StageWorker`."""

    def __init__(self, front: StageWorker, back: StageWorker) -> None:
        """`back` runs the model's last segments, `front` its first; some lie between."""
        if front.segments.stop >= back.segments.start:
            raise InvariantBroken("other stages lie between the ends of a private run")
        self.front, self.back = front, back
        self._tensor_indices = tuple(sorted((*front.tensor_indices, *back.tensor_indices)))

    @property
    def ends(self) -> tuple[StageWorker, StageWorker]:
        """The front, the back."""
        return self.front, self.back

    @property
    def segments(self) -> tuple[int, ...]:
        """Of both ends, ascending."""
        return (*self.front.segments, *self.back.segments)

    @property
    def tensor_indices(self) -> tuple[int, ...]:
        """Manifest indices of both ends' tensors, ascending: the order of `square_sums`."""
        return self._tensor_indices

    @property
    def applied_step(self) -> int | None:
        """Updates applied to every segment; None while they differ."""
        step = self.front.applied_step
        return step if step == self.back.applied_step else None

    @property
    def gradients_complete(self) -> bool:
        """Whether only the update of the step is missing, at both ends."""
        return self.front.gradients_complete and self.back.gradients_complete

    @property
    def held_ties(self) -> tuple[str, ...]:
        """Tensors here whose gradient is a sum over copies, in segment order."""
        return (*self.front.held_ties, *self.back.held_ties)

    def draw_parameters(self) -> None:
        """Start afresh."""
        for end in self.ends:
            end.draw_parameters()

    def load(self, segment_index: int, state: SegmentState) -> None:
        """Take over one segment's state; CheckpointError when it does not fit."""
        self._end_of(segment_index).load(segment_index, state)

    def state(self, segment_index: int, step: int) -> SegmentState:
        """A copy of one segment's state after `step` updates."""
        return self._end_of(segment_index).state(segment_index, step)

    def image(self, header: StateHeader) -> SegmentImage:
        """A segment's file with its present state, between two steps."""
        return self._end_of(header.segment).image(header)

    def gradient(self, name: str) -> FloatArray:
        """The accumulated gradient of a tied tensor of either end: a live view."""
        end = self.front if name in self.front.held_ties else self.back
        return end.gradient(name)

    def sum_ties(self, elsewhere: Mapping[str, Array]) -> None:
        """Give every copy of a tied tensor at both ends the sum of all copies' gradients.

        `elsewhere`: gradients of the copies on other devices, by tensor name.
        """
        given = {
            end: {name: end.gradient(name).copy() for name in end.held_ties} for end in self.ends
        }
        for end, other in ((self.front, self.back), (self.back, self.front)):
            if end.held_ties:
                end.sum_ties({**elsewhere, **given[other]})

    def square_sums(self) -> NDArray[np.float64]:
        """Square sums of the accumulated gradients, one per tensor as `tensor_indices` orders."""
        sums = {
            index: value
            for end in self.ends
            for index, value in zip(end.tensor_indices, end.square_sums(), strict=True)
        }
        return np.array([sums[index] for index in self._tensor_indices], np.float64)

    def update(self, *, step: int, learning_rate: float, clip_scale: float) -> None:
        """Apply the step's update at both ends."""
        for end in self.ends:
            end.update(step=step, learning_rate=learning_rate, clip_scale=clip_scale)

    def abandon_step(self) -> None:
        """Forget microbatches in flight and gradients; parameters stay as they are."""
        for end in self.ends:
            end.abandon_step()

    def _end_of(self, segment_index: int) -> StageWorker:
        return self.front if segment_index in self.front.segments else self.back
