"""How one segment's tensors lie in one flat float32 vector.

Tensors that decay come first, then the other trainable ones, then the frozen: an update is two
runs over contiguous slices, whatever the shapes. Every tensor starts on a cache line.
"""

from __future__ import annotations

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
    """A segment's places in its kind's parameter order, and the ends of the three regions."""

    places: tuple[Place, ...]
    decay_stop: int
    trainable_stop: int
    length: int


def flat_layout(manifest: Manifest, segment_index: int) -> FlatLayout:
    """Lay out one segment.

    Raises:
        GraphError: a tensor is tied or not float32, which this version does not train.
    """
    kind = manifest.kinds[manifest.segments[segment_index].kind]
    local_names = [value.name for value in kind.parameters]
    named = list(zip(local_names, manifest.segment_tensors(segment_index), strict=True))
    for _, tensor in named:
        if tensor.tied_to is not None or tensor.dtype != "float32":
            raise GraphError(f"tensor {tensor.name!r} is tied or not float32", hint=_HINT)
    starts: dict[str, int] = {}
    stops = []
    offset = 0
    for region in range(3):
        for local, tensor in named:
            if _region(tensor) == region:
                starts[local] = offset
                offset += -(-tensor.elements // ALIGNMENT_ELEMENTS) * ALIGNMENT_ELEMENTS
        stops.append(offset)
    places = tuple(Place(local=n, tensor=t, start=starts[n]) for n, t in named)
    return FlatLayout(places=places, decay_stop=stops[0], trainable_stop=stops[1], length=stops[2])


_HINT: Final = "export the model with its tied weights apart, in float32"


def _region(tensor: Tensor) -> int:
    if tensor.binding == "frozen":
        return 2
    return 0 if tensor.decay else 1
