"""How one segment's tensors lie in flat float32 vectors.

Trainable tensors that decay come first, then the other trainable ones: an update is two runs over
contiguous slices, whatever the shapes. Running values have a vector of their own; frozen tensors
are constants of the graphs and lie in none. Every tensor starts on a cache line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from p2ptrain.bundle.manifest import Manifest, Tensor
from p2ptrain.errors import GraphError

ALIGNMENT_ELEMENTS: Final = 16
"""64 bytes of float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one tensor lies: elements `start` to `start + elements - 1`."""

    local: str
    """Its name in the segment's graphs."""
    tensor: Tensor
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.tensor.elements


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatLayout:
    """A segment's places, each kind of tensor in its kind's order, and the vectors' lengths."""

    places: tuple[Place, ...]
    """Of the trainable tensors."""
    decay_stop: int
    length: int
    running: tuple[Place, ...]
    running_length: int


def flat_layout(
    manifest: Manifest, segment_index: int, slices: Mapping[str, tuple[int, ...]] | None = None
) -> FlatLayout:
    """Lay out one segment.

    Args:
        manifest: Of the model.
        segment_index: The segment's.
        slices: By tensor name: the shapes of those of which only a slice is here.

    Raises:
        GraphError: a trainable tensor or running value is not float32.
    """
    kind = manifest.kinds[manifest.segments[segment_index].kind]
    shapes = slices or {}
    parameters = [
        (value.name, dataclasses.replace(tensor, shape=shapes.get(tensor.name, tensor.shape)))
        for value, tensor in zip(
            kind.parameters, manifest.segment_tensors(segment_index), strict=True
        )
        if tensor.binding == "trainable"
    ]
    values = manifest.segment_running(segment_index)
    running = list(zip((value.name for value in kind.running), values, strict=True))
    for _, tensor in (*parameters, *running):
        if tensor.dtype != "float32":
            raise GraphError(f"tensor {tensor.name!r} is {tensor.dtype}", hint=_HINT)
    decayed = [named for named in parameters if _decays(manifest, named[1])]
    plain = [named for named in parameters if named not in decayed]
    starts, decay_stop = _starts(decayed, 0)
    more, length = _starts(plain, decay_stop)
    starts |= more
    running_starts, running_length = _starts(running, 0)
    return FlatLayout(
        places=tuple(Place(local=n, tensor=t, start=starts[n]) for n, t in parameters),
        decay_stop=decay_stop,
        length=length,
        running=tuple(Place(local=n, tensor=t, start=running_starts[n]) for n, t in running),
        running_length=running_length,
    )


_HINT: Final = "export the model in float32; only frozen tensors may have another type"


def _decays(manifest: Manifest, tensor: Tensor) -> bool:
    """A tied copy decays as its owner does, or the two would part."""
    return (tensor if tensor.tied_to is None else manifest.tensor(tensor.tied_to)).decay


def _starts(named: Iterable[tuple[str, Tensor]], offset: int) -> tuple[dict[str, int], int]:
    """Where each tensor starts from `offset` on, and where the last one ends."""
    starts: dict[str, int] = {}
    for local, tensor in named:
        starts[local] = offset
        offset += -(-tensor.elements // ALIGNMENT_ELEMENTS) * ALIGNMENT_ELEMENTS
    return starts, offset
