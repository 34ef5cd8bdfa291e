"""Apply one optimizer update to a segment: the update graph over cache-sized slices."""

from __future__ import annotations

import itertools
from typing import Final

import numpy as np
from numpy.typing import NDArray

from p2ptrain.bundle.manifest import UpdateRule
from p2ptrain.engine.contract import Binding, Buffer, Engine, Program
from p2ptrain.runtime.compute.segment_memory import SegmentMemory
from p2ptrain.training.contract import OptimizerChoice
from p2ptrain.training.optimizer import optimizer_scalars

CHUNK_ELEMENTS: Final = 32_768
"""AdamW touches 4 vectors of it, 512 KiB: fits the second-level cache. Measured: 16k to 128k are
alike, smaller pays for calls, larger for memory."""

FloatArray = NDArray[np.float32]


class UpdateScalars:
    """The scalar inputs of an update rule, for tensors that decay and for those that do not."""

    def __init__(self, engine: Engine, rule: UpdateRule) -> None:
        self.decayed = {name: engine.allocate((), np.float32) for name in rule.scalars}
        self.plain = {name: engine.allocate((), np.float32) for name in rule.scalars}

    def set_for(
        self, choice: OptimizerChoice, *, step: int, learning_rate: float, clip_scale: float
    ) -> None:
        """Round one update's scalars to float32 where the graphs read them; arguments as those of
        `optimizer_scalars`."""
        for decay, buffers in ((True, self.decayed), (False, self.plain)):
            values = optimizer_scalars(
                choice, step=step, learning_rate=learning_rate, clip_scale=clip_scale, decay=decay
            )
            for name, buffer in buffers.items():
                buffer.host()[()] = values[name]


class SegmentUpdater:
    """Bound once over every slice of a segment; each update is a run per slice."""

    def __init__(
        self,
        engine: Engine,
        program: Program,
        rule: UpdateRule,
        memory: SegmentMemory,
        scalars: UpdateScalars,
    ) -> None:
        self._engine = engine
        self._program = program
        self._rule = rule
        self._inputs = {"parameter": memory.parameters, "gradient": memory.gradients}
        self._inputs |= {f"state.{name}": memory.state[name] for name in rule.state}
        self._spare: dict[str, FloatArray] = {}
        if not rule.in_place:
            self._spare = {name: np.empty(CHUNK_ELEMENTS, np.float32) for name in self._changed()}
        layout = memory.layout
        self._slices = self._bind_region(0, layout.decay_stop, scalars.decayed)
        self._slices += self._bind_region(layout.decay_stop, layout.length, scalars.plain)

    def run(self) -> None:
        """Replace parameters and state by their updated values."""
        for binding, copies in self._slices:
            binding.run()
            for target, source in copies:
                np.copyto(target, source)

    def _changed(self) -> list[str]:
        return [name for name in self._inputs if name != "gradient"]

    def _bind_region(
        self, start: int, stop: int, scalars: dict[str, Buffer]
    ) -> list[tuple[Binding, list[tuple[FloatArray, FloatArray]]]]:
        edges = [*range(start, stop, CHUNK_ELEMENTS), stop]
        return [
            self._bind_slice(slice(begin, end), scalars) for begin, end in itertools.pairwise(edges)
        ]

    def _bind_slice(
        self, part: slice, scalars: dict[str, Buffer]
    ) -> tuple[Binding, list[tuple[FloatArray, FloatArray]]]:
        binding = self._program.bind()
        copies = []
        for name, buffer in scalars.items():
            binding.set_input(name, buffer)
        for name, vector in self._inputs.items():
            binding.set_input(name, self._engine.wrap(vector[part]))
        for name in self._changed():
            target = self._inputs[name][part]
            if self._rule.in_place:
                binding.set_output(f"new.{name}", self._engine.wrap(target))
                continue
            source = self._spare[name][: target.size]
            binding.set_output(f"new.{name}", self._engine.wrap(source))
            copies.append((target, source))
        return binding, copies
