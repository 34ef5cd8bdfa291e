"""What ends a step for the segments of a stage or shard: their gradients' norms, their updates."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from p2ptrain.bundle.manifest import Tensor
from p2ptrain.engine.contract import Engine
from p2ptrain.ids import Digest
from p2ptrain.runtime.compute.segment_memory import SegmentMemory
from p2ptrain.runtime.compute.segment_updater import SegmentUpdater, UpdateScalars
from p2ptrain.store.bundles import Bundle
from p2ptrain.training.contract import OptimizerChoice
from p2ptrain.training.squares import CHUNK_ELEMENTS


class StageUpdater:
    """The chosen optimizer over some segments' memory; blocking, bit for bit the same everywhere.

    Args:
        engine: Compiles the update graph, once for all segments.
        bundle: Has the chosen optimizer.
        choice: Of the run's contract.
        memories: Of the segments.
    """

    def __init__(
        self,
        engine: Engine,
        bundle: Bundle,
        choice: OptimizerChoice,
        memories: Collection[SegmentMemory],
    ) -> None:
        rule = bundle.manifest.updates[choice.name]
        self._choice, self._memories = choice, tuple(memories)
        self._scalars = UpdateScalars(engine, rule)
        program = engine.compile(bundle.graph(Digest(rule.graph)))
        self._updaters = [
            SegmentUpdater(engine, program, rule, memory, self._scalars) for memory in memories
        ]
        self._work = np.empty(CHUNK_ELEMENTS)

    def square_sums(
        self, tensors: Sequence[Tensor], reports: Callable[[Tensor], bool]
    ) -> NDArray[np.float64]:
        """Square sums of the gradients of these tensors, in their order; 0 for those that have
        none here or are reported by others."""
        sums: dict[str, float] = {}
        for memory in self._memories:
            sums |= memory.square_sums(self._work)
        own = [sums.get(tensor.name, 0.0) if reports(tensor) else 0.0 for tensor in tensors]
        return np.array(own, np.float64)

    def apply(self, *, step: int, learning_rate: float, clip_scale: float) -> None:
        """Update parameters and optimizer state, and take over the running values of the step."""
        self._scalars.set_for(
            self._choice, step=step, learning_rate=learning_rate, clip_scale=clip_scale
        )
        for updater in self._updaters:
            updater.run()
        for memory in self._memories:
            memory.commit_running()
