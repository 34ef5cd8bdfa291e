"""What the rest of p2ptrain may ask of whatever runs graphs.

Buffers are opaque handles: on a CPU engine `host()` is a view of the memory that graphs read and
write; an engine for an accelerator would copy there. Programs are shared: compiling the same graph
twice gives the same program. Nothing here is safe to call from two threads at once; a stage
worker owns its engine while it computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from p2ptrain.training.contract import RuntimeBuild

Array = NDArray[Any]  # Any: the element type is data here (float32, int64, ...)


class Buffer(Protocol):
    """Memory of one tensor that an engine can bind."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Axis sizes."""

    @property
    def dtype(self) -> np.dtype[Any]:  # Any: as above
        """Element type."""

    def host(self) -> Array:
        """The tensor as a numpy array; on a CPU engine a view, so writes are seen by graphs."""


class Binding(Protocol):
    """One program with buffers attached to its inputs and outputs; run it as often as needed."""

    def set_input(self, name: str, buffer: Buffer) -> None:
        """Read input `name` from `buffer` in every later run. EngineError: no such input."""

    def set_output(self, name: str, buffer: Buffer) -> None:
        """Write output `name` into `buffer` in every later run. EngineError: no such output."""

    def run(self) -> None:
        """Compute. EngineError: an input is missing or does not fit; outputs are undefined."""


class Program(Protocol):
    """A compiled graph."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Input names in graph order."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Output names in graph order."""

    def bind(self) -> Binding:
        """A fresh binding with nothing attached; outputs left unset are not handed out."""


class Engine(Protocol):
    """A runtime with a fixed number of threads."""

    @property
    def build(self) -> RuntimeBuild:
        """What this engine is: decides which bits it computes."""

    def compile(self, graph: bytes, constants: Mapping[str, Array] | None = None) -> Program:
        """The program of an ONNX graph; the same bytes with the same constants give the same one.

        Args:
            graph: An ONNX file.
            constants: By name, what the graph reads and neither declares nor holds. Bound for
                good: their values must not change while the program lives, and the runtime may
                lay them out anew. An array over a file (`numpy.memmap`) is read from there, not
                copied. Programs without constants live as long as the engine, others as long as
                their user.

        Raises:
            EngineError: the runtime refuses the graph; the bundle cannot run here.
        """

    def allocate(self, shape: tuple[int, ...], dtype: DTypeLike) -> Buffer:
        """A zeroed buffer that starts on a cache line."""

    def wrap(self, array: Array) -> Buffer:
        """A buffer over existing contiguous memory; the caller's later writes are seen."""
