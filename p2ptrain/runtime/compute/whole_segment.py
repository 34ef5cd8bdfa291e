"""A segment that every shard computes whole: the same work without meetings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from p2ptrain.engine.contract import Array
from p2ptrain.runtime.compute.segment_memory import SegmentMemory
from p2ptrain.runtime.compute.segment_programs import compile_programs
from p2ptrain.runtime.compute.segment_runner import Boundary, Fed, SegmentRunner, StageSetting
from p2ptrain.store.bundles import Bundle
from p2ptrain.training.exchanges import Exchanges


@dataclass(frozen=True, slots=True)
class WholeSegment:
    """A segment with the interface of a shard's."""

    runner: SegmentRunner
    sites: int = 0

    @classmethod
    def make(
        cls,
        setting: StageSetting,
        bundle: Bundle,
        segment_index: int,
        constants: Mapping[str, Array],
        memory: SegmentMemory,
        edges: tuple[Boundary, Boundary],
    ) -> WholeSegment:
        """Compile and bind; `edges` are what enters and what leaves. Errors as those of
        `compile_programs`."""
        manifest = setting.manifest
        programs = compile_programs(
            setting.engine,
            bundle,
            manifest.kinds[manifest.segments[segment_index].kind],
            setting.contract,
            constants,
            trains=bool(memory.layout.places),
            delays=False,
        )
        entering, leaving = edges
        return cls(
            SegmentRunner(
                setting,
                segment_index=segment_index,
                programs=programs,
                memory=memory,
                entering=entering,
                leaving=leaving,
            )
        )

    def forward(self, *, step: int, microbatch: int, fed: Fed) -> Exchanges[float | None]:
        """Compute the segment and keep its stash; the loss where it has one."""
        yield from ()
        return self.runner.forward(step=step, microbatch=microbatch, sequence=0, fed=fed)

    def evaluate(self, *, fed: Fed) -> Exchanges[float | None]:
        """Compute the segment without dropout."""
        yield from ()
        return self.runner.evaluate(sequence=0, fed=fed)

    def backward(self, *, first: bool) -> Exchanges[None]:
        """Compute cotangents and gradients; `first` of a step starts the sum."""
        yield from ()
        self.runner.backward(sequence=0, first=first)
