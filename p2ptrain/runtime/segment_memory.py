"""One segment's parameters, gradients and optimizer state: flat vectors and views into them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from p2ptrain.engine.contract import Buffer, Engine
from p2ptrain.errors import CheckpointError
from p2ptrain.training.layout import FlatLayout, Place
from p2ptrain.training.segment_state import SegmentState
from p2ptrain.training.squares import square_sum

FloatArray = NDArray[np.float32]


class SegmentMemory:
    """Vectors of one segment; tensors are views into them, so nothing is gathered or scattered."""

    def __init__(self, engine: Engine, layout: FlatLayout, state_names: tuple[str, ...]) -> None:
        self._engine = engine
        self.layout = layout
        self.parameters: FloatArray = _zeros(engine, layout.length)
        self.gradients: FloatArray = _zeros(engine, layout.trainable_stop)
        self.state: dict[str, FloatArray] = {
            name: _zeros(engine, layout.trainable_stop) for name in state_names
        }

    @property
    def trainable(self) -> tuple[Place, ...]:
        """Places of the tensors that have gradients, in parameter order."""
        return tuple(place for place in self.layout.places if place.tensor.binding == "trainable")

    def parameter_buffers(self) -> dict[str, Buffer]:
        """By local name: the tensors that graphs read."""
        return {
            place.local: self._engine.wrap(view(self.parameters, place))
            for place in self.layout.places
        }

    def gradient_buffers(self, vector: FloatArray) -> dict[str, Buffer]:
        """By local name: views into `vector` (the gradients, or scratch of at least that size)."""
        return {place.local: self._engine.wrap(view(vector, place)) for place in self.trainable}

    def accumulate(self, scratch: FloatArray) -> None:
        """Add one microbatch's gradients to the sum, in place."""
        with np.errstate(all="ignore"):  # a sum that is not finite is refused by clip_scale
            np.add(self.gradients, scratch[: self.gradients.size], out=self.gradients)

    def square_sums(self, work: NDArray[np.float64]) -> dict[str, float]:
        """Square sum of each trainable tensor's gradient, by tensor name."""
        return {
            place.tensor.name: square_sum(self.gradients[place.start : place.stop], work)
            for place in self.trainable
        }

    def copy_state(self, step: int) -> SegmentState:
        """A copy of parameters and optimizer state, after `step` updates."""
        return SegmentState(
            tensors={p.tensor.name: view(self.parameters, p).copy() for p in self.layout.places},
            state={
                name: {p.tensor.name: view(vector, p).copy() for p in self.trainable}
                for name, vector in self.state.items()
            },
            step=step,
        )

    def load_state(self, state: SegmentState) -> None:
        """Copy a saved state in; CheckpointError when its names or shapes are others."""
        if set(state.state) != set(self.state):
            raise CheckpointError("the checkpoint belongs to another optimizer")
        _load(self.parameters, self.layout.places, state.tensors)
        for name, vector in self.state.items():
            _load(vector, self.trainable, state.state[name])


def view(vector: FloatArray, place: Place) -> FloatArray:
    """One tensor within a flat vector, in its own shape."""
    return vector[place.start : place.stop].reshape(place.tensor.shape)


def _zeros(engine: Engine, length: int) -> FloatArray:
    return engine.allocate((length,), np.float32).host()


def _load(vector: FloatArray, places: tuple[Place, ...], tensors: Mapping[str, FloatArray]) -> None:
    shapes = {place.tensor.name: place.tensor.shape for place in places}
    if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
        raise CheckpointError("the checkpoint holds other tensors than the segment")
    for place in places:
        np.copyto(view(vector, place), tensors[place.tensor.name])
