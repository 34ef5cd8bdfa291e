"""Distinct segments: one kind for all that are the same function, with its graphs and costs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from p2ptrain.bundle import manifest as words
from p2ptrain.graph.adapters import without_adapters
from p2ptrain.graph.costs import COLUMNS, HEADS, Shards, find_shards, product_flops
from p2ptrain.graph.decompositions import decompose
from p2ptrain.graph.halving import Halves, halve
from p2ptrain.graph.ir import IR_VERSION, OPSET, Axis, Graph, depth_first, to_model
from p2ptrain.graph.local import Local, rename_inner
from p2ptrain.graph.lowering.registry import lower
from p2ptrain.graph.pads import state_all_axes
from p2ptrain.graph.source import LABELS, LOSS, LOSS_WEIGHT
from p2ptrain.graph.split import Pair, differentiate, name_stash, tidy
from p2ptrain.ids import Digest


@dataclass(slots=True, kw_only=True)
class Files:
    """The graphs of a bundle by digest."""

    contents: dict[Digest, bytes] = field(default_factory=dict)
    listed: dict[str, words.GraphFile] = field(default_factory=dict)

    def put(self, graph: Graph, name: str, *, free: Iterable[str] = ()) -> Digest:
        """Store a graph; `free` are inputs that it does not declare: they will be constants."""
        declared = graph.copy()
        for unbound in free:
            declared.inputs.pop(unbound, None)
        state_all_axes(declared)
        content = to_model(declared, name=name).SerializeToString(deterministic=True)
        digest = Digest(hashlib.sha256(content).hexdigest())
        self.contents[digest] = content
        self.listed[digest] = words.GraphFile(
            bytes=len(content), opset=OPSET, ir=IR_VERSION, dtype="float32"
        )
        return digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A distinct segment under its readable name."""

    name: str
    local: Local
    forms: dict[str, Pair]
    halves: Halves | None
    """The portable backward in two parts."""
    evaluation: Graph | None
    shards: Shards


def distinct_kinds(locals_: Sequence[Local]) -> dict[str, Kind]:
    """One kind per distinct segment, by fingerprint, with a readable unique name."""
    kinds: dict[str, Kind] = {}
    taken: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for local in locals_:
        if local.fingerprint in kinds:
            continue
        count = taken[local.role] = taken.get(local.role, 0) + 1
        shards = find_shards(without_adapters(local.graph))
        if any(sizes.setdefault(symbol, size) != size for symbol, size in shards.sizes.items()):
            shards = Shards(sizes={}, groups={})  # a symbol has one size in a bundle
        forms = {form: _pair(local, portable=form == "portable") for form in words.FORMS}
        gradients = [f"gradient.{name}" for name in local.trainable]
        kinds[local.fingerprint] = Kind(
            name=local.role if count == 1 else f"{local.role}_kind{count}",
            local=local,
            forms=forms,
            halves=halve(forms["portable"].backward, gradients=gradients),
            evaluation=_evaluation(local),
            shards=shards,
        )
    return kinds


def _reference(local: Local) -> str:
    """The port whose shape tells most sizes; the first of several."""

    def told(name: str) -> int:
        axes = local.graph.axes(name)
        return sum(isinstance(axis, str) and "*" not in axis for axis in axes)

    return max(local.inputs, key=told)


def _pair(local: Local, *, portable: bool) -> Pair:
    wanted = {name: f"cotangent.{name}" for name, flows in local.inputs.items() if flows}
    wanted |= {name: f"gradient.{name}" for name in local.trainable}
    reference = _reference(local)
    if not wanted:
        return _without_backward(local, reference)
    pair = differentiate(local.graph, wanted=wanted, reference=reference, portable=portable)
    return name_stash(pair)


def _without_backward(local: Local, reference: str) -> Pair:
    """The forward of a segment before anything trainable, and an empty graph that nobody runs."""
    return Pair(forward=_settled(local.graph, reference, "f"), backward=Graph(), stash=())


def _evaluation(local: Local) -> Graph | None:
    if local.evaluation is None:
        return None
    return _settled(local.evaluation, _reference(local), "e")


