"""Give a piece local, canonical names, so that identical segments have identical graphs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from p2ptrain.graph.cuts import NEW, Piece
from p2ptrain.graph.ir import Graph, apply_names, depth_first, to_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """A segment's forward graph under local names."""

    role: str
    """Readable kind name taken from the module path its parameters share."""
    graph: Graph
    inputs: dict[str, bool]
    """Port -> whether it is differentiable, boundary or data, then labels and loss weight."""
    outputs: dict[str, bool]
    """Likewise; the loss where the segment ends in it."""
    first: bool
    """Whether the ports that enter are data."""
    parameters: dict[str, str]
    """Local name -> the model's parameter name."""
    frozen: frozenset[str]
    """Those local names of parameters that nobody trains."""
    running: dict[str, str]
    """Local name -> the model's name of a running value."""
    masks: dict[str, float]
    """Local mask name -> probability."""
    evaluation: Graph | None
    """The segment as it is evaluated, where that is another function."""

    @property
    def trainable(self) -> tuple[str, ...]:
        return tuple(name for name in self.parameters if name not in self.frozen)

    @property
    def fingerprint(self) -> str:
        """Equal for segments that are the same function with the same things to differentiate."""
        model = to_model(self.graph).SerializeToString(deterministic=True)
        ports = (sorted(self.inputs.items()), sorted(self.outputs.items()), self.first)
        kept = (sorted(self.frozen), sorted(self.running), sorted(self.masks.items()))
        return hashlib.sha256(model + repr((ports, kept)).encode()).hexdigest()


def localise(
    piece: Piece, probabilities: Mapping[str, float], evaluation: Graph | None, *, role: str
) -> Local:
    """Rename everything inside the piece; ports keep their names.

    Args:
        probabilities: Of every dropout mask.
        evaluation: The piece as it is evaluated, under the model's names; None: as the forward.
        role: The kind's name.
    """
    prefix = shared_path((*piece.parameters, *piece.running))
    short = local_names((*piece.parameters, *piece.running), prefix)
    # Sorted, since the manifest is JSON with sorted keys.
    parameters = {short[name]: name for name in sorted(piece.parameters, key=short.__getitem__)}
    running = {short[name]: name for name in sorted(piece.running, key=short.__getitem__)}
    masks = {f"mask_{index}": name for index, name in enumerate(piece.masks)}
    names = {old: new for new, old in (*parameters.items(), *running.items(), *masks.items())}
    names |= {f"{NEW}{name}": f"{NEW}{local}" for local, name in running.items()}
    ports = {name: name in piece.entering.differentiable for name in piece.entering.values}
    ports |= dict.fromkeys(piece.late, False)
    order = (*ports, *parameters, *running, *masks)
    graph = _renamed(piece.graph, names, order)
    graph.outputs = [
        *piece.leaving.values,
        *(f"{NEW}{n}" for n in running if f"{NEW}{n}" in graph.outputs),
    ]
    depth_first(graph)
    rename_inner(graph, "v")
    return Local(
        role=role,
        graph=graph,
        inputs=ports,
        outputs={n: n in piece.leaving.differentiable for n in piece.leaving.values},
        first=piece.span.start == 0,
        parameters=parameters,
        frozen=frozenset(names[name] for name in piece.frozen),
        running=running,
        masks={local: probabilities[name] for local, name in masks.items()},
        evaluation=None if evaluation is None else _renamed(evaluation, names, order),
    )


def _renamed(graph: Graph, names: Mapping[str, str], order: Sequence[str]) -> Graph:
    """A copy under local names, with its inputs in this order."""
    renamed = graph.copy()
    apply_names(renamed, names)
    renamed.inputs = {name: renamed.types[name] for name in order if name in renamed.inputs}
    return renamed


def local_names(names: Sequence[str], prefix: str) -> dict[str, str]:
    """Names without the path they share. Where numbers follow it (`3.weight`, `5.weight`), they are
    counted from 0, so that equal layers of a sequence get equal names."""
    short = {name: name.removeprefix(prefix) for name in names}
    heads = {name.partition(".")[0] for name in short.values()}
    if not heads or not all(head.isdigit() for head in heads):
        return short
    ranks = {head: str(rank) for rank, head in enumerate(sorted(heads, key=int))}
    return {
        old: f"{ranks[new.partition('.')[0]]}.{new.partition('.')[2]}" for old, new in short.items()
    }


def shared_path(names: Sequence[str]) -> str:
    """The module path that all parameter names share, with its final dot."""
    if not names:
        return ""
    split = [name.split(".")[:-1] for name in names]
    shared = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "".join(f"{part}." for part in shared)


def readable(prefix: str) -> str:
    """Last part of a module path that is not a number."""
    words = [part for part in prefix.split(".") if part and not part.isdigit()]
    return words[-1] if words else ""


def rename_inner(graph: Graph, stem: str) -> None:
    """Number inner values and constants in their order; strip what is not the function."""
    kept = set(graph.inputs) | set(graph.outputs) | {""}
    names: dict[str, str] = {}
    for node in graph.nodes:
        for name in (*node.input, *node.output):
            if name in kept or name in names:
                continue
            family = f"{stem}c" if name in graph.constants else stem
            names[name] = f"{family}{len(names)}"
        _strip(node)
    apply_names(graph, names)
    _name_parallel_slices(graph)
    alive = kept | set(names.values())
    graph.types = {n: t for n, t in graph.types.items() if n in alive}
    graph.constants = {n: graph.constants[n] for n in names.values() if n in graph.constants}


def _name_parallel_slices(graph: Graph) -> None:
    """Name nodes that take several parts of one value: onnxruntime 1.19 fuses them into a Split
    called after them, and refuses two fused nodes of the same name."""
    for readers in graph.readers().values():
        parts = [node for node in readers if node.op_type in ("Slice", "Gather")]
        for node in parts if len(parts) > 1 else ():
            node.name = node.output[0]


def _strip(node: onnx.NodeProto) -> None:
    node.name = node.doc_string = ""
    del node.metadata_props[:]
    ordered = sorted(node.attribute, key=lambda a: str(a.name))
    for entry in ordered:
        entry.doc_string = ""
    del node.attribute[:]
    node.attribute.extend(ordered)
