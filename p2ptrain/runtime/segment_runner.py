"""Run one segment's forward and backward graph with everything bound beforehand.

A microbatch in flight has a stash slot (its sequence number modulo the slots); what the backward
needs stays there until it ran. Boundary values lie in rings that neighbouring segments share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from p2ptrain.bundle.manifest import Manifest, Port, SegmentKind
from p2ptrain.engine.contract import Array, Binding, Buffer, Engine, Program
from p2ptrain.errors import GraphError, InvariantBroken
from p2ptrain.runtime.segment_memory import FloatArray, SegmentMemory
from p2ptrain.training.contract import Contract
from p2ptrain.training.masks import MaskPlace, draw_mask

FED_ROLES = ("data", "labels", "loss_weight")


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
class StageSetting:
    """What all segments of a stage share."""

    engine: Engine
    manifest: Manifest
    contract: Contract
    slots: int
    """Microbatches in flight."""
    scratch: FloatArray
    """Gradients of one microbatch of one segment, before they are added to the sum."""
    constants: ConstantBuffers


class SegmentRunner:
    """One segment of a stage."""

    def __init__(
        self,
        setting: StageSetting,
        *,
        segment_index: int,
        programs: tuple[Program, Program],
        memory: SegmentMemory,
        entering: Boundary,
        leaving: Boundary,
    ) -> None:
        self._engine = setting.engine
        self._manifest = manifest = setting.manifest
        self._contract = contract = setting.contract
        self._constants = setting.constants
        self._index = segment_index
        self._forward, self._backward = programs
        self._memory = memory
        self._kind = manifest.kinds[manifest.segments[segment_index].kind]
        self._entering = dict(
            zip(_boundary_names(self._kind.inputs), entering.activations, strict=True)
        )
        self._leaving = dict(
            zip(_boundary_names(self._kind.outputs), leaving.activations, strict=True)
        )
        self._cotangents_in = dict(
            zip(_boundary_names(self._kind.outputs), leaving.cotangents, strict=True)
        )
        self._cotangents_out = dict(
            zip(_boundary_names(self._kind.inputs), entering.cotangents, strict=True)
        )
        self._parameters = memory.parameter_buffers()
        self._gradients = memory.gradient_buffers(memory.gradients)
        self._scratch = setting.scratch
        self._scratch_views = memory.gradient_buffers(setting.scratch)
        self._masks = {
            site.value.name: _probability(contract, site.probability) for site in self._kind.masks
        }
        self._fed = [port for port in self._kind.inputs if port.role in FED_ROLES]
        self._losses = [port for port in self._kind.outputs if port.role == "loss"]
        self._slots = [self._slot_values() for _ in range(setting.slots)]
        self._forward_bindings: dict[int, _WiredBinding] = {}
        self._backward_bindings: dict[tuple[int, bool], _WiredBinding] = {}
        self._evaluation: _WiredBinding | None = None
        self._check_programs()

    def forward(
        self, *, step: int, microbatch: int, sequence: int, fed: Mapping[str, Array | float | None]
    ) -> float | None:
        """Compute the segment and keep its stash; the loss where the segment has one."""
        slot = sequence % len(self._slots)
        self._feed(slot, fed)
        self._draw_masks(slot, step, microbatch)
        binding = self._forward_bindings.get(slot)
        if binding is None:
            binding = self._forward_bindings[slot] = self._bind_forward(slot, training=True)
        binding.run(sequence)
        return self._loss(slot)

    def evaluate(self, *, sequence: int, fed: Mapping[str, Array | float | None]) -> float | None:
        """Compute the segment without dropout; overwrites the first stash slot."""
        self._feed(0, fed)
        if self._evaluation is None:
            self._evaluation = self._bind_forward(0, training=False)
        self._evaluation.run(sequence)
        return self._loss(0)

    def backward(self, *, sequence: int, first: bool) -> None:
        """Compute cotangents and gradients of one microbatch; `first` of a step starts the sum."""
        slot = sequence % len(self._slots)
        binding = self._backward_bindings.get((slot, first))
        if binding is None:
            binding = self._bind_backward(slot, self._gradients if first else self._scratch_views)
            self._backward_bindings[slot, first] = binding
        binding.run(sequence)
        if not first:
            self._memory.accumulate(self._scratch)

    def _slot_values(self) -> dict[str, Buffer]:
        pair = self._kind.forms[self._contract.form]
        values = [port.value for port in (*self._fed, *self._losses)]
        values += [value for value in pair.stash if value.name not in self._known()]
        values += [site.value for site in self._kind.masks if self._masks[site.value.name] > 0.0]
        batch = self._contract.microbatch_size
        return {
            value.name: self._engine.allocate(
                self._manifest.shape(value, batch=batch), np.dtype(value.dtype)
            )
            for value in values
        }

    def _known(self) -> set[str]:
        """Values that lie elsewhere and are not allocated again when the stash lists them."""
        return {*self._entering, *self._leaving, *self._parameters, *self._masks} | {
            port.value.name for port in (*self._fed, *self._losses)
        }

    def _feed(self, slot: int, fed: Mapping[str, Array | float | None]) -> None:
        for port in self._fed:
            value = fed[port.role]
            if value is None:
                raise InvariantBroken(f"segment {self._index} needs {port.role}")
            np.copyto(self._slots[slot][port.value.name].host(), value, casting="same_kind")

    def _draw_masks(self, slot: int, step: int, microbatch: int) -> None:
        for site, (name, probability) in enumerate(self._masks.items()):
            if probability == 0.0:
                continue
            place = MaskPlace(
                seed=self._contract.seed,
                step=step,
                microbatch=microbatch,
                segment=self._index,
                site=site,
            )
            draw_mask(place, probability, self._slots[slot][name].host())

    def _loss(self, slot: int) -> float | None:
        for port in self._losses:
            return float(self._slots[slot][port.value.name].host().reshape(-1)[0])
        return None

    def _bind_forward(self, slot: int, *, training: bool) -> _WiredBinding:
        binding, wires = self._forward.bind(), []
        for name in self._forward.inputs:
            if name in self._entering:
                wires.append(_Wire(name, self._entering[name], False))
            elif name in self._masks and not training:
                binding.set_input(name, self._one(name))
            else:
                binding.set_input(name, self._value(slot, name))
        for name in self._forward.outputs:
            if name in self._leaving:
                wires.append(_Wire(name, self._leaving[name], True))
            else:
                binding.set_output(name, self._value(slot, name))
        return _WiredBinding(binding, wires)

    def _bind_backward(self, slot: int, gradients: Mapping[str, Buffer]) -> _WiredBinding:
        binding, wires = self._backward.bind(), []
        for name in self._backward.inputs:
            port = name.removeprefix("cotangent.")
            if port != name:
                wires.append(_Wire(name, self._incoming_cotangent(port), False))
            elif name in self._entering or name in self._leaving:
                ring = self._entering.get(name) or self._leaving[name]
                wires.append(_Wire(name, ring, False))
            else:
                binding.set_input(name, self._value(slot, name))
        for name in self._backward.outputs:
            if name.startswith("gradient."):
                buffer = gradients.get(name.removeprefix("gradient."))
                if buffer is not None:  # a frozen tensor's gradient is not handed out
                    binding.set_output(name, buffer)
                continue
            outgoing = self._cotangents_out.get(name.removeprefix("cotangent."))
            if outgoing is not None:
                wires.append(_Wire(name, outgoing, True))
        return _WiredBinding(binding, wires)

    def _value(self, slot: int, name: str) -> Buffer:
        if name in self._parameters:
            return self._parameters[name]
        if name in self._masks and self._masks[name] == 0.0:
            return self._one(name)
        return self._slots[slot][name]

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
        trainable = {f"gradient.{place.local}" for place in self._memory.trainable}
        gradients = {name for name in self._backward.outputs if name.startswith("gradient.")}
        known = self._known() | set(self._slots[0])
        cotangents = {f"cotangent.{port.value.name}" for port in self._kind.outputs}
        unknown = {*self._forward.inputs, *self._forward.outputs} - known
        unknown |= set(self._backward.inputs) - known - cotangents
        if unknown or not trainable <= gradients:
            names = ", ".join(sorted(unknown | (trainable - gradients)))
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


def cotangent_positions(before: SegmentKind, after: SegmentKind) -> tuple[bool, ...]:
    """Which values between two segments have a cotangent: those differentiable on both sides."""
    leaving = [port.differentiable for port in before.outputs if port.role == "boundary"]
    entering = [port.differentiable for port in after.inputs if port.role == "boundary"]
    return tuple(a and b for a, b in zip(leaving, entering, strict=True))