def _settled(graph: Graph, reference: str, stem: str) -> Graph:
    """A graph that nobody differentiates, in standard operators and canonical order."""
    settled = graph.copy()
    decompose(settled)
    lower(settled, set())
    tidy(settled, reference)
    depth_first(settled)
    rename_inner(settled, stem)
    return settled


def describe_kind(kind: Kind, sizes: Mapping[str, int], files: Files) -> words.SegmentKind:
    """A kind's entry in the manifest; its graphs go into `files`."""
    local = kind.local
    known = Values(graph=local.graph, sizes=kind.shards.sizes)
    inputs = zip(known.plain(local.inputs), local.inputs.values(), strict=True)
    outputs = zip(known.plain(local.outputs), local.outputs.values(), strict=True)
    first = "data" if local.first else "boundary"
    sizes = {**sizes, **kind.shards.sizes}
    return words.SegmentKind(
        name=kind.name,
        forms={form: _describe_pair(kind, form, files) for form in kind.forms},
        inputs=tuple(_port(value, flows, first) for value, flows in inputs),
        outputs=tuple(_port(value, flows, "boundary") for value, flows in outputs),
        parameters=tuple(known.plain(local.parameters)),
        masks=tuple(
            words.MaskSite(value=value, probability=local.masks[value.name])
            for value in known.of(local.masks)
        ),
        forward_flops=product_flops(local.graph, sizes),
        backward_flops=product_flops(kind.forms["portable"].backward, sizes),
        running=tuple(known.plain(local.running)),
        evaluation=None
        if kind.evaluation is None
        else files.put(kind.evaluation, f"{kind.name}.evaluation", free=local.frozen),
    )


def _describe_pair(kind: Kind, form: str, files: Files) -> words.GraphPair:
    pair, frozen = kind.forms[form], kind.local.frozen
    return words.GraphPair(
        forward=files.put(pair.forward, f"{kind.name}.forward", free=frozen),
        backward=files.put(pair.backward, f"{kind.name}.backward", free=frozen),
        stash=tuple(Values(graph=pair.forward, sizes=kind.shards.sizes).of(pair.stash)),
        parts=_describe_parts(kind, files) if form == "portable" else None,
    )


def _describe_parts(kind: Kind, files: Files) -> words.BackwardParts | None:
    halves, frozen = kind.halves, kind.local.frozen
    if halves is None:
        return None
    return words.BackwardParts(
        cotangents=files.put(halves.cotangents, f"{kind.name}.cotangents", free=frozen),
        gradients=files.put(halves.gradients, f"{kind.name}.gradients", free=frozen),
        kept=tuple(Values(graph=halves.cotangents, sizes=kind.shards.sizes).of(halves.kept)),
    )


def _port(value: words.Value, differentiable: bool, role: str) -> words.Port:
    own = {LABELS: "labels", LOSS_WEIGHT: "loss_weight", LOSS: "loss"}
    return words.Port(value=value, role=own.get(value.name, role), differentiable=differentiable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """Manifest values of a graph, shapes in symbols where they are known."""

    graph: Graph
    sizes: Mapping[str, int]
    """Of the symbols by which the segment can be sharded."""

    def of(self, names: Iterable[str]) -> list[words.Value]:
        """Values whose heads or columns have a name."""
        return [self._value(name, self._symbolic(self.graph.axes(name))) for name in names]

    def plain(self, names: Iterable[str]) -> list[words.Value]:
        """Parameters, and ports, which have to fit onto those of any neighbour."""
        return [self._value(name, tuple(map(str, self.graph.axes(name)))) for name in names]

    def _value(self, name: str, shape: tuple[str, ...]) -> words.Value:
        return words.Value(name=name, shape=shape, dtype=self.graph.types[name].dtype_name)

    def _symbolic(self, axes: tuple[Axis, ...]) -> tuple[str, ...]:
        """Name the head axis of four-axis values and the column axis of (tokens, columns)."""
        shape = [str(axis) for axis in axes]
        for symbol, rank in ((HEADS, 4), (COLUMNS, 2)):
            if len(axes) == rank and symbol in self.sizes and self.sizes[symbol] in axes:
                shape[axes.index(self.sizes[symbol])] = symbol
        return tuple(shape)
