"""An engine that adds up what is allocated of it."""

from __future__ import annotations

import numpy as np

from p2ptrain.engine.contract import Buffer
from p2ptrain.engine.onnxruntime_engine import OnnxRuntimeEngine


class CountingEngine(OnnxRuntimeEngine):
    """Adds up what a stage or shard allocates."""

    allocated = 0

    def allocate(self, shape: tuple[int, ...], dtype: object) -> Buffer:
        self.allocated += int(np.prod(shape, dtype=int)) * np.dtype(dtype).itemsize
        return super().allocate(shape, dtype)
