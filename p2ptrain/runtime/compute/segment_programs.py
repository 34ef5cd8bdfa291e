"""A segment's graphs, compiled as one stage needs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from p2ptrain.bundle.manifest import SegmentKind
from p2ptrain.bundle.onnx_reader import read_graph
from p2ptrain.engine.contract import Array, Engine, Program
from p2ptrain.ids import Digest
from p2ptrain.store.bundles import Bundle
from p2ptrain.training.contract import Contract


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentPrograms:
    """A segment's compiled graphs."""

    forward: Program
    backward: Program | None
    """None where nothing is trained and nobody upstream waits for a cotangent."""
    evaluation: Program | None
    """None: the forward with masks of ones."""
    parts: tuple[Program, Program] | None = None
    """The backward as cotangents, then gradients; None: it never runs in two parts."""


def passes_back(kind: SegmentKind) -> bool:
    """Whether the segment before waits for cotangents of such a segment."""
    return any(port.differentiable and port.role == "boundary" for port in kind.inputs)


def compile_programs(
    engine: Engine,
    bundle: Bundle,
    kind: SegmentKind,
    contract: Contract,
    constants: Mapping[str, Array],
    *,
    trains: bool,
    delays: bool,
) -> SegmentPrograms:
    """Compile what a segment of this kind runs.

    Args:
        engine: With the contract's threads.
        bundle: Of the model.
        kind: The segment's.
        contract: Of the run.
        constants: The segment's frozen tensors by local name.
        trains: Whether the segment has trainable parameters.
        delays: Whether gradients may be computed after cotangents. Where the forward runs again
            for a backward that would take a third run, so it stays whole.

    Raises:
        GraphError, EngineError, BundleError: the graphs cannot run here.
    """
    pair = kind.forms[contract.form]

    def program(digest: Digest) -> Program:
        graph = bundle.graph(digest)
        read = {name for node in read_graph(graph).nodes for name in node.inputs}
        return engine.compile(graph, {n: array for n, array in constants.items() if n in read})

    parts = None
    if delays and pair.parts is not None and not contract.rematerialise:
        parts = (program(pair.parts.cotangents), program(pair.parts.gradients))
    return SegmentPrograms(
        forward=program(pair.forward),
        backward=program(pair.backward) if trains or passes_back(kind) else None,
        evaluation=None if kind.evaluation is None else program(kind.evaluation),
        parts=parts,
    )
