"""Cut a backward graph in two: the cotangents that upstream waits for, then the gradients.

The first part is the cone of the cotangents. The second makes the gradients, and reads what the
first has made; what is cheap to make again from values at hand is not kept.

Source: the cut is that of Qi et al. 2024, "Zero Bubble Pipeline Parallelism", section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from p2ptrain.graph.ir import Graph, apply_names, make
from p2ptrain.graph.local import rename_inner
from p2ptrain.graph.split import choose_stash, part


@dataclass(frozen=True, slots=True, kw_only=True)
class Halves:
    """Both parts of a backward; `kept` are outputs of the first that the second reads."""

    cotangents: Graph
    gradients: Graph
    kept: tuple[str, ...]


def halve(backward: Graph, *, gradients: Sequence[str]) -> Halves | None:
    """Cut a finished backward graph.

    Args:
        backward: With inner names as the bundle has them; it is not changed.
        gradients: Those of its outputs that are gradients of parameters; the others are
            cotangents.

    Returns:
        None where there is nothing to cut: it gives no cotangents, or no gradients.
    """
    cotangents = [name for name in backward.outputs if name not in gradients]
    if not cotangents or not gradients:
        return None
    first = part(backward, cotangents)
    made = {name for node in first.nodes for name in node.output if name}
    kept, again = choose_stash(backward, made, list(gradients))
    kept += [n for n in gradients if n in made and n not in again and n not in kept]
    second = backward.copy()
    second.nodes = [
        node
        for node in second.nodes
        if not made.intersection(node.output) or again.intersection(node.output)
    ]
    first.outputs = [*cotangents, *kept]
    for name in kept:
        second.inputs[name] = backward.types[name]
    return _named(first, second, kept, gradients)


def _named(first: Graph, second: Graph, kept: list[str], gradients: Sequence[str]) -> Halves:
    """Give kept values names that no port has, then cut the second part down to what it needs."""
    names = []
    for index, old in enumerate(kept):
        new = f"kept_{index}"
        names.append(new)
        if old in first.outputs[: len(first.outputs) - len(kept)]:
            first.nodes.append(make("Identity", [old], [new]))
            first.types[new] = first.types[old]
        else:
            apply_names(first, {old: new})
        apply_names(second, {old: new})
        if old in gradients:
            second.nodes.append(make("Identity", [new], [old]))
            second.types[old] = second.types[new]
    first.outputs = [*first.outputs[: len(first.outputs) - len(kept)], *names]
    second.outputs = list(gradients)
    second = part(second, list(gradients))
    for graph in (first, second):
        rename_inner(graph, "b")
    return Halves(cotangents=first, gradients=second, kept=tuple(names))
