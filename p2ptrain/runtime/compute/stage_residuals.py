"""What int8 lost of a stage's cotangents, as part of its segments' states."""

from __future__ import annotations

import numpy as np

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.errors import CheckpointError
from p2ptrain.runtime.compute.segment_memory import FloatArray
from p2ptrain.training.contract import Contract
from p2ptrain.training.segment_state import SegmentState, residual_name, residual_shapes
from p2ptrain.training.tensor_codec import ErrorFeedback


def residuals(
    feedback: ErrorFeedback, manifest: Manifest, contract: Contract, segment: int
) -> dict[str, FloatArray]:
    """By name, those of a segment's state; zero where nothing was lost."""
    kept = feedback.state()
    shapes = residual_shapes(manifest, contract, segment)
    return {
        residual_name(key): kept[key] if key in kept else np.zeros(shape, np.float32)
        for key, shape in shapes.items()
    }


def load_residuals(
    feedback: ErrorFeedback,
    manifest: Manifest,
    contract: Contract,
    segment: int,
    state: SegmentState,
) -> None:
    """Take over a segment's residuals; without any its cotangents start afresh.

    Raises:
        CheckpointError: they have another shape.
    """
    shapes = residual_shapes(manifest, contract, segment)
    loaded = {}
    for key, shape in shapes.items():
        residual = state.residuals.get(residual_name(key))
        if residual is not None and residual.shape != shape:
            raise CheckpointError("a checkpoint's residuals have another shape")
        if residual is not None:
            loaded[key] = residual
    others = {k: v for k, v in feedback.state().items() if k not in shapes}
    feedback.restore({**others, **loaded})
