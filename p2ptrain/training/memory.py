"""The memory a stage is predicted to need at its peak; the planner's feasibility test.

What the stage allocates itself is counted exactly, as `runtime.compute.segment_memory` and
`runtime.compute.segment_runner` allocate it. What the runtime needs beside it while a graph runs is
an estimate, checked against measured peaks by `tools/memory_table.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from p2ptrain.bundle.manifest import BackwardParts, Manifest, SegmentKind, Value
from p2ptrain.errors import PlanInfeasible
from p2ptrain.schedule.actions import Held
from p2ptrain.training.boundaries import cotangent_values
from p2ptrain.training.contract import Contract
from p2ptrain.training.layout import flat_layout

ELEMENT_BYTES: Final = 4
PROCESS_BYTES: Final = 96 * 1024 * 1024
"""A joined peer before it trains: interpreter, libraries and the runtime, measured."""
SESSION_BYTES: Final = 3 * 512 * 1024
"""One compiled graph with its bindings, measured: 1.0 to 1.5 MiB for gpt-nano's."""
WORKSPACE_HALVES: Final = 3
"""Intermediates at their peak, in halves of one stash of every kind: the arena is shared, but a
kind's large blocks seldom fit another's. Measured 2.1 (gpt-nano, 4 to 64 samples) and 3.3 (GPT of
13.8 million parameters, whose logits are wide)."""
PACKED_COPIES: Final = 2
"""Of a frozen matrix: the forward's and the backward's kernels each lay it out for themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Predicted bytes of one stage, by what they are for."""

    process: int
    """Before anything of the model is there."""
    sessions: int
    parameters: int
    """With gradients, optimizer state and running values."""
    frozen: int
    """Mapped pages, and the copies that kernels lay out anew."""
    stash: int
    boundaries: int
    workspace: int
    """What the runtime's arena holds for intermediates."""
    meetings: int = 0
    """Of shards: what waits of others' values, and copies of what is exchanged."""

    @property
    def total(self) -> int:
        return (
            self.process
            + self.sessions
            + self.parameters
            + self.frozen
            + self.stash
            + self.boundaries
            + self.workspace
            + self.meetings
        )


