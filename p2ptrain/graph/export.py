"""From a source to a bundle in memory: canonicalise, cut, differentiate, describe."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from numpy.typing import NDArray

from p2ptrain.bundle import manifest as words
from p2ptrain.errors import GraphError
from p2ptrain.graph.canonical import canonicalise
from p2ptrain.graph.costs import Shards, axis_size, find_shards, product_flops
from p2ptrain.graph.cuts import PORT_IN, PORT_OUT, cut
from p2ptrain.graph.ir import IR_VERSION, OPSET, Axis, Graph, depth_first, to_model
from p2ptrain.graph.local import Local, localise, rename_inner
from p2ptrain.graph.lowering.registry import lower
from p2ptrain.graph.source import LABELS, LOGITS, LOSS, LOSS_WEIGHT, Source
from p2ptrain.graph.split import Pair, differentiate, name_stash, tidy
from p2ptrain.graph.update import Update, adamw, sgd
from p2ptrain.graph.weights import with_weights
from p2ptrain.ids import Digest
from p2ptrain.training.random import parameters_digest

_ROLES = {LABELS: "labels", LOSS_WEIGHT: "loss_weight", LOSS: "loss"}


@dataclass(slots=True, kw_only=True)
class Bundle:
    """A manifest and its files by digest, not yet written."""

    manifest: words.Manifest
    files: dict[Digest, bytes] = field(default_factory=dict)
    weights: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """What `weights.safetensors` is written from, by tensor name. (Any: every dtype.)"""
    further: Mapping[str, bytes] = field(default_factory=dict)
    """Other files by name: `tokenizer.json`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    name: str
    local: Local
    forms: dict[str, Pair]
    shards: Shards


def export(source: Source) -> Bundle:
    """Build the bundle; `check.verify` compares it with its reference before anybody writes it.

    Raises:
        GraphError: the model cannot be cut, differentiated or lowered; the message
            names the value or operator, the hint says what to change.
    """
    (data,) = source.data_inputs
    traced = source.training
    graph = traced.graph.copy()
    sites = canonicalise(graph, data=data)
    pieces = cut(graph, data=data, parameters=traced.parameters)
    locals_ = [
        localise(piece, sites, role="head" if index == len(pieces) - 1 else "block")
        for index, piece in enumerate(pieces)
    ]
    kinds = _kinds(locals_)
    files: dict[Digest, bytes] = {}
    listed: dict[str, words.GraphFile] = {}

    def put(graph: Graph, name: str) -> Digest:
        content = to_model(graph, name=name).SerializeToString(deterministic=True)
        digest = Digest(hashlib.sha256(content).hexdigest())
        files[digest] = content
        listed[digest] = words.GraphFile(
            bytes=len(content), opset=OPSET, ir=IR_VERSION, dtype="float32"
        )
        return digest

    symbols = _symbols(kinds, source.data.context)
    described = {k.name: _describe(k, symbols, data, put) for k in kinds.values()}
    inference = _inference(source, data, put)
    bundle = words.Manifest(
        name=source.name,
        task=source.task,
        description=source.description,
        symbols=symbols,
        graphs=listed,
        kinds=described,
        segments=_segments(locals_, kinds),
        tensors=_tensors(source, locals_, kinds),
        updates={u.name: _describe_update(u, put) for u in (adamw(), sgd())},
        inference=inference,
        data=source.data,
        loss=source.loss,
        golden_parameters=Digest("0" * 64),
    )
    bundle = replace(bundle, golden_parameters=parameters_digest(bundle, 0))
    words.check_manifest(bundle)
    manifest = with_weights(bundle, source.weights)
    return Bundle(manifest=manifest, files=files, weights=source.weights, further=source.files)


def _kinds(locals_: list[Local]) -> dict[str, _Kind]:
    """One kind per distinct segment, by fingerprint, with a readable unique name."""
    kinds: dict[str, _Kind] = {}
    taken: dict[str, int] = {}
    for local in locals_:
        if local.fingerprint in kinds:
            continue
        count = taken[local.role] = taken.get(local.role, 0) + 1
        name = local.role if count == 1 else f"{local.role}_kind{count}"
        kinds[local.fingerprint] = _Kind(
            name=name,
            local=local,
            forms={form: _pair(local, portable=form == "portable") for form in words.FORMS},
            shards=find_shards(local.graph),
        )
    return kinds


def _pair(local: Local, *, portable: bool) -> Pair:
    wanted = {name: f"gradient.{name}" for name in local.parameters}
    if PORT_IN in local.graph.inputs:
        wanted = {PORT_IN: f"cotangent.{PORT_IN}", **wanted}
    reference = next(iter(local.graph.inputs))
    pair = differentiate(local.graph, wanted=wanted, reference=reference, portable=portable)
    return name_stash(pair)


def _segments(locals_: list[Local], kinds: Mapping[str, _Kind]) -> tuple[words.Segment, ...]:
    names = [kinds[local.fingerprint].name for local in locals_]
    segments = []
    for index, (local, kind) in enumerate(zip(locals_, names, strict=True)):
        ordinal = names[:index].count(kind)
        name = f"{kind}_{ordinal}" if names.count(kind) > 1 else kind
        segments.append(words.Segment(name=name, kind=kind, parameters=dict(local.parameters)))
    return tuple(segments)


