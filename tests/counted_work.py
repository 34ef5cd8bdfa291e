"""An engine that counts its work on a clock of its own: what a device takes, without waiting."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Final

from numpy.typing import DTypeLike

from p2ptrain.engine.contract import Array, Binding, Buffer, Engine, Program
from p2ptrain.engine.onnxruntime_engine import open_engine
from p2ptrain.planner.profile import KindCost
from p2ptrain.runtime.compute.profiling import profile_kinds
from p2ptrain.runtime.compute.stopwatch import NO_QUOTA, Stopwatch
from p2ptrain.store.bundles import Bundle
from p2ptrain.training.contract import RuntimeBuild

RUN_NS = 10_000_000
"""What running any graph takes on a device as it was at first."""
USUAL: Final = 1
"""Slowness of such a device."""


class WorkClock:
    """Nanoseconds of work at one device; `slowness` may change at any time."""

    def __init__(self) -> None:
        self.ns, self.slowness = 0, USUAL

    def __call__(self) -> int:
        return self.ns

    def worked(self) -> None:
        self.ns += RUN_NS * self.slowness


class CountedEngine:
    """A real engine; every run of a graph moves the clock on."""

    def __init__(self, clock: WorkClock, threads: int) -> None:
        self._engine: Engine = open_engine(threads=threads)
        self._clock = clock
        self.threads = threads

    @property
    def slowness(self) -> int:
        """Of its device, now."""
        return self._clock.slowness

    @property
    def build(self) -> RuntimeBuild:
        return self._engine.build

    def compile(self, graph: bytes, constants: Mapping[str, Array] | None = None) -> Program:
        return CountedProgram(self._engine.compile(graph, constants), self._clock)

    def allocate(self, shape: tuple[int, ...], dtype: DTypeLike) -> Buffer:
        return self._engine.allocate(shape, dtype)

    def wrap(self, array: Array) -> Buffer:
        return self._engine.wrap(array)


class CountedProgram:
    def __init__(self, program: Program, clock: WorkClock) -> None:
        self._program, self._clock = program, clock

    @property
    def inputs(self) -> tuple[str, ...]:
        return self._program.inputs

    @property
    def outputs(self) -> tuple[str, ...]:
        return self._program.outputs

    def bind(self) -> Binding:
        return CountedBinding(self._program.bind(), self._clock)


class CountedBinding:
    def __init__(self, binding: Binding, clock: WorkClock) -> None:
        self._binding, self._clock = binding, clock
        self.set_input, self.set_output = binding.set_input, binding.set_output

    def run(self) -> None:
        self._binding.run()
        self._clock.worked()


Costs = dict[str, KindCost]


class KnownCosts:
    """What `profile_kinds` finds by counting, found once: it is the same at every device."""

    def __init__(self, profile: Callable[..., Costs] = profile_kinds) -> None:
        self._profile = profile
        self._found: dict[tuple[object, ...], Costs] = {}

    def __call__(
        self, engine: Engine, bundle: Bundle, *asked: object,
        kinds: Collection[str] | None = None, stopwatch: Stopwatch = NO_QUOTA, **more: object,
    ) -> Costs:  # fmt: skip
        def measure() -> Costs:
            return self._profile(engine, bundle, *asked, kinds=kinds, stopwatch=stopwatch, **more)

        if not isinstance(engine, CountedEngine) or engine.slowness != USUAL:
            return measure()
        wanted = None if kinds is None else frozenset(kinds)
        key = (bundle.digest, engine.threads, asked, wanted, frozenset(more.items()))
        if key not in self._found:
            found = measure()
            if engine.slowness != USUAL:
                return found
            self._found[key] = found
        return dict(self._found[key])


KNOWN_COSTS: Final = KnownCosts()
