"""Run one shard of a segment: parts of its forward and backward, with meetings between them.

One microbatch is in flight at a time, so every value has one place. What the backward needs lies
with the segment; other values are shared by all segments of a kind. What is sliced, where parts
end and what meets there is told by `bundle.sharding`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from p2ptrain.bundle.manifest import Manifest, Port, Value
from p2ptrain.bundle.onnx_reader import read_graph
from p2ptrain.bundle.sharding import Collective, ShardedKind, ShardPart
from p2ptrain.engine.contract import Array, Binding, Buffer, Engine, Program
from p2ptrain.errors import GraphError, InvariantBroken
from p2ptrain.runtime.compute.segment_memory import SegmentMemory
from p2ptrain.runtime.compute.segment_programs import passes_back
from p2ptrain.runtime.compute.segment_runner import FED_ROLES, Boundary, Fed, StageSetting
from p2ptrain.store.bundles import Bundle
from p2ptrain.training.exchanges import Exchange, Exchanges
from p2ptrain.training.masks import MaskPlace, draw_mask
from p2ptrain.training.shard_shapes import LocalShapes, ShardPlace

Pass = Literal["train", "evaluate"]
_Sum = Literal["none", "first", "further"]
"""Where a part's gradients go: it has none that count, into the sum, or beside it."""
_COTANGENT: Final = "cotangent."
_GRADIENT: Final = "gradient."


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPrograms:
    """The compiled parts of a segment's forward and backward."""

    forward: tuple[Program, ...]
    backward: tuple[Program, ...]
    """Empty where nothing is trained and nobody upstream waits for a cotangent."""


def compile_parts(
    engine: Engine,
    bundle: Bundle,
    sharded: ShardedKind,
    constants: Mapping[str, Array],
    *,
    runs_backward: bool,
) -> ShardPrograms:
    """Compile what one shard of a segment runs; `constants` are its frozen tensors or slices.

    Raises:
        GraphError, EngineError, BundleError: the graphs cannot run here.
    """

    def program(part: ShardPart) -> Program:
        graph = bundle.graph(part.graph)
        read = {name for node in read_graph(graph).nodes for name in node.inputs}
        return engine.compile(graph, {n: array for n, array in constants.items() if n in read})

    return ShardPrograms(
        forward=tuple(map(program, sharded.forward)),
        backward=tuple(map(program, sharded.backward)) if runs_backward else (),
    )


