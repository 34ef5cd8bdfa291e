"""Give a piece local, canonical names, so that identical segments have identical graphs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from p2ptrain.graph.canonical import DropoutSite
from p2ptrain.graph.cuts import Piece
from p2ptrain.graph.ir import Graph, depth_first, to_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """A segment's forward graph under local names."""

    role: str
    """Readable kind name taken from the module path its parameters share."""
    graph: Graph
    parameters: dict[str, str]
    """Local name -> the model's parameter name."""
    masks: dict[str, float]
    """Local mask name -> probability."""

    @property
    def fingerprint(self) -> str:
        """Equal for segments that are the same function."""
        model = to_model(self.graph).SerializeToString(deterministic=True)
        return hashlib.sha256(model + repr(sorted(self.masks.items())).encode()).hexdigest()


def localise(piece: Piece, sites: Sequence[DropoutSite], *, role: str) -> Local:
    """Rename everything inside the piece; ports keep their names."""
    prefix = shared_path(piece.parameters)
    # Sorted, since the manifest is JSON with sorted keys.
    parameters = {name.removeprefix(prefix): name for name in sorted(piece.parameters)}
    probabilities = {site.name: site.probability for site in sites}
    masks = {f"mask_{index}": name for index, name in enumerate(piece.masks)}
    names = {old: new for new, old in (*parameters.items(), *masks.items())}
    graph = piece.graph.copy()
    apply_names(graph, names)
    order = [n for n in graph.inputs if n not in parameters and n not in masks]
    graph.inputs = {n: graph.types[n] for n in (*order, *parameters, *masks)}
    depth_first(graph)
    rename_inner(graph, "v")
    return Local(
        role=readable(prefix) or role,
        graph=graph,
        parameters=parameters,
        masks={local: probabilities[name] for local, name in masks.items()},
    )


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


def apply_names(graph: Graph, names: Mapping[str, str]) -> None:
    """Rename values everywhere: inputs, nodes, constants, outputs, types."""

    def new(name: str) -> str:
        return names.get(name, name)

    for node in graph.nodes:
        node.input[:] = [new(name) for name in node.input]
        node.output[:] = [new(name) for name in node.output]
    graph.inputs = {new(n): t for n, t in graph.inputs.items()}
    graph.constants = {new(n): v for n, v in graph.constants.items()}
    graph.outputs = [new(name) for name in graph.outputs]
    graph.types = {new(n): t for n, t in graph.types.items()}


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
    alive = kept | set(names.values())
    graph.types = {n: t for n, t in graph.types.items() if n in alive}
    graph.constants = {n: graph.constants[n] for n in names.values() if n in graph.constants}


def _strip(node: onnx.NodeProto) -> None:
    node.name = node.doc_string = ""
    del node.metadata_props[:]
    ordered = sorted(node.attribute, key=lambda a: str(a.name))
    for entry in ordered:
        entry.doc_string = ""
    del node.attribute[:]
    node.attribute.extend(ordered)
