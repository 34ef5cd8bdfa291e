"""A segment's state at one shard, and the whole state of all shards': bit-exact both ways.

What is not sliced is the same at every shard, so rank 0's counts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.errors import CheckpointError
from p2ptrain.training.contract import Contract
from p2ptrain.training.segment_state import (
    FloatArray,
    SegmentState,
    StateHeader,
    residual_name,
    residual_shapes,
    saved_shapes,
    state_view,
    values_bytes,
)
from p2ptrain.training.shard_cuts import Cut, Share, tensor_cuts


def cut_state(
    manifest: Manifest, share: Share, segment_index: int, whole: SegmentState
) -> SegmentState:
    """A shard's slices of a segment's state.

    Raises:
        CheckpointError: a tensor has another shape than the model's.
    """
    cuts = tensor_cuts(manifest, share, segment_index)
    shapes = {tensor.name: tensor.shape for tensor in manifest.segment_tensors(segment_index)}

    def sliced(name: str, array: FloatArray) -> FloatArray:
        if array.shape != shapes.get(name):
            raise CheckpointError("the checkpoint holds other tensors than the segment")
        return cuts[name].slice(array, share.rank) if name in cuts else array

    return _mapped(whole, sliced)


def join_states(
    manifest: Manifest, share: Share, segment_index: int, states: Sequence[SegmentState]
) -> SegmentState:
    """The whole state of a segment, from that of every rank; the rank of `share` does not matter.

    Raises:
        CheckpointError: the shards' states are of different steps.
    """
    if len({state.step for state in states}) != 1:
        raise CheckpointError("the shards' states are of different steps")
    cuts = tensor_cuts(manifest, share, segment_index)
    first = states[0]
    return dataclasses.replace(
        first,
        tensors=_joined([state.tensors for state in states], cuts),
        state={
            name: _joined([state.state[name] for state in states], cuts) for name in first.state
        },
    )


def no_residuals(
    manifest: Manifest, contract: Contract, segment_index: int
) -> dict[str, FloatArray]:
    """Those of a segment's state where nothing was rounded, as among shards."""
    shapes = residual_shapes(manifest, contract, segment_index)
    return {residual_name(key): np.zeros(shape, np.float32) for key, shape in shapes.items()}


def slice_shapes(
    manifest: Manifest, share: Share, segment_index: int
) -> dict[str, tuple[int, ...]]:
    """By tensor name: the shapes of those of which a shard has a slice."""
    cuts = tensor_cuts(manifest, share, segment_index)
    return {name: cut.shape(manifest.tensor(name).shape, share.rank) for name, cut in cuts.items()}


def slices_bytes(
    manifest: Manifest, share: Share, segment_index: int, state_names: tuple[str, ...]
) -> int:
    """Size of the values of a shard's file of a segment."""
    slices = slice_shapes(manifest, share, segment_index)
    return values_bytes(manifest, segment_index, state_names, None, slices)


def joined_values(
    manifest: Manifest,
    share: Share,
    header: StateHeader,
    state_names: tuple[str, ...],
    values: Sequence[bytes],
) -> SegmentState:
    """The whole state of a segment, from the values of every rank's file, or of the first where
    nothing is sliced; without residuals.

    Raises:
        CheckpointError: the values of a rank have another size.
    """
    index, states = header.segment, []
    for rank, content in enumerate(values):
        slices = slice_shapes(manifest, share.of_rank(rank), index)
        shapes = saved_shapes(manifest, index, state_names, None, slices)
        flat = np.frombuffer(content, "<f4")
        if flat.size != sum(math.prod(shape) for shape in shapes.values()):
            raise CheckpointError(f"the slices of rank {rank} have another size")
        tensors, start = {}, 0
        for name, shape in shapes.items():
            tensors[name] = flat[start : start + math.prod(shape)].reshape(shape)
            start += math.prod(shape)
        states.append(state_view(tensors, step=header.step, state_names=state_names))
    return join_states(manifest, share, index, states)


def _mapped(state: SegmentState, change: Callable[[str, FloatArray], FloatArray]) -> SegmentState:
    def each(vectors: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
        return {name: change(name, array) for name, array in vectors.items()}

    return dataclasses.replace(
        state,
        tensors=each(state.tensors),
        state={name: each(vectors) for name, vectors in state.state.items()},
        residuals={},
    )


def _joined(
    parts: Sequence[Mapping[str, FloatArray]], cuts: Mapping[str, Cut]
) -> dict[str, FloatArray]:
    return {
        name: cuts[name].join([part[name] for part in parts]) if name in cuts else array
        for name, array in parts[0].items()
    }
