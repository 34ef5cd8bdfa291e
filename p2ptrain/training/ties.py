"""Tied weights: copies of one tensor in several segments, which share one gradient.

Every copy accumulates apart. Before the norm the copies' gradients are added in segment order,
wherever the copies live, and each copy is updated with the sum, so that they stay equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.errors import InvariantBroken

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class TieHolder:
    """One copy, the owner or another: the tensor and the segment that reads it."""

    segment: int
    tensor: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TieGroup:
    """A trainable tensor with all of its copies, at least two in all."""

    owner: str
    holders: tuple[TieHolder, ...]
    """In segment order, and within a segment in its kind's parameter order: the order in which
    gradients are added."""

    @property
    def tensors(self) -> tuple[str, ...]:
        """The holders' tensor names, in their order."""
        return tuple(holder.tensor for holder in self.holders)


def tie_groups(manifest: Manifest) -> tuple[TieGroup, ...]:
    """Every group whose gradients are summed, in the owners' manifest order.

    Frozen copies have no gradient and form no group: they are equal from the start.
    """
    holders: dict[str, list[TieHolder]] = {}
    for index in range(len(manifest.segments)):
        for tensor in manifest.segment_tensors(index):
            if tensor.binding == "trainable":
                held = holders.setdefault(tensor.tied_to or tensor.name, [])
                held.append(TieHolder(segment=index, tensor=tensor.name))
    return tuple(
        TieGroup(owner=tensor.name, holders=tuple(holders[tensor.name]))
        for tensor in manifest.tensors
        if len(holders.get(tensor.name, ())) > 1
    )


def tied_gradient(group: TieGroup, gradients: Mapping[str, FloatArray]) -> FloatArray:
    """The one gradient of a group: float32 additions in the holders' order, as a new array.

    Args:
        group: Whose gradient.
        gradients: Of every holder by tensor name, all of one shape; others are ignored. A sum
            that is not finite is refused later, by `clip_scale`.

    Raises:
        InvariantBroken: a holder's gradient is missing.
    """
    missing = [name for name in group.tensors if name not in gradients]
    if missing:
        raise InvariantBroken(f"the tied gradient of {group.owner!r} lacks {missing}")
    first, *others = group.tensors
    total = gradients[first].copy()
    with np.errstate(all="ignore"):
        for name in others:
            np.add(total, gradients[name], out=total)
    return total
