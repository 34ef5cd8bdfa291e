"""Give matrices of a canonical forward graph low-rank adapters, beside the frozen matrix itself.

y = x W^T + b becomes y = x W^T + b + scale * (x down^T) up^T. The change has its own two small
products, so that a backward never makes the gradient of W.

Source: LoRA, Hu et al. 2021, section 4.1. `up` starts as zeros, so that the model begins as it
was; `down` is uniform, as in the authors' own code (Kaiming with a = sqrt 5: bound 1 / sqrt(in)).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import onnx

from p2ptrain.bundle.manifest import Adapter, Initialiser
from p2ptrain.errors import ConfigError
from p2ptrain.graph.fine_tuning import ALL_TARGETS, Lora
from p2ptrain.graph.flow import Change
from p2ptrain.graph.ir import FLOAT, Graph, Type, attribute, make
from p2ptrain.graph.name_patterns import chosen

DOWN: Final = "lora_down"
UP: Final = "lora_up"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapted:
    """The adapters of a graph by the matrix that they adapt, and how their parts are drawn."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    initialisers: dict[str, Initialiser] = field(default_factory=dict)
    changes: tuple[Change, ...] = ()
    """What each linear that reads such a matrix became."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """The new trainable parameters, in the graph's order."""
        return tuple(self.initialisers)


def add_adapters(graph: Graph, lora: Lora, *, among: Collection[str]) -> Adapted:
    """Put adapters beside the chosen matrices of a canonical graph, in place.

    Args:
        among: Parameters that may get one: those that are frozen.

    Raises:
        ConfigError: a target is no matrix of a linear, or is read elsewhere as well (an embedding
            tied to the head); or the targets have no matrix at all.
    """
    targets = _targets(graph, [name for name in graph.inputs if name in among], lora)
    adapters: dict[str, Adapter] = {}
    initialisers: dict[str, Initialiser] = {}
    changes: list[Change] = []
    readers = graph.readers()
    for weight in targets:
        stem = weight.removesuffix(".weight")
        transposed = not attribute(readers[weight][0], "transB", 0)
        adapter = Adapter(
            down=f"{stem}.{DOWN}", up=f"{stem}.{UP}", scale=lora.scale, transposed=transposed
        )
        _add_inputs(graph, weight, adapter, lora.rank)
        changes += [_add_change(graph, gemm, adapter, lora.rank) for gemm in readers[weight]]
        bound = 1.0 / math.sqrt(_width_in(graph, adapter))
        adapters[weight] = adapter
        initialisers[adapter.down] = Initialiser(kind="uniform", scale=round(bound, 9))
        initialisers[adapter.up] = Initialiser(kind="zeros")
    return Adapted(adapters=adapters, initialisers=initialisers, changes=tuple(changes))


def without_adapters(graph: Graph) -> Graph:
    """A copy of the graph as it would be without the changes that adapters add."""
    plain = graph.copy()
    adapted = {name for name in graph.inputs if name.rpartition(".")[2] in (DOWN, UP)}
    producers = plain.producers()
    for node in graph.nodes:
        if node.op_type != "Add":
            continue
        base, change = node.input
        made_by = producers.get(change)
        if made_by is not None and made_by.op_type == "Gemm" and made_by.input[1] in adapted:
            plain.rename(node.output[0], base)
    plain.prune()
    plain.inputs = {name: kind for name, kind in plain.inputs.items() if name not in adapted}
    return plain


def _targets(graph: Graph, frozen: Sequence[str], lora: Lora) -> tuple[str, ...]:
    if lora.targets == ALL_TARGETS:
        found = tuple(name for name in frozen if _obstacle(graph, name) is None)
        if not found:
            raise ConfigError("--lora: the model has no linear whose matrix could be adapted")
        return found
    named = chosen(frozen, lora.targets, option="--lora targets")
    matrices = [name for name in named if len(graph.axes(name)) == 2]
    if not matrices:
        raise ConfigError(
            f"--lora: {named[0]!r} is no matrix", hint="name weights of linears, or targets=all"
        )
    for name in matrices:
        obstacle = _obstacle(graph, name)
        if obstacle is not None:
            raise ConfigError(
                f"--lora: {name!r} {obstacle}",
                hint="only matrices of linears can be adapted; name others, or targets=all",
            )
    return tuple(matrices)


def _obstacle(graph: Graph, name: str) -> str | None:
    """Why a parameter cannot be adapted; None: it can."""
    if len(graph.axes(name)) != 2:
        return "is no matrix"
    readers = graph.readers().get(name, [])
    if not readers:
        return "is read by nothing"
    others = sorted({str(node.op_type) for node in readers if not _is_linear(node, name)})
    if others and len(others) < len({str(node.op_type) for node in readers}):
        return f"is tied: {others[0]} reads it as well as a linear"
    if others:
        return f"is read by {others[0]}, not by a linear"
    layouts = {int(attribute(node, "transB", 0)) for node in readers}
    return None if len(layouts) == 1 else "is read both as it is and transposed"


def _is_linear(node: onnx.NodeProto, weight: str) -> bool:
    """Whether the node is x W + b, or x W^T + b, over this matrix and nothing else."""
    plain = attribute(node, "transA", 0) == 0 and attribute(node, "alpha", 1.0) == 1.0
    places = [index for index, name in enumerate(node.input) if name == weight]
    return node.op_type == "Gemm" and plain and places == [1]


def _add_inputs(graph: Graph, weight: str, adapter: Adapter, rank: int) -> None:
    rows, columns = graph.axes(weight)
    width_out, width_in = (columns, rows) if adapter.transposed else (rows, columns)
    for name, axes in ((adapter.down, (rank, width_in)), (adapter.up, (width_out, rank))):
        if name in graph.types:
            raise ConfigError(f"--lora: the model already has a value {name!r}")
        graph.inputs[name] = graph.types[name] = Type(dtype=FLOAT, axes=axes)


def _width_in(graph: Graph, adapter: Adapter) -> int:
    width = graph.axes(adapter.down)[1]
    if not isinstance(width, int):
        raise ConfigError(f"--lora: the width {width!r} of {adapter.down!r} is not fixed")
    return width


def _add_change(graph: Graph, gemm: onnx.NodeProto, adapter: Adapter, rank: int) -> Change:
    """Let the linear's result be its own and the adapter's change."""
    source, result = gemm.input[0], gemm.output[0]
    tokens, width = graph.axes(result)
    own, low, scaled, change = (graph.fresh(stem) for stem in ("own", "low", "scaled", "change"))
    for name, columns in ((own, width), (low, rank), (scaled, rank), (change, width)):
        graph.types[name] = Type(dtype=FLOAT, axes=(tokens, columns))
    scale = graph.constant(np.array(adapter.scale, np.float32), "scale")
    gemm.output[0] = own
    at = graph.nodes.index(gemm) + 1
    graph.nodes[at:at] = [
        make("Gemm", [source, adapter.down], [low], transB=1),
        make("Mul", [low, scale], [scaled]),
        make("Gemm", [scaled, adapter.up], [change], transB=1),
        make("Add", [own, change], [result]),
    ]
    return Change(own=own, added=(low, scaled, change))
