"""Run one segment's forward and backward graph with everything bound beforehand.

A microbatch in flight has a slot (its sequence number modulo the slots); what the backward needs
stays there until it ran. Boundary values lie in rings that neighbouring segments share. Where the
contract rematerialises, a slot keeps only what was fed and the running values that the forward
read; the stash and the masks lie in one place for all segments of a kind, and the backward runs
the forward again unless they are still there.

A backward whose gradients are delayed runs in two parts: `cotangents`, later `gradients`. What the
first keeps for the second lies in a ring as long as gradients may be missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np

from p2ptrain.bundle.manifest import Manifest, Port, Value
from p2ptrain.engine.contract import Array, Binding, Buffer, Engine, Program
from p2ptrain.errors import GraphError, InvariantBroken
from p2ptrain.runtime.compute.segment_memory import FloatArray, SegmentMemory
from p2ptrain.runtime.compute.segment_programs import SegmentPrograms, passes_back
from p2ptrain.training.contract import Contract
from p2ptrain.training.masks import MaskPlace, draw_mask

FED_ROLES: Final = ("data", "labels", "loss_weight")
Pass = Literal["train", "again", "evaluate"]
"""A forward of training; the same one again for its backward; one that only gives the loss."""
_Part = Literal["whole", "cotangents", "gradients"]
"""Of a backward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundary:
    """The values between two segments: one ring of buffers for each port.

    Rings at a stage's edge have one place more than microbatches in flight, so that what is being
    sent or received is not overwritten; inner ones need no more than the stash.
    """

    activations: tuple[tuple[Buffer, ...], ...]
    cotangents: tuple[tuple[Buffer, ...] | None, ...]
    """None where the value is not differentiable on both sides."""


@dataclass(slots=True)
class _Wire:
    """A graph value that lies in a ring, and the place it is bound to now."""

    name: str
    ring: Sequence[Buffer]
    is_output: bool
    bound: int = -1


class _WiredBinding:
    """A binding whose ring values follow the sequence number; others never change."""

    __slots__ = ("_binding", "_wires")

    def __init__(self, binding: Binding, wires: list[_Wire]) -> None:
        self._binding = binding
        self._wires = wires

    def run(self, sequence: int) -> None:
        for wire in self._wires:
            place = sequence % len(wire.ring)
            if place != wire.bound:
                attach = self._binding.set_output if wire.is_output else self._binding.set_input
                attach(wire.name, wire.ring[place])
                wire.bound = place
        self._binding.run()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fed:
    """What the run gives a microbatch; None where the stage does not need it."""

    inputs: tuple[Array, ...] | None
    """One array for each data port of the first segment, in port order."""
    labels: Array | None
    loss_weight: float

    def by_port(self, ports: Iterable[Port]) -> Iterator[tuple[Port, Array | float | None]]:
        """What each of a segment's fed ports gets."""
        inputs = iter(self.inputs or ())
        for port in ports:
            match port.role:
                case "data":
                    yield port, next(inputs, None)
                case "labels":
                    yield port, self.labels
                case _:
                    yield port, self.loss_weight


