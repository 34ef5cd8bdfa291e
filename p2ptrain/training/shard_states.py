"""A segment's state at one shard, and the whole state of all shards': bit-exact both ways.

What is not sliced is the same at every shard, so rank 0's counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.errors import CheckpointError
from p2ptrain.training.contract import Contract
from p2ptrain.training.segment_state import (
    FloatArray,
    SegmentState,
    residual_name,
    residual_shapes,
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
    manifest: Manifest,
    share: Share,
    segment_index: int,
    states: Sequence[SegmentState],
    contract: Contract,
) -> SegmentState:
    """The whole state of a segment, from that of every rank; its residuals are zero, since shards
    round nothing. The rank of `share` does not matter.

    Raises:
        CheckpointError: the shards' states are of different steps.
    """
    if len({state.step for state in states}) != 1:
        raise CheckpointError("the shards' states are of different steps")
    cuts = tensor_cuts(manifest, share, segment_index)
    first, shapes = states[0], residual_shapes(manifest, contract, segment_index)
    return dataclasses.replace(
        first,
        tensors=_joined([state.tensors for state in states], cuts),
        state={
            name: _joined([state.state[name] for state in states], cuts) for name in first.state
        },
        residuals={residual_name(k): np.zeros(shape, np.float32) for k, shape in shapes.items()},
    )


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