class ShardSegment:
    """One shard of one segment that is divided."""

    def __init__(
        self,
        setting: StageSetting,
        *,
        place: ShardPlace,
        programs: ShardPrograms,
        memory: SegmentMemory,
        entering: Boundary,
        leaving: Boundary,
        kind_values: dict[str, Buffer],
    ) -> None:
        """`kind_values` are what all segments of the kind share; the first one fills them."""
        self._setting, self._place, self._programs = setting, place, programs
        self._engine, self._contract, self._memory = setting.engine, setting.contract, memory
        manifest, index = setting.manifest, place.segment_index
        self._kind = kind = manifest.kinds[manifest.segments[index].kind]
        self._shapes = LocalShapes(manifest, place, batch=setting.contract.microbatch_size)
        self._whole = {
            value.name: manifest.shape(value, batch=setting.contract.microbatch_size)
            for value in (*(p.value for p in kind.inputs), *(s.value for s in kind.masks))
        }
        self._fed = [port for port in kind.inputs if port.role in FED_ROLES]
        own = setting.contract.dropout
        self._masks = {
            site.value.name: site.probability if own is None else own for site in kind.masks
        }
        self._values = self._make_values(entering, leaving, kind_values)
        self._cotangents_in = _named(kind.outputs, leaving)
        self._gradients: dict[_Sum, dict[str, Buffer]] = {
            "none": {},
            "first": memory.gradient_buffers(memory.gradients),
            "further": memory.gradient_buffers(setting.scratch),
        }
        self._bindings: dict[tuple[int, Pass | _Sum], Binding] = {}
        self._sites = {
            id(collective): site
            for site, collective in enumerate(
                c for part in place.sharded.parts for c in part.collectives
            )
        }

    @property
    def sites(self) -> int:
        """How many meetings a microbatch has, forward and backward."""
        return len(self._sites)

    def forward(self, *, step: int, microbatch: int, fed: Fed) -> Exchanges[float | None]:
        """Compute the segment and keep its stash; the loss where the segment has one."""
        self._feed(fed)
        self._draw_masks(step, microbatch)
        yield from self._run_forward("train")
        return self._loss()

    def evaluate(self, *, fed: Fed) -> Exchanges[float | None]:
        """Compute the segment without dropout; overwrites the stash."""
        self._feed(fed)
        yield from self._run_forward("evaluate")
        return self._loss()

    def backward(self, *, first: bool) -> Exchanges[None]:
        """Compute cotangents and gradients of the microbatch; `first` of a step starts the sum."""
        if not self._programs.backward:
            return
        start = len(self._place.sharded.forward)
        where: _Sum = "first" if first else "further"
        for index, program in enumerate(self._programs.backward, start):
            self._run_part(index, program, where)
            yield from self._meet(self._place.sharded.parts[index], where)
        if not first:
            self._memory.accumulate(self._setting.scratch)

    def _run_forward(self, how: Pass) -> Exchanges[None]:
        for index, program in enumerate(self._programs.forward):
            self._run_part(index, program, how)
            yield from self._meet(self._place.sharded.forward[index], "none")

    def _meet(self, part: ShardPart, where: _Sum) -> Exchanges[None]:
        for collective in part.collectives:
            answer = yield self._meeting(collective, where)
            target = self._buffer(collective.got, where).host()
            np.copyto(target, answer, casting="no")

    def _meeting(self, collective: Collective, where: _Sum) -> Exchange:
        counts = () if collective.kind == "reduce" else self._only_counts()
        return Exchange(
            kind=collective.kind,
            segment=self._place.segment_index,
            site=self._sites[id(collective)],
            array=self._buffer(collective.sent, where).host(),
            axis=collective.axis,
            counts=counts,
        )

    def _only_counts(self) -> tuple[int, ...]:
        """Of the one sliced axis of a kind that gathers or scatters."""
        (counts,) = self._place.cuts.counts.values()
        return counts

    def _run_part(self, index: int, program: Program, how: Pass | _Sum) -> None:
        binding = self._bindings.get((index, how))
        if binding is None:
            binding = self._bindings[index, how] = self._bind(index, program, how)
        binding.run()

    def _bind(self, index: int, program: Program, how: Pass | _Sum) -> Binding:
        where: _Sum = how if how == "first" or how == "further" else "none"
        binding = program.bind()
        for name in program.inputs:
            if how == "evaluate" and name in self._masks:
                binding.set_input(name, self._constant(name, 1.0))
            else:
                binding.set_input(name, self._input(name, where))
        for name in self._place.sharded.parts[index].outputs:
            binding.set_output(name, self._buffer(name, where))
        return binding

    def _input(self, name: str, where: _Sum) -> Buffer:
        port = name.removeprefix(_COTANGENT)
        if port in self._cotangents_in and port != name and name not in self._values:
            given = self._cotangents_in[port]
            if given is not None:
                return given
            loss = any(p.role == "loss" and p.value.name == port for p in self._kind.outputs)
            return self._constant(port, 1.0 if loss else 0.0)
        if self._masks.get(name) == 0.0:
            return self._constant(name, 1.0)
        return self._buffer(name, where)

    def _buffer(self, name: str, where: _Sum) -> Buffer:
        local = name.removeprefix(_GRADIENT)
        found = self._values.get(name)
        if found is None and local != name:
            found = self._gradients[where].get(local)
        if found is None:
            raise GraphError(f"a part of kind {self._kind.name!r} has no value {name!r:.80}")
        return found

    def _constant(self, name: str, value: float) -> Buffer:
        (port,) = (v for v in self._ports() if v.name == name)
        return self._setting.constants.get(self._shapes.of(port), value)

    def _ports(self) -> list[Value]:
        kind = self._kind
        masks = (site.value for site in kind.masks)
        return [*masks, *(port.value for port in (*kind.inputs, *kind.outputs))]

    def _make_values(
        self, entering: Boundary, leaving: Boundary, kind_values: dict[str, Buffer]
    ) -> dict[str, Buffer]:
        """Every value that lies at one place, by its name in the parts' graphs."""
        kind, sharded = self._kind, self._place.sharded
        values = dict(self._memory.parameter_buffers())
        for boundary, ports in ((entering, kind.inputs), (leaving, kind.outputs)):
            names = [port.value.name for port in ports if port.role == "boundary"]
            values |= {n: ring[0] for n, ring in zip(names, boundary.activations, strict=True)}
        own = [port.value for port in (*kind.inputs, *kind.outputs) if port.role != "boundary"]
        own += [site.value for site in kind.masks if self._masks[site.value.name] > 0.0]
        values |= {value.name: self._allocate(value) for value in own}
        values |= self._sizes()
        for value in sharded.values:
            if value.name in sharded.stash:
                values[value.name] = self._engine.allocate(*self._shapes.part(value.name))
            elif value.name not in kind_values:
                kind_values[value.name] = self._engine.allocate(*self._shapes.part(value.name))
        return {**values, **kind_values, **self._cotangents_out(entering)}

    def _cotangents_out(self, entering: Boundary) -> dict[str, Buffer]:
        """Where cotangents for the segment before go; what it does not want, nobody reads."""
        found = {}
        wanted = _named(self._kind.inputs, entering)
        for port in self._kind.inputs:
            if port.differentiable:
                name, given = f"{_COTANGENT}{port.value.name}", wanted.get(port.value.name)
                found[name] = self._allocate(port.value) if given is None else given
        return found

    def _sizes(self) -> dict[str, Buffer]:
        """`shard.start.<axis>` and its like."""
        found = {}
        for axis, counts in self._place.cuts.counts.items():
            rank = self._place.rank
            told = {"start": sum(counts[:rank]), "count": counts[rank], "all": sum(counts)}
            for what, number in told.items():
                buffer = self._engine.allocate((1,), np.int64)
                buffer.host()[0] = number
                found[f"shard.{what}.{axis}"] = buffer
        return found

    def _allocate(self, value: Value) -> Buffer:
        return self._engine.allocate(self._shapes.of(value), np.dtype(value.dtype))

    def _feed(self, fed: Fed) -> None:
        for port, value in fed.by_port(self._fed):
            name = port.value.name
            whole = self._whole[name]
            if value is None or (isinstance(value, np.ndarray) and value.shape != whole):
                raise InvariantBroken(
                    f"segment {self._place.segment_index} needs {port.role} {whole}"
                )
            if isinstance(value, np.ndarray):
                value = self._own(name, value)
            np.copyto(self._values[name].host(), value, casting="same_kind")

    def _draw_masks(self, step: int, microbatch: int) -> None:
        """A shard's elements of the mask that a whole segment would draw."""
        for site, (name, probability) in enumerate(self._masks.items()):
            if probability == 0.0:
                continue
            place = MaskPlace(
                seed=self._contract.seed,
                step=step,
                microbatch=microbatch,
                segment=self._place.segment_index,
                site=site,
            )
            if name not in self._place.cuts.cuts:
                draw_mask(place, probability, self._values[name].host())
                continue
            whole = np.empty(self._whole[name], np.float32)
            draw_mask(place, probability, whole)
            np.copyto(self._values[name].host(), self._own(name, whole))

    def _own(self, name: str, whole: Array) -> Array:
        cut = self._place.cuts.cuts.get(name)
        return whole if cut is None else cut.slice(whole, self._place.rank)

    def _loss(self) -> float | None:
        for port in self._kind.outputs:
            if port.role == "loss":
                return float(self._values[port.value.name].host().reshape(-1)[0])
        return None


def _named(ports: tuple[Port, ...], boundary: Boundary) -> dict[str, Buffer | None]:
    """By port: where its cotangent lies; None where it has none, or the port is no boundary's."""
    names = [port.value.name for port in ports if port.role == "boundary"]
    rings = dict(zip(names, boundary.cotangents, strict=True))
    found = {port.value.name: rings.get(port.value.name) for port in ports}
    return {name: None if ring is None else ring[0] for name, ring in found.items()}


def runs_backward(manifest: Manifest, segment_index: int) -> bool:
    """Whether anything of a segment is trained, or the one before waits for cotangents."""
    kind = manifest.kinds[manifest.segments[segment_index].kind]
    tensors = manifest.segment_tensors(segment_index)
    return passes_back(kind) or any(tensor.binding == "trainable" for tensor in tensors)