@dataclass(slots=True)
class KindStash:
    """The one stash of all segments of a kind, where the contract rematerialises."""

    values: dict[str, Buffer] = field(default_factory=dict)
    holds: tuple[int, int] | None = None
    """Segment and sequence number of the forward that it is from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSetting:
    """What all segments of a stage share."""

    engine: Engine
    manifest: Manifest
    contract: Contract
    slots: int
    """Microbatches in flight."""
    delayed: int
    """Microbatches whose gradients may be missing after their cotangents."""
    scratch: FloatArray
    """Gradients of one microbatch of one segment, before they are added to the sum."""
    running_scratch: FloatArray
    """Running values that nobody wants."""
    constants: ConstantBuffers
    kind_stashes: dict[str, KindStash]
    """By kind; filled by its first segment."""


@dataclass(slots=True)
class _Slot:
    """What one microbatch in flight keeps for its backward."""

    values: dict[str, Buffer]
    running: FloatArray
    """Running values as the forward read them."""
    running_views: dict[str, Buffer]
    step: int = 0
    microbatch: int = 0


class SegmentRunner:
    """One segment of a stage."""

    def __init__(
        self,
        setting: StageSetting,
        *,
        segment_index: int,
        programs: SegmentPrograms,
        memory: SegmentMemory,
        entering: Boundary,
        leaving: Boundary,
    ) -> None:
        self._engine = setting.engine
        self._manifest = manifest = setting.manifest
        self._contract = contract = setting.contract
        self._constants = setting.constants
        self._index = segment_index
        self._programs, self._memory = programs, memory
        self._kind = kind = manifest.kinds[manifest.segments[segment_index].kind]
        ins, outs = _boundary_names(kind.inputs), _boundary_names(kind.outputs)
        self._entering = dict(zip(ins, entering.activations, strict=True))
        self._leaving = dict(zip(outs, leaving.activations, strict=True))
        self._cotangents_in = dict(zip(outs, leaving.cotangents, strict=True))
        self._cotangents_out = dict(zip(ins, entering.cotangents, strict=True))
        self._parameters = memory.parameter_buffers()
        self._gradients = memory.gradient_buffers(memory.gradients)
        self._scratch = setting.scratch
        self._scratch_views = memory.gradient_buffers(setting.scratch)
        self._running = {
            "train": memory.running_buffers(memory.pending),
            "again": memory.running_buffers(setting.running_scratch),
            "evaluate": memory.running_buffers(setting.running_scratch),
        }
        self._committed = memory.running_buffers(memory.running)
        self._masks = {
            site.value.name: _probability(contract, site.probability) for site in kind.masks
        }
        self._fed = [port for port in kind.inputs if port.role in FED_ROLES]
        self._losses = [port for port in kind.outputs if port.role == "loss"]
        self._stash = setting.kind_stashes.setdefault(kind.name, KindStash())
        self._slots = [self._make_slot() for _ in range(setting.slots)]
        self._forward_bindings: dict[tuple[int, Pass], _WiredBinding] = {}
        self._kept = self._make_kept(setting.delayed)
        self._backward_bindings: dict[tuple[_Part, int, bool], _WiredBinding] = {}
        self._check_programs()

    def forward(self, *, step: int, microbatch: int, sequence: int, fed: Fed) -> float | None:
        """Compute the segment and keep its stash; the loss where the segment has one."""
        slot = self._slots[sequence % len(self._slots)]
        slot.step, slot.microbatch = step, microbatch
        self._feed(slot, fed)
        np.copyto(slot.running, self._memory.pending)
        self._run_forward("train", sequence)
        return self._loss(slot)

    def evaluate(self, *, sequence: int, fed: Fed) -> float | None:
        """Compute the segment with the running values of the last update and without dropout;
        overwrites the first slot."""
        self._feed(self._slots[0], fed)
        self._stash.holds = None
        self._forward_binding(0, "evaluate").run(sequence)
        return self._loss(self._slots[0])

    def backward(self, *, sequence: int, first: bool) -> None:
        """Compute cotangents and gradients of one microbatch; `first` of a step starts the sum."""
        program = self._programs.backward
        if program is None:
            return
        if self._contract.rematerialise and self._stash.holds != (self._index, sequence):
            self._run_forward("again", sequence)
        self._run_backward("whole", program, sequence, first=first)
        self._add_gradients(first=first)

    def cotangents(self, *, sequence: int, first: bool) -> None:
        """The first part of a backward: what the segment before waits for, and more only where it
        cannot be delayed."""
        if self._programs.parts is not None:
            self._run_backward("cotangents", self._programs.parts[0], sequence, first=False)
        elif not self._delays_all:
            self.backward(sequence=sequence, first=first)

    def gradients(self, *, sequence: int, first: bool) -> None:
        """The rest of a backward, after `cotangents`, in microbatch order."""
        if self._programs.parts is not None:
            self._run_backward("gradients", self._programs.parts[1], sequence, first=first)
            self._add_gradients(first=first)
        elif self._delays_all:
            self.backward(sequence=sequence, first=first)

    @property
    def _delays_all(self) -> bool:
        """Whether nobody waits for cotangents of this segment and its stash stays."""
        return not passes_back(self._kind) and not self._contract.rematerialise

    def _run_backward(self, part: _Part, program: Program, sequence: int, *, first: bool) -> None:
        index = sequence % len(self._slots)
        binding = self._backward_bindings.get((part, index, first))
        if binding is None:
            gradients = self._gradients if first else self._scratch_views
            binding = self._bind_backward(program, self._slots[index], gradients)
            self._backward_bindings[part, index, first] = binding
        binding.run(sequence)

    def _add_gradients(self, *, first: bool) -> None:
        if not first:
            self._memory.accumulate(self._scratch)

    def _run_forward(self, how: Pass, sequence: int) -> None:
        index = sequence % len(self._slots)
        self._draw_masks(self._slots[index])
        self._forward_binding(index, how).run(sequence)
        self._stash.holds = (self._index, sequence)

    def _make_slot(self) -> _Slot:
        own = [port.value for port in self._fed]
        kept = [port.value for port in self._losses]
        stash = self._kind.forms[self._contract.form].stash
        kept += [value for value in stash if value.name not in self._known()]
        masks = (site.value for site in self._kind.masks)
        kept += [value for value in masks if self._masks[value.name] > 0.0]
        if self._contract.rematerialise:
            if not self._stash.values:
                self._stash.values = self._allocate(kept)
            values = self._allocate(own) | self._stash.values
        else:
            values = self._allocate([*own, *kept])
        running = self._engine.allocate(self._memory.running.shape, np.float32).host()
        return _Slot(values, running, self._memory.running_buffers(running))

    def _make_kept(self, places: int) -> dict[str, Sequence[Buffer]]:
        """Rings of what one part of a backward keeps for the other."""
        parts = self._kind.forms[self._contract.form].parts
        if parts is None or self._programs.parts is None:
            return {}
        rings = [self._allocate(parts.kept) for _ in range(places)]
        return {value.name: tuple(ring[value.name] for ring in rings) for value in parts.kept}

    def _allocate(self, values: Sequence[Value]) -> dict[str, Buffer]:
        batch = self._contract.microbatch_size
        return {
            value.name: self._engine.allocate(
                self._manifest.shape(value, batch=batch), np.dtype(value.dtype)
            )
            for value in values
        }

    def _known(self) -> set[str]:
        """Values that lie elsewhere and are not allocated again when the stash lists them."""
        return {
            *self._entering,
            *self._leaving,
            *self._parameters,
            *self._masks,
            *self._committed,
            *(port.value.name for port in (*self._fed, *self._losses)),
        }

    def _feed(self, slot: _Slot, fed: Fed) -> None:
        for port, value in fed.by_port(self._fed):
            target = slot.values[port.value.name].host()
            if value is None or (isinstance(value, np.ndarray) and value.shape != target.shape):
                raise InvariantBroken(f"segment {self._index} needs {port.role} {target.shape}")
            np.copyto(target, value, casting="same_kind")

    def _draw_masks(self, slot: _Slot) -> None:
        for site, (name, probability) in enumerate(self._masks.items()):
            if probability == 0.0:
                continue
            place = MaskPlace(
                seed=self._contract.seed,
                step=slot.step,
                microbatch=slot.microbatch,
                segment=self._index,
                site=site,
            )
            draw_mask(place, probability, slot.values[name].host())

    def _loss(self, slot: _Slot) -> float | None:
        for port in self._losses:
            return float(slot.values[port.value.name].host().reshape(-1)[0])
        return None

    def _forward_binding(self, index: int, how: Pass) -> _WiredBinding:
        binding = self._forward_bindings.get((index, how))
        if binding is None:
            program = self._programs.forward
            if how == "evaluate" and self._programs.evaluation is not None:
                program = self._programs.evaluation
            binding = self._bind_forward(program, self._slots[index], how)
            self._forward_bindings[index, how] = binding
        return binding

    def _bind_forward(self, program: Program, slot: _Slot, how: Pass) -> _WiredBinding:
        binding, wires = program.bind(), []
        evaluating = how == "evaluate"
        present = self._committed if evaluating else slot.running_views
        for name in program.inputs:
            if name in self._entering:
                wires.append(_Wire(name, self._entering[name], False))
            elif name in present:
                binding.set_input(name, present[name])
            elif name in self._masks and evaluating:
                binding.set_input(name, self._one(name))
            else:
                binding.set_input(name, self._value(slot, name))
        fresh = {f"new.{local}": buffer for local, buffer in self._running[how].items()}
        for name in program.outputs:
            if name in self._leaving:
                wires.append(_Wire(name, self._leaving[name], True))
            else:
                binding.set_output(name, fresh.get(name) or self._value(slot, name))
        return _WiredBinding(binding, wires)

    def _bind_backward(
        self, program: Program, slot: _Slot, gradients: Mapping[str, Buffer]
    ) -> _WiredBinding:
        binding, wires = program.bind(), []
        for name in program.inputs:
            port = name.removeprefix("cotangent.")
            if port != name:
                wires.append(_Wire(name, self._incoming_cotangent(port), False))
            elif name in self._kept:
                wires.append(_Wire(name, self._kept[name], False))
            elif name in self._entering or name in self._leaving:
                ring = self._entering.get(name) or self._leaving[name]
                wires.append(_Wire(name, ring, False))
            else:
                buffer = slot.running_views.get(name) or self._value(slot, name)
                binding.set_input(name, buffer)
        for name in program.outputs:
            if name.startswith("gradient."):
                binding.set_output(name, gradients[name.removeprefix("gradient.")])
                continue
            if name in self._kept:
                wires.append(_Wire(name, self._kept[name], True))
                continue
            outgoing = self._cotangents_out.get(name.removeprefix("cotangent."))
            if outgoing is not None:
                wires.append(_Wire(name, outgoing, True))
        return _WiredBinding(binding, wires)

    def _value(self, slot: _Slot, name: str) -> Buffer:
        if name in self._parameters:
            return self._parameters[name]
        if name in self._masks and self._masks[name] == 0.0:
            return self._one(name)
        return slot.values[name]

    def _one(self, name: str) -> Buffer:
        (value,) = (site.value for site in self._kind.masks if site.value.name == name)
        return self._constants.get(
            self._manifest.shape(value, batch=self._contract.microbatch_size), 1.0
        )

    def _incoming_cotangent(self, port_name: str) -> Sequence[Buffer]:
        """The ring a cotangent comes from: 1 for the loss, 0 where nobody downstream gives one."""
        ring = self._cotangents_in.get(port_name)
        if ring is not None:
            return ring
        (port,) = (port for port in self._kind.outputs if port.value.name == port_name)
        shape = self._manifest.shape(port.value, batch=self._contract.microbatch_size)
        return (self._constants.get(shape, 1.0 if port.role == "loss" else 0.0),)

    def _check_programs(self) -> None:
        """GraphError when the graphs do not have the values that the manifest promises."""
        programs = self._programs
        inner = self._known() | set(self._slots[0].values)
        fresh = {f"new.{name}" for name in self._committed}
        cotangents = {f"cotangent.{port.value.name}" for port in self._kind.outputs}
        gradients = {f"gradient.{name}" for name in self._parameters}
        unknown = {*programs.forward.inputs} - inner
        unknown |= {*programs.forward.outputs} - inner - fresh
        unknown |= fresh - {*programs.forward.outputs}
        if programs.evaluation is not None:
            unknown |= {*programs.evaluation.inputs, *programs.evaluation.outputs} - inner
        if programs.backward is not None:
            given = {name for name in programs.backward.outputs if name.startswith("gradient.")}
            unknown |= {*programs.backward.inputs} - inner - cotangents
            unknown |= gradients ^ given
        if programs.parts is not None:
            first, second = programs.parts
            unknown |= {*first.inputs} - inner - cotangents
            unknown |= {*second.inputs} - inner - cotangents - {*self._kept}
            unknown |= gradients ^ {*second.outputs}
            unknown |= {*self._kept} - {*first.outputs}
        if unknown:
            names = ", ".join(sorted(unknown))
            raise GraphError(f"the graphs of kind {self._kind.name!r} do not fit: {names:.200}")


class ConstantBuffers:
    """Constant float32 buffers shared by whoever needs a mask of ones or a seed."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._buffers: dict[tuple[tuple[int, ...], float], Buffer] = {}

    def get(self, shape: tuple[int, ...], value: float) -> Buffer:
        """A buffer full of `value`; nobody writes to it."""
        buffer = self._buffers.get((shape, value))
        if buffer is None:
            buffer = self._buffers[shape, value] = self._engine.allocate(shape, np.float32)
            buffer.host().fill(value)
        return buffer


def _boundary_names(ports: tuple[Port, ...]) -> list[str]:
    return [port.value.name for port in ports if port.role == "boundary"]


def _probability(contract: Contract, own: float) -> float:
    return own if contract.dropout is None else contract.dropout
