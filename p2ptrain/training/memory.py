"""The memory a stage is predicted to need at its peak; the planner's feasibility test.

What the stage allocates itself is counted exactly, as `runtime.segment_memory` and
`runtime.segment_runner` allocate it. What the runtime needs beside it while a graph runs is an
estimate, checked against measured peaks by `tools/memory_table.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from p2ptrain.bundle.manifest import BackwardParts, Manifest, SegmentKind, Value
from p2ptrain.errors import PlanInfeasible
from p2ptrain.training.boundaries import cotangent_values
from p2ptrain.training.contract import Contract
from p2ptrain.training.layout import FlatLayout, flat_layout

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
        )


def stage_memory(
    manifest: Manifest,
    segments: range,
    contract: Contract,
    in_flight: int,
    process_bytes: int = PROCESS_BYTES,
    delayed: int = 0,
) -> StageMemory:
    """Predicted peak memory of a peer that runs these segments.

    Args:
        manifest: Of the model.
        segments: The stage's segments.
        contract: Of the run: form, microbatch size, optimizer, rematerialisation.
        in_flight: Microbatches whose stash is held at once.
        process_bytes: The peer before it loads the model.
        delayed: Of these microbatches, those that may wait for their gradients.

    Raises:
        PlanInfeasible: the bundle has no such optimizer; choose another.
    """
    rule = manifest.updates.get(contract.optimizer.name)
    if rule is None:
        raise PlanInfeasible(f"the bundle has no update rule {contract.optimizer.name!r}")
    layouts = [flat_layout(manifest, index) for index in segments]
    kinds = {manifest.segments[i].kind: manifest.kinds[manifest.segments[i].kind] for i in segments}
    batch = contract.microbatch_size
    return StageMemory(
        process=process_bytes,
        sessions=SESSION_BYTES
        * (1 + sum(_graphs(kind, contract, delayed) for kind in kinds.values())),
        parameters=_parameter_bytes(layouts, len(rule.state), in_flight),
        frozen=sum(_frozen_bytes(manifest, index) for index in segments),
        stash=_stash_bytes(manifest, segments, contract, in_flight)
        + sum(_delayed_bytes(manifest, index, contract, delayed) for index in segments),
        boundaries=_boundary_bytes(manifest, segments, batch, in_flight, delayed)
        + _residual_bytes(manifest, segments, contract),
        workspace=_workspace_bytes(manifest, kinds.values(), layouts, contract),
    )


def _graphs(kind: SegmentKind, contract: Contract, delayed: int) -> int:
    parts = 2 if _parts(kind, contract, delayed) is not None else 0
    return parts + (2 if kind.evaluation is None else 3)


def _parts(kind: SegmentKind, contract: Contract, delayed: int) -> BackwardParts | None:
    """The two parts of a backward, where a stage uses them."""
    return kind.forms[contract.form].parts if delayed and not contract.rematerialise else None


def _delayed_bytes(manifest: Manifest, segment_index: int, contract: Contract, delayed: int) -> int:
    """What cotangents keep for gradients that wait."""
    kind = manifest.kinds[manifest.segments[segment_index].kind]
    parts = _parts(kind, contract, delayed)
    if parts is None:
        return 0
    return delayed * _bytes(manifest, list(parts.kept), contract.microbatch_size)


def _parameter_bytes(layouts: list[FlatLayout], state_count: int, in_flight: int) -> int:
    """Parameters, gradients, optimizer state, and gradients of one microbatch of one segment;
    running values committed, pending and as every microbatch in flight read them."""
    lengths = [layout.length for layout in layouts]
    running = sum(layout.running_length for layout in layouts)
    elements = sum(lengths) * (2 + state_count) + max(lengths) + running * (2 + in_flight)
    return elements * ELEMENT_BYTES


def _frozen_bytes(manifest: Manifest, segment_index: int) -> int:
    total = 0
    for tensor in manifest.segment_tensors(segment_index):
        if tensor.binding == "frozen":
            copies = PACKED_COPIES if len(tensor.shape) > 1 else 0
            total += tensor.elements * ELEMENT_BYTES * (1 + copies)
    return total


def _stash_bytes(manifest: Manifest, segments: range, contract: Contract, in_flight: int) -> int:
    """What was fed for each microbatch in flight, and as many stashes, or one for each kind."""
    batch, total, seen = contract.microbatch_size, 0, set()
    for index in segments:
        kind = manifest.kinds[manifest.segments[index].kind]
        fed = [port.value for port in kind.inputs if port.role != "boundary"]
        total += in_flight * _bytes(manifest, fed, batch)
        if contract.rematerialise:
            total += 0 if kind.name in seen else _kept_bytes(manifest, kind, contract)
            seen.add(kind.name)
        else:
            total += in_flight * _kept_bytes(manifest, kind, contract)
    return total


def _kept_bytes(manifest: Manifest, kind: SegmentKind, contract: Contract) -> int:
    """Stash and masks of one microbatch, without what lies elsewhere."""
    ports = {port.value.name for port in (*kind.inputs, *kind.outputs)}
    elsewhere = ports | {value.name for value in (*kind.parameters, *kind.running)}
    stash = [v for v in kind.forms[contract.form].stash if v.name not in elsewhere]
    masks = [site.value for site in kind.masks if _is_drawn(contract, site.probability)]
    return _bytes(manifest, [*stash, *masks], contract.microbatch_size)


def _workspace_bytes(
    manifest: Manifest,
    kinds: Iterable[SegmentKind],
    layouts: list[FlatLayout],
    contract: Contract,
) -> int:
    kept = sum(_kept_bytes(manifest, kind, contract) for kind in kinds)
    transposed = 2 * max(layout.length for layout in layouts) * ELEMENT_BYTES
    return WORKSPACE_HALVES * kept // 2 + transposed


def _is_drawn(contract: Contract, probability: float) -> bool:
    return (probability if contract.dropout is None else contract.dropout) > 0.0


def _boundary_bytes(
    manifest: Manifest, segments: range, batch: int, in_flight: int, delayed: int
) -> int:
    """Rings of activations and cotangents at both ends; inside one activation for each microbatch
    in flight and one cotangent, or as many as wait for their gradients."""
    edges = [segments.start - 1] if segments.start > 0 else []
    edges += [segments.stop - 1] if segments.stop < len(manifest.segments) else []
    ring = sum(manifest.boundary_bytes(edge, batch=batch) for edge in edges)
    inner = sum(manifest.boundary_bytes(index, batch=batch) for index in segments[:-1])
    return 2 * ring * (in_flight + delayed + 1) + inner * (in_flight + max(1, delayed))


def _residual_bytes(manifest: Manifest, segments: range, contract: Contract) -> int:
    """What int8 lost of the cotangents that the stage sends: of the last step and of this one."""
    if contract.codec != "int8" or segments.start == 0:
        return 0
    sent = cotangent_values(manifest, segments.start - 1)
    return 2 * contract.microbatches * _bytes(manifest, list(sent), contract.microbatch_size)


def _bytes(manifest: Manifest, values: list[Value], batch: int) -> int:
    return sum(manifest.value_bytes(value, batch=batch) for value in values)