def stage_memory(
    manifest: Manifest,
    segments: range,
    contract: Contract,
    holds: Held,
    process_bytes: int = PROCESS_BYTES,
) -> StageMemory:
    """Predicted peak memory of a peer that runs these segments; `MemoryModel` for many of them.

    Args:
        manifest: Of the model.
        segments: The stage's segments.
        contract: Of the run: form, microbatch size, optimizer, rematerialisation.
        holds: Microbatches that it has room for.
        process_bytes: The peer before it loads the model.

    Raises:
        PlanInfeasible: the bundle has no such optimizer; choose another.
    """
    model = MemoryModel(manifest, contract)
    return model.stage(segments, holds, process_bytes=process_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Segment:
    """What one segment adds, in bytes, or elements of its flat vectors."""

    kind: str
    length: int
    running_length: int
    frozen: int
    fed: int
    """For each microbatch in flight."""
    kept: int
    """Stash and masks of one microbatch."""
    boundary: int
    """Activations of one microbatch to the next segment; 0 for the last."""
    residuals: int
    """Where a stage begins with this segment."""


class MemoryModel:
    """The memory of any stage of a model under one contract; each segment is read once.

    A deep model has thousands of possible stages, which the planner asks about.
    """

    def __init__(self, manifest: Manifest, contract: Contract) -> None:
        self._manifest, self._contract = manifest, contract
        self._vectors = vector_count(manifest, contract)
        self._segments: dict[int, _Segment] = {}

    def stage(
        self, segments: range, holds: Held, *, process_bytes: int = PROCESS_BYTES
    ) -> StageMemory:
        """Predicted peak memory; arguments as those of `stage_memory`."""
        in_flight, delayed = holds.in_flight, holds.delayed
        own = [self._segment(index) for index in segments]
        kinds = {each.kind: each.kept for each in own}
        graphs = sum(graph_count(self._manifest.kinds[k], self._contract, delayed) for k in kinds)
        longest = max(each.length for each in own)
        return StageMemory(
            process=process_bytes,
            sessions=SESSION_BYTES * (1 + graphs),
            parameters=self._parameter_bytes(own, longest, in_flight),
            frozen=sum(each.frozen for each in own),
            stash=self._stash_bytes(own, kinds, in_flight)
            + sum(
                _delayed_bytes(self._manifest, each.kind, self._contract, delayed) for each in own
            ),
            boundaries=self._boundary_bytes(segments, own, holds)
            + (own[0].residuals if segments.start > 0 else 0),
            workspace=WORKSPACE_HALVES * sum(kinds.values()) // 2 + 2 * longest * ELEMENT_BYTES,
        )

    def _segment(self, index: int) -> _Segment:
        if index not in self._segments:
            manifest, contract = self._manifest, self._contract
            kind, batch = manifest.kinds[manifest.segments[index].kind], contract.microbatch_size
            layout = flat_layout(manifest, index)
            self._segments[index] = _Segment(
                kind=kind.name,
                length=layout.length,
                running_length=layout.running_length,
                frozen=frozen_bytes(manifest, index),
                fed=fed_bytes(manifest, kind, contract),
                kept=kept_bytes(manifest, kind, contract),
                boundary=manifest.boundary_bytes(index, batch=batch),
                residuals=_residual_bytes(manifest, index, contract),
            )
        return self._segments[index]

    def _parameter_bytes(self, own: list[_Segment], longest: int, in_flight: int) -> int:
        """Parameters, gradients, optimizer state, and gradients of one microbatch of one segment;
        running values committed, pending and as every microbatch in flight read them."""
        running = sum(each.running_length for each in own)
        lengths = sum(each.length for each in own)
        elements = lengths * self._vectors + longest + running * (2 + in_flight)
        return elements * ELEMENT_BYTES

    def _stash_bytes(self, own: list[_Segment], kinds: dict[str, int], in_flight: int) -> int:
        """What was fed for each microbatch in flight, and as many stashes, or one per kind."""
        fed = in_flight * sum(each.fed for each in own)
        if self._contract.rematerialise:
            return fed + sum(kinds.values())
        return fed + in_flight * sum(each.kept for each in own)

    def _boundary_bytes(self, segments: range, own: list[_Segment], holds: Held) -> int:
        """Rings of activations and cotangents at both ends; inside one activation for each
        microbatch in flight and one cotangent, or as many as wait for their gradients."""
        ring = self._segment(segments.start - 1).boundary if segments.start > 0 else 0
        ring += own[-1].boundary if segments.stop < len(self._manifest.segments) else 0
        inner = sum(each.boundary for each in own[:-1])
        return 2 * ring * holds.at_edges + inner * (holds.in_flight + max(1, holds.delayed))


def vector_count(manifest: Manifest, contract: Contract) -> int:
    """Flat vectors of a segment: parameters, gradients and the optimizer's state.

    Raises:
        PlanInfeasible: the bundle has no such optimizer; choose another.
    """
    rule = manifest.updates.get(contract.optimizer.name)
    if rule is None:
        raise PlanInfeasible(f"the bundle has no update rule {contract.optimizer.name!r}")
    return 2 + len(rule.state)


def graph_count(kind: SegmentKind, contract: Contract, delayed: int) -> int:
    """Graphs of a kind that are compiled, where so many microbatches wait for their gradients."""
    parts = 2 if _parts(kind, contract, delayed) is not None else 0
    return parts + (2 if kind.evaluation is None else 3)


def _parts(kind: SegmentKind, contract: Contract, delayed: int) -> BackwardParts | None:
    """The two parts of a backward, where a stage uses them."""
    return kind.forms[contract.form].parts if delayed and not contract.rematerialise else None


def _delayed_bytes(manifest: Manifest, kind: str, contract: Contract, delayed: int) -> int:
    """What cotangents keep for gradients that wait."""
    parts = _parts(manifest.kinds[kind], contract, delayed)
    if parts is None:
        return 0
    return delayed * _bytes(manifest, list(parts.kept), contract.microbatch_size)


def frozen_bytes(
    manifest: Manifest, segment_index: int, slices: Mapping[str, tuple[int, ...]] | None = None
) -> int:
    """A segment's frozen tensors with their copies; `slices`: the shapes of those of which only a
    slice is here, by name."""
    total, shapes = 0, slices or {}
    for tensor in manifest.segment_tensors(segment_index):
        if tensor.binding == "frozen":
            copies = PACKED_COPIES if len(tensor.shape) > 1 else 0
            elements = math.prod(shapes.get(tensor.name, tensor.shape))
            total += elements * ELEMENT_BYTES * (1 + copies)
    return total


def fed_bytes(manifest: Manifest, kind: SegmentKind, contract: Contract) -> int:
    """Inputs, labels and weights of one microbatch."""
    fed = [port.value for port in kind.inputs if port.role != "boundary"]
    return _bytes(manifest, fed, contract.microbatch_size)


def kept_bytes(manifest: Manifest, kind: SegmentKind, contract: Contract) -> int:
    """Stash and masks of one microbatch, without what lies elsewhere."""
    ports = {port.value.name for port in (*kind.inputs, *kind.outputs)}
    elsewhere = ports | {value.name for value in (*kind.parameters, *kind.running)}
    stash = [v for v in kind.forms[contract.form].stash if v.name not in elsewhere]
    masks = [site.value for site in kind.masks if is_drawn(contract, site.probability)]
    return _bytes(manifest, [*stash, *masks], contract.microbatch_size)


def is_drawn(contract: Contract, probability: float) -> bool:
    """Whether a mask of this probability is drawn, and so has a place."""
    return (probability if contract.dropout is None else contract.dropout) > 0.0


def _residual_bytes(manifest: Manifest, first_segment: int, contract: Contract) -> int:
    """What int8 lost of the cotangents that a stage which begins there sends: of the last step and
    of this one."""
    if contract.codec != "int8" or first_segment == 0:
        return 0
    sent = cotangent_values(manifest, first_segment - 1)
    return 2 * contract.microbatches * _bytes(manifest, list(sent), contract.microbatch_size)


def _bytes(manifest: Manifest, values: list[Value], batch: int) -> int:
    return sum(manifest.value_bytes(value, batch=batch) for value in values)
