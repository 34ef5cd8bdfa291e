"""From a model's source to a bundle in memory: canonicalise, cut, differentiate, describe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from p2ptrain import limits
from p2ptrain.bundle import manifest as words
from p2ptrain.bundle.reading import check_manifest
from p2ptrain.errors import ConfigError, GraphError
from p2ptrain.graph.adapters import Adapted, add_adapters
from p2ptrain.graph.asked import counted_cuts, named_cuts, scopes_of
from p2ptrain.graph.batch_norm import canonicalise_batch_norm
from p2ptrain.graph.canonical import MASK_PREFIX, canonicalise, evaluation_form
from p2ptrain.graph.costs import axis_size
from p2ptrain.graph.cuts import NEW, CutReport, CutRow, Piece, cut, evaluation_piece
from p2ptrain.graph.fine_tuning import Lora
from p2ptrain.graph.flow import Flow, Roles, analyse
from p2ptrain.graph.frontiers import Found, find_cuts
from p2ptrain.graph.ir import Graph, depth_first
from p2ptrain.graph.kinds import Files, Kind, Values, describe_kind, distinct_kinds
from p2ptrain.graph.local import Local, localise, readable, rename_inner, shared_path
from p2ptrain.graph.lowering.registry import lower
from p2ptrain.graph.sharding.describe import describe_sharding
from p2ptrain.graph.source import LABELS, LOSS_WEIGHT, Array, Source
from p2ptrain.graph.split import tidy
from p2ptrain.graph.update import Update, adamw, sgd
from p2ptrain.graph.weights import with_weights
from p2ptrain.ids import Digest
from p2ptrain.training.random import parameters_digest


@dataclass(slots=True, kw_only=True)
class Bundle:
    """A manifest and its files by digest, not yet written; and where the model was cut."""

    manifest: words.Manifest
    files: dict[Digest, bytes] = field(default_factory=dict)
    weights: Mapping[str, Array] = field(default_factory=dict)
    """What `weights.safetensors` is written from, by tensor name."""
    further: Mapping[str, bytes] = field(default_factory=dict)
    """Other files by name: `tokenizer.json`."""
    cuts: CutReport = field(default_factory=lambda: CutReport(rows=()))


def export(
    source: Source,
    *,
    frozen: frozenset[str] = frozenset(),
    lora: Lora | None = None,
    segments: int | None = None,
    cuts: Sequence[str] = (),
) -> Bundle:
    """Build the bundle; `check.verify` compares it with the source before anybody writes it.

    Args:
        source: The traced model; it is not changed.
        frozen: Parameters that nobody trains: constants of the graphs, without gradients.
        lora: Adapters for matrices among the frozen parameters.
        segments: About how many segments to make; None: as the graph suggests.
        cuts: Values or module paths to cut behind, and nowhere else; excludes `segments`.

    Raises:
        GraphError: the model cannot be cut, differentiated or lowered; the message names the
            value or operator, the hint says what to change.
        ConfigError: a cut or frozen parameter that the model does not have, or a target of
            adapters that cannot have one.
    """
    prepared = _prepare(source, frozen, lora)
    flow = prepared.flow
    found = _choose(flow, source, segments, cuts)
    pieces = cut(flow, found.cuts)
    locals_ = _localised(prepared, pieces)
    kinds = distinct_kinds(locals_)
    chain = _chain(locals_, kinds)
    files = Files()
    sequences = {name: size for name, size in flow.sizes.items() if name != words.BATCH}
    manifest = words.Manifest(
        name=source.name,
        task=source.task,
        description=source.description,
        symbols=_symbols(flow, kinds),
        graphs=files.listed,
        kinds={k.name: describe_kind(k, flow.sizes, files) for k in kinds.values()},
        segments=tuple(place.segment for place in chain),
        tensors=_tensors(prepared, chain),
        updates={u.name: _describe_update(u, files) for u in (adamw(), sgd())},
        inference=_inference(source, files),
        data=source.data,
        loss=source.loss,
        golden_parameters=Digest("0" * 64),
        sharding=describe_sharding(kinds.values(), sequences, files),
    )
    manifest = replace(manifest, golden_parameters=parameters_digest(manifest, 0))
    manifest = with_weights(manifest, source.weights)
    check_manifest(manifest)
    report = _report(flow, found, pieces, manifest)
    return Bundle(
        manifest=manifest,
        files=files.contents,
        weights=source.weights,
        further=source.files,
        cuts=report,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """A model ready to be cut."""

    flow: Flow
    evaluating: Graph | None
    """The model in evaluation form under the same value names, where dropout is not all."""
    probabilities: Mapping[str, float]
    """Of every dropout mask."""
    initialisers: Mapping[str, words.Initialiser]
    adapters: Mapping[str, words.Adapter]
    """By the model's name of what they adapt, with the model's names of their parts."""


def _prepare(source: Source, frozen: frozenset[str], lora: Lora | None) -> _Prepared:
    parameters = source.training.parameters
    unknown = sorted(frozen - set(parameters))
    if unknown:
        raise ConfigError(f"the model has no parameter {unknown[0]!r} to freeze")
    graph = source.training.graph.copy()
    sites = canonicalise(graph, data=source.data_inputs[0])
    trainable = tuple(name for name in parameters if name not in frozen)
    adapted = Adapted() if lora is None else add_adapters(graph, lora, among=frozen)
    evaluating = evaluation_form(graph)
    canonicalise_batch_norm(graph)
    state = [name.removeprefix(NEW) for name in graph.outputs if name.startswith(NEW)]
    late = (LABELS, LOSS_WEIGHT)
    given = {*source.data_inputs, *late, *parameters, *adapted.parameters, *state}
    fixed = [n for n in graph.inputs if n not in given and not n.startswith(MASK_PREFIX)]
    roles = Roles(
        data=source.data_inputs,
        late=late,
        trainable=(*trainable, *adapted.parameters),
        frozen=(*(name for name in parameters if name in frozen), *fixed),
        running=tuple(state),
    )
    return _Prepared(
        flow=analyse(graph, roles, _sizes(source), adapted.changes),
        evaluating=evaluating if state else None,
        probabilities={site.name: site.probability for site in sites},
        initialisers={**source.initialisers, **adapted.initialisers},
        adapters=adapted.adapters,
    )


def _sizes(source: Source) -> dict[str, int]:
    """The size of every symbol of the data inputs: of `batch` one, else as in the example."""
    sizes = {words.BATCH: 1}
    for name in source.data_inputs:
        axes = source.training.graph.inputs[name].axes
        shape = source.example[name].shape if name in source.example else (None,) * len(axes)
        for axis, size in zip(axes, shape, strict=True):
            if isinstance(axis, str):
                sizes.setdefault(axis, source.data.context if size is None else size)
    return sizes


def _choose(flow: Flow, source: Source, segments: int | None, cuts: Sequence[str]) -> Found:
    if cuts and segments is not None:
        raise ConfigError("--cut names every cut: --segments cannot be given as well")
    if cuts:
        return named_cuts(flow, cuts, scopes_of(source.training.graph.nodes))
    found = find_cuts(flow)
    if segments is not None:
        return counted_cuts(flow, found, segments)
    if len(found.cuts) >= limits.SEGMENTS_MAX:
        return counted_cuts(flow, found, limits.SEGMENTS_MAX)
    return found


def _localised(prepared: _Prepared, pieces: Sequence[Piece]) -> list[Local]:
    """Every piece under local names, called after the module whose parameters it has first."""
    seen: set[str] = set()
    found = []
    for piece in pieces:
        evaluation = None
        if prepared.evaluating is not None and piece.running:
            evaluation = evaluation_piece(prepared.flow, prepared.evaluating, piece)
        own = [name for name in piece.parameters if name not in seen]
        seen.update(own)
        last = piece is pieces[-1]
        named = readable(shared_path(own)) if not last or len(own) == len(piece.parameters) else ""
        role = named or ("head" if last else "block")
        found.append(localise(piece, prepared.probabilities, evaluation, role=role))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Placed:
    """A segment of the chain with the kind and the local graph that it came from."""

    segment: words.Segment
    kind: Kind
    local: Local
    owners: dict[str, str | None]
    """Local parameter name -> the tensor that it is a copy of."""


def _chain(locals_: Sequence[Local], kinds: Mapping[str, Kind]) -> tuple[_Placed, ...]:
    """Name the segments; a parameter read again in a later one becomes a tied copy there."""
    of = [kinds[local.fingerprint] for local in locals_]
    names = [kind.name for kind in of]
    seen: set[str] = set()
    placed = []
    for index, (local, kind) in enumerate(zip(locals_, of, strict=True)):
        many = names.count(kind.name) > 1
        name = f"{kind.name}_{names[:index].count(kind.name)}" if many else kind.name
        owners = {short: own if own in seen else None for short, own in local.parameters.items()}
        tensors = {
            short: own if owners[short] is None else f"{own}@{name}"
            for short, own in local.parameters.items()
        }
        seen.update(local.parameters.values())
        segment = words.Segment(
            name=name, kind=kind.name, parameters=tensors, running=dict(local.running)
        )
        placed.append(_Placed(segment=segment, kind=kind, local=local, owners=owners))
    return tuple(placed)


def _tensors(prepared: _Prepared, chain: Sequence[_Placed]) -> tuple[words.Tensor, ...]:
    tensors = []
    for place in chain:
        local = place.local
        for short, name in place.segment.parameters.items():
            owner = place.owners[short]
            shape = tuple(axis_size(axis, {}) for axis in local.graph.axes(short))
            tensors.append(
                words.Tensor(
                    name=name,
                    shape=shape,
                    dtype="float32",
                    binding="frozen" if short in local.frozen else "trainable",
                    initialiser=prepared.initialisers[owner or name],
                    decay=len(shape) > 1,
                    shard=place.kind.shards.groups.get(short),
                    tied_to=owner,
                    adapter=_adapter(prepared, place, owner or name),
                )
            )
        tensors += [_state(prepared, local, short) for short in local.running]
    return tuple(tensors)


def _adapter(prepared: _Prepared, place: _Placed, own: str) -> words.Adapter | None:
    """Of a tensor whose name in the model is `own`; its parts are those of the same segment."""
    adapter = prepared.adapters.get(own)
    if adapter is None:
        return None
    here = {place.local.parameters[short]: name for short, name in place.segment.parameters.items()}
    return replace(adapter, down=here[adapter.down], up=here[adapter.up])


def _state(prepared: _Prepared, local: Local, short: str) -> words.Tensor:
    name = local.running[short]
    return words.Tensor(
        name=name,
        shape=tuple(axis_size(axis, {}) for axis in local.graph.axes(short)),
        dtype="float32",
        binding="running",
        initialiser=prepared.initialisers[name],
        decay=False,
    )


def _symbols(flow: Flow, kinds: Mapping[str, Kind]) -> dict[str, words.Symbol]:
    symbols = {
        name: words.Symbol(
            size=None if name == words.BATCH else size,
            kind="batch" if name == words.BATCH else "sequence",
        )
        for name, size in flow.sizes.items()
    }
    for kind in kinds.values():
        for name, size in kind.shards.sizes.items():
            symbols[name] = words.Symbol(size=size, kind=name)
    return symbols


def _report(
    flow: Flow, found: Found, pieces: Sequence[Piece], manifest: words.Manifest
) -> CutReport:
    """What was cut and why, row by row."""
    rows = []
    reasons = (*found.reasons, "the loss ends it")
    for piece, segment, reason in zip(pieces, manifest.segments, reasons, strict=True):
        crossing = tuple(piece.leaving.values.values()) if segment != manifest.segments[-1] else ()
        kind = manifest.kinds[segment.kind]
        rows.append(
            CutRow(
                segment=segment.name,
                kind=kind.name,
                flops=kind.forward_flops,
                values=crossing,
                shapes=tuple("x".join(map(str, flow.graph.axes(name))) for name in crossing),
                bytes=flow.bytes_of(crossing),
                reason=reason,
            )
        )
    return CutReport(rows=tuple(rows), notes=found.notes)


def _describe_update(update: Update, files: Files) -> words.UpdateRule:
    return words.UpdateRule(
        graph=files.put(update.graph, update.name),
        state=update.state,
        scalars=update.scalars,
        in_place=update.in_place,
    )


def _inference(source: Source, files: Files) -> words.Inference:
    """The whole model in evaluation mode; its parameters are names without values until their
    initialisers are appended."""
    graph = source.inference.graph.copy()
    if canonicalise(graph, data=source.data_inputs[0]):
        raise GraphError("the evaluation graph still contains dropout")
    lower(graph, set())
    tidy(graph, source.data_inputs[0])
    depth_first(graph)
    rename_inner(graph, "v")
    value = Values(graph=graph, sizes={})
    inputs = [name for name in source.data_inputs if name in graph.inputs]
    # An initialiser that is an input as well may be overridden: a runtime then warns of each and
    # folds nothing.
    free = [name for name in graph.inputs if name not in inputs]
    return words.Inference(
        graph=files.put(graph, "inference", free=free),
        inputs=tuple(value.of(inputs)),
        output=value.of(graph.outputs)[0],
    )
