"""One segment's parameters, gradients, optimizer state and running values, as flat vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from p2ptrain.bundle.manifest import Tensor
from p2ptrain.engine.contract import Array, Buffer, Engine
from p2ptrain.errors import CheckpointError
from p2ptrain.training.layout import FlatLayout, Place
from p2ptrain.training.segment_state import SegmentState
from p2ptrain.training.squares import square_sum

FloatArray = NDArray[np.float32]


class SegmentMemory:
    """Vectors of one segment; tensors are views into them, so nothing is gathered or scattered.

    Running values exist twice: `running` belongs to the last update, `pending` is what the
    forwards since then have made of it.
    """

    def __init__(self, engine: Engine, layout: FlatLayout, state_names: tuple[str, ...]) -> None:
        self._engine = engine
        self.layout = layout
        self.parameters: FloatArray = _zeros(engine, layout.length)
        self.gradients: FloatArray = _zeros(engine, layout.length)
        self.state: dict[str, FloatArray] = {
            name: _zeros(engine, layout.length) for name in state_names
        }
        self.running: FloatArray = _zeros(engine, layout.running_length)
        self.pending: FloatArray = _zeros(engine, layout.running_length)

    def parameter_buffers(self) -> dict[str, Buffer]:
        """By local name: the trainable tensors that graphs read."""
        return self._views(self.parameters, self.layout.places)

    def gradient_buffers(self, vector: FloatArray) -> dict[str, Buffer]:
        """By local name: views into `vector` (the gradients, or scratch of at least that size)."""
        return self._views(vector, self.layout.places)

    def running_buffers(self, vector: FloatArray) -> dict[str, Buffer]:
        """By local name: views into `vector`, which is `running`, `pending` or scratch."""
        return self._views(vector, self.layout.running)

    def gradient(self, name: str) -> FloatArray | None:
        """A view of one tensor's accumulated gradient; None for a tensor that is not here."""
        for place in self.layout.places:
            if place.tensor.name == name:
                return view(self.gradients, place)
        return None

    def accumulate(self, scratch: FloatArray) -> None:
        """Add one microbatch's gradients to the sum, in place."""
        with np.errstate(all="ignore"):  # a sum that is not finite is refused by clip_scale
            np.add(self.gradients, scratch[: self.gradients.size], out=self.gradients)

    def square_sums(self, work: NDArray[np.float64]) -> dict[str, float]:
        """Square sum of each trainable tensor's gradient, by tensor name."""
        return {
            place.tensor.name: square_sum(self.gradients[place.start : place.stop], work)
            for place in self.layout.places
        }

    def commit_running(self) -> None:
        """What the step's forwards made of the running values belongs to its update."""
        np.copyto(self.running, self.pending)

    def abandon_running(self) -> None:
        """The step's forwards never were."""
        np.copyto(self.pending, self.running)

    def start(self, value_of: Callable[[Tensor], Array]) -> None:
        """Every tensor at the value it starts from, optimizer state zero."""
        for place in self.layout.places:
            np.copyto(view(self.parameters, place), value_of(place.tensor))
        for place in self.layout.running:
            np.copyto(view(self.running, place), value_of(place.tensor))
        for vector in self.state.values():
            vector.fill(0.0)
        self.abandon_running()

    def copy_state(self, step: int) -> SegmentState:
        """A copy of parameters, optimizer state and running values, after `step` updates."""
        return SegmentState(
            tensors=_copies(self.parameters, self.layout.places),
            state={
                name: _copies(vector, self.layout.places) for name, vector in self.state.items()
            },
            step=step,
            running=_copies(self.running, self.layout.running),
        )

    def copy_into(self, state: SegmentState) -> None:
        """Fill the arrays of a state that has this segment's names and shapes."""
        _fill(state.tensors, self.parameters, self.layout.places)
        for name, vector in self.state.items():
            _fill(state.state[name], vector, self.layout.places)
        _fill(state.running, self.running, self.layout.running)

    def load_state(self, state: SegmentState) -> None:
        """Copy a saved state in; CheckpointError when its names or shapes are others."""
        if set(state.state) != set(self.state):
            raise CheckpointError("the checkpoint belongs to another optimizer")
        _load(self.parameters, self.layout.places, state.tensors)
        for name, vector in self.state.items():
            _load(vector, self.layout.places, state.state[name])
        _load(self.running, self.layout.running, state.running)
        self.abandon_running()

    def _views(self, vector: FloatArray, places: tuple[Place, ...]) -> dict[str, Buffer]:
        return {place.local: self._engine.wrap(view(vector, place)) for place in places}


def view(vector: FloatArray, place: Place) -> FloatArray:
    """One tensor within a flat vector, in its own shape."""
    return vector[place.start : place.stop].reshape(place.tensor.shape)


def _zeros(engine: Engine, length: int) -> FloatArray:
    return engine.allocate((length,), np.float32).host()


def _copies(vector: FloatArray, places: tuple[Place, ...]) -> dict[str, FloatArray]:
    return {place.tensor.name: view(vector, place).copy() for place in places}


def _load(vector: FloatArray, places: tuple[Place, ...], tensors: Mapping[str, FloatArray]) -> None:
    shapes = {place.tensor.name: place.tensor.shape for place in places}
    if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
        raise CheckpointError("the checkpoint holds other tensors than the segment")
    for place in places:
        np.copyto(view(vector, place), tensors[place.tensor.name])


def _fill(targets: Mapping[str, FloatArray], vector: FloatArray, places: tuple[Place, ...]) -> None:
    for place in places:
        np.copyto(targets[place.tensor.name], view(vector, place))
