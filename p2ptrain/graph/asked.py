"""Cuts that a person asks for: by name, or by their number."""

from __future__ import annotations

import ast
import difflib
import itertools
from collections.abc import Mapping, Sequence
from typing import Final

import onnx

from p2ptrain.errors import ConfigError, GraphError
from p2ptrain.graph.costs import PRODUCTS
from p2ptrain.graph.flow import Flow
from p2ptrain.graph.frontiers import Found, allowed

SCOPES: Final = "pkg.torch.onnx.name_scopes"
"""Where torch's exporter writes a node's module path: the paths of all modules around it."""


def scopes_of(nodes: Sequence[onnx.NodeProto]) -> dict[str, str]:
    """Value -> path of the innermost module that made it, where torch said so."""
    return {name: path for node in nodes if (path := _scope(node)) for name in node.output}


def _scope(node: onnx.NodeProto) -> str:
    for entry in node.metadata_props:
        if entry.key == SCOPES:
            path = ast.literal_eval(entry.value)
            return str(path[-2]) if len(path) > 1 else ""
    return ""


def named_cuts(flow: Flow, names: Sequence[str], scopes: Mapping[str, str]) -> Found:
    """Exactly the cuts that were asked for.

    Args:
        names: Values of the graph, or module paths: the cut lies behind the module's last node.
        scopes: Value -> module path, of the traced graph.

    Raises:
        ConfigError: a name that is neither; or a place where no cut is possible.
    """
    possible = set(allowed(flow))
    places: dict[int, str] = {}
    for name in names:
        position = _position(flow, name, scopes)
        if position not in possible:
            raise ConfigError(
                f"--cut {name!r}: nothing can be cut there",
                hint="cut before the loss and behind the first parameter, where something crosses",
            )
        places.setdefault(position, name)
    cuts = tuple(sorted(places))
    return Found(cuts=cuts, reasons=tuple(f"asked for as {places[cut]!r}" for cut in cuts))


def _position(flow: Flow, name: str, scopes: Mapping[str, str]) -> int:
    inside = f"{name}."
    found = None
    for position, node in enumerate(flow.order):
        if name in node.output:
            return position
        paths = {_scope(node), *(scopes[value] for value in node.output if value in scopes)}
        paths |= {path.partition(".")[2] for path in paths}  # without the exporter's own module
        read = flow.parameters[position]
        if any(f"{path}.".startswith(inside) for path in (*paths, *read)):
            found = position
    if found is not None:
        return found
    known = sorted({*scopes.values(), *flow.main})
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    raise ConfigError(
        f"--cut {name!r} is neither a value of the graph nor a module of the model",
        hint=f"perhaps one of: {', '.join(near)}" if near else "give a module path of the model",
    )


def counted_cuts(flow: Flow, found: Found, count: int) -> Found:
    """About `count` segments of even work, along the default cuts while these are enough.

    More segments than the default has are cut out of every place where a cut is possible, with a
    product in each. The largest segment is as small as it can be; among such cuts the fewest
    bytes cross.

    Raises:
        GraphError: the model has no place to cut at.
    """
    if count < 1:
        raise ConfigError(f"--segments {count}: a model has at least one segment")
    places = list(found.cuts)
    if count - 1 > len(places):
        places = _fine(flow, places)
    if count > 1 and not places:
        raise GraphError("the model has no place where it can be cut")
    wanted = min(count - 1, len(places))
    cuts = _balanced(flow, places, wanted)
    reason = f"even work in {wanted + 1} segments"
    return Found(cuts=cuts, reasons=(reason,) * len(cuts), notes=found.notes)


def _fine(flow: Flow, places: list[int]) -> list[int]:
    """The default cuts, and between each two products the place that fewest bytes cross."""
    possible = allowed(flow)
    fine = set(places)
    products = [p for p, node in enumerate(flow.order) if node.op_type in PRODUCTS]
    for left, right in itertools.pairwise(products):
        between = [p for p in possible if left <= p < right]
        if between and not fine.intersection(between):
            fine.add(min(between, key=lambda p: (flow.bytes_of(flow.alive[p]), -p)))
    return sorted(fine)


def _balanced(flow: Flow, places: list[int], wanted: int) -> tuple[int, ...]:
    """Choose cuts so that (largest segment, bytes crossing) is least, by dynamic programming.

    Best of the first `i` places with `k` cuts, the last one at place i.
    """
    ends = [place + 1 for place in places] + [len(flow.order)]
    work = [flow.flops(0, end) for end in ends]
    crossing = [flow.bytes_of(flow.alive[place]) for place in places] + [0]
    best: list[tuple[int, int, tuple[int, ...]]] = [
        (work[i], crossing[i], (i,)) for i in range(len(ends))
    ]
    for _ in range(wanted):
        best = [
            min(
                (
                    (max(most, work[i] - work[j]), bytes_ + crossing[i], (*chosen, i))
                    for j, (most, bytes_, chosen) in enumerate(best[:i])
                    if len(chosen) > 0
                ),
                default=(work[-1] + 1, 0, ()),
            )
            for i in range(len(ends))
        ]
    return tuple(places[i] for i in best[-1][2][:-1])