def _symbols(kinds: Mapping[str, _Kind], context: int) -> dict[str, words.Symbol]:
    symbols = {
        words.BATCH: words.Symbol(size=None, kind="batch"),
        "sequence": words.Symbol(size=context, kind="sequence"),
    }
    for kind in kinds.values():
        for name, size in kind.shards.sizes.items():
            known = symbols.setdefault(name, words.Symbol(size=size, kind=name))
            if known.size != size:
                raise GraphError(f"two segments have different numbers of {name}")
    return symbols


def _describe(
    kind: _Kind, symbols: Mapping[str, words.Symbol], data: str, put: Any
) -> words.SegmentKind:
    """A kind's entry. (Any: the closure that stores a graph.)"""
    graph = kind.local.graph
    sizes = {n: s.size if s.size is not None else 1 for n, s in symbols.items()}
    ports = [n for n in graph.inputs if n not in kind.local.parameters]
    value = _Values(graph=graph, sizes=kind.shards.sizes)
    forms = {
        form: words.GraphPair(
            forward=put(pair.forward, f"{kind.name}.forward"),
            backward=put(pair.backward, f"{kind.name}.backward"),
            stash=tuple(_Values(graph=pair.forward, sizes=kind.shards.sizes).of(pair.stash)),
        )
        for form, pair in kind.forms.items()
    }
    return words.SegmentKind(
        name=kind.name,
        forms=forms,
        inputs=tuple(
            _port(v, data) for v in value.of(n for n in ports if n not in kind.local.masks)
        ),
        outputs=tuple(_port(v, data) for v in value.of(graph.outputs)),
        parameters=tuple(value.plain(kind.local.parameters)),
        masks=tuple(
            words.MaskSite(value=v, probability=kind.local.masks[v.name])
            for v in value.of(kind.local.masks)
        ),
        forward_flops=product_flops(graph, sizes),
        backward_flops=product_flops(kind.forms["portable"].backward, sizes),
    )


def _port(value: words.Value, data: str) -> words.Port:
    differentiable = value.name in (PORT_IN, PORT_OUT, LOSS)
    role = "data" if value.name == data else _ROLES.get(value.name, "boundary")
    return words.Port(value=value, role=role, differentiable=differentiable)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Values:
    """Manifest values of a graph, shapes in symbols where they are known."""

    graph: Graph
    sizes: Mapping[str, int]

    def of(self, names: Any) -> list[words.Value]:  # Any: any iterable of names
        return [self._value(name, self._symbolic(self.graph.axes(name))) for name in names]

    def plain(self, names: Any) -> list[words.Value]:  # Any: as above
        return [self._value(name, tuple(map(str, self.graph.axes(name)))) for name in names]

    def _value(self, name: str, shape: tuple[str, ...]) -> words.Value:
        return words.Value(name=name, shape=shape, dtype=self.graph.types[name].dtype_name)

    def _symbolic(self, axes: tuple[Axis, ...]) -> tuple[str, ...]:
        """Name the head axis of four-axis values and the column axis of (tokens, columns)."""
        shape = [str(axis) for axis in axes]
        for symbol, rank in (("heads", 4), ("columns", 2)):
            if symbol in self.sizes and len(axes) == rank and self.sizes[symbol] in axes:
                shape[axes.index(self.sizes[symbol])] = symbol
        return tuple(shape)


def _tensors(
    source: Source, locals_: list[Local], kinds: Mapping[str, _Kind]
) -> tuple[words.Tensor, ...]:
    tensors = []
    for local in locals_:
        groups = kinds[local.fingerprint].shards.groups
        for short, name in local.parameters.items():
            shape = tuple(axis_size(a, {}) for a in local.graph.axes(short))
            tensors.append(
                words.Tensor(
                    name=name,
                    shape=shape,
                    dtype="float32",
                    binding="trainable",
                    initialiser=source.initialisers[name],
                    decay=len(shape) > 1,
                    shard=groups.get(short),
                )
            )
    return tuple(tensors)


def _describe_update(update: Update, put: Any) -> words.UpdateRule:
    """An update's entry. (Any: the closure that stores a graph.)"""
    return words.UpdateRule(
        graph=put(update.graph, update.name),
        state=update.state,
        scalars=update.scalars,
        in_place=update.in_place,
    )


def _inference(source: Source, data: str, put: Any) -> words.Inference:
    """The whole model in evaluation mode; its parameters are names without values until their
    initialisers are appended. (Any: as above.)"""
    graph = source.inference.graph.copy()
    if canonicalise(graph, data=data):
        raise GraphError("the evaluation graph still contains dropout")
    lower(graph, set())
    tidy(graph, data)
    depth_first(graph)
    rename_inner(graph, "v")
    value = _Values(graph=graph, sizes={})
    entry, logits = value.of([data, LOGITS])
    # An initialiser that is an input as well may be overridden: a runtime then warns of each and
    # folds nothing.
    graph.inputs = {data: graph.inputs[data]}
    return words.Inference(graph=put(graph, "inference"), inputs=(entry,), output=logits)
