"""Split a gradient graph into forward, backward and the stash between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import onnx

from p2ptrain.graph.decompositions import decompose
from p2ptrain.graph.ir import Graph, apply_names, attribute, depth_first, make
from p2ptrain.graph.local import rename_inner
from p2ptrain.graph.lowering.registry import lower
from p2ptrain.graph.views import drop_identities, rewrite_views, share_equal_nodes
from p2ptrain.graph.vjp import build_gradient, cotangent

ALIASES: Final = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"})
SHAPE_ONLY: Final = frozenset({"Shape", "Concat", "Range", "ConstantOfShape", "Cast", "Greater"})
CHEAP: Final = frozenset({"Mul", "Add", "Sub", "Transpose", "Neg"})
"""Worth doing again in the backward when all they read is at hand anyway."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Forward and backward of one segment in one form; `stash` are forward outputs."""

    forward: Graph
    backward: Graph
    stash: tuple[str, ...]


def differentiate(
    forward: Graph, *, wanted: dict[str, str], reference: str, portable: bool
) -> Pair:
    """Build one form of a segment.

    Args:
        forward: The localised forward graph; its outputs are the segment's ports.
        wanted: Differentiable input or parameter -> name of the backward's output for it.
        reference: The data or boundary input, whose leading axes are (batch, sequence).
        portable: Lower everything to standard operators; otherwise leave the builder's kernels.

    Raises:
        GraphError: no gradient, or no lowering rule, for an operator.
    """
    forward = forward.copy()
    decompose(forward)
    rewrite_views(forward, reference)
    drop_identities(forward)
    whole = build_gradient(forward, wanted=list(wanted))
    made = {name for node in forward.nodes for name in node.output if name}
    apply_names(whole, {f"{name}_grad": output for name, output in wanted.items()})
    lower(whole, made, portable=portable)
    tidy(whole, reference)
    incoming = {cotangent(name) for name in forward.outputs}
    return split(whole, made=made, forward_outputs=list(forward.outputs), incoming=incoming)


def tidy(graph: Graph, reference: str) -> None:
    """Compose views and transposes, fold scales into Gemm, share what is equal."""
    drop_identities(graph)
    rewrite_views(graph, reference)
    compose_transposes(graph)
    fold_scales(graph)
    share_equal_nodes(graph)
    drop_identities(graph)
    graph.prune()
    graph.sort()


def compose_transposes(graph: Graph) -> None:
    """Transpose after Transpose becomes one, or nothing."""
    producers = graph.producers()
    for index, node in enumerate(graph.nodes):
        below = producers.get(node.input[0]) if node.op_type == "Transpose" else None
        if below is None or below.op_type != "Transpose":
            continue
        first, second = attribute(below, "perm"), attribute(node, "perm")
        order = [first[axis] for axis in second]
        replacement = onnx.NodeProto()
        if order == sorted(order):
            replacement.CopyFrom(onnx.helper.make_node("Identity", [below.input[0]], node.output))
        else:
            replacement.CopyFrom(
                onnx.helper.make_node("Transpose", [below.input[0]], node.output, perm=order)
            )
        graph.nodes[index] = replacement
        producers[node.output[0]] = replacement
    drop_identities(graph)
    graph.prune()


def fold_scales(graph: Graph) -> None:
    """Scalar factors before and after a Gemm become its alpha and beta."""
    for index, node in enumerate(graph.nodes):
        factor = _constant_factor(graph, node)
        if factor is None:
            continue
        producers, readers = graph.producers(), graph.readers()
        source, target = node.input[0], node.output[0]
        gemm = producers.get(source)
        following = readers.get(target, [])
        alone = len(readers[source]) == 1 and source not in graph.outputs
        if gemm is not None and gemm.op_type == "Gemm" and alone:
            graph.nodes[index] = _scaled(gemm, factor, list(gemm.input), target, bias=True)
        elif following and target not in graph.outputs and all(map(_is_gemm(target), following)):
            for reader in following:
                inputs = [source if name == target else name for name in reader.input]
                scaled = _scaled(reader, factor, inputs, reader.output[0], bias=False)
                graph.nodes[graph.nodes.index(reader)] = scaled
    graph.prune()


def _constant_factor(graph: Graph, node: onnx.NodeProto) -> float | None:
    factor = graph.constants.get(node.input[1]) if node.op_type == "Mul" else None
    return float(factor.item()) if factor is not None and factor.size == 1 else None


def _is_gemm(name: str) -> Callable[[onnx.NodeProto], bool]:
    """Whether a node is a Gemm that reads `name` as one of its two factors, and nowhere else."""
    return lambda node: (
        node.op_type == "Gemm"
        and list(node.input).index(name) < 2
        and (list(node.input).count(name) == 1)
    )


def _scaled(
    gemm: onnx.NodeProto, factor: float, inputs: list[str], output: str, *, bias: bool
) -> onnx.NodeProto:
    settings = {name: attribute(gemm, name, 0) for name in ("transA", "transB")}
    beta = float(attribute(gemm, "beta", 1.0)) * (factor if bias else 1.0)
    alpha = float(attribute(gemm, "alpha", 1.0)) * factor
    scaled: onnx.NodeProto = make("Gemm", inputs, [output], alpha=alpha, beta=beta, **settings)
    return scaled


def split(whole: Graph, *, made: set[str], forward_outputs: list[str], incoming: set[str]) -> Pair:
    """Cut a graph whose outputs are the ports, then the gradients.

    Args:
        made: Names of the values that belong to the forward pass.
        forward_outputs: The ports.
        incoming: Inputs that only the backward has.
    """
    gradients = [name for name in whole.outputs if name not in forward_outputs]
    stash, again = choose_stash(whole, made, gradients)
    ports = [name for name in stash if name in forward_outputs]  # kept anyway, as what leaves
    stash = [name for name in stash if name not in ports]
    forward = part(whole, [*forward_outputs, *stash])
    forward.inputs = {n: t for n, t in whole.inputs.items() if n not in incoming}
    backward = whole.copy()
    for name in (*ports, *stash):
        backward.inputs[name] = whole.types[name]
    backward.nodes = [
        n for n in backward.nodes if not made.intersection(n.output) or again.intersection(n.output)
    ]
    backward = part(backward, gradients)
    stash = [name for name in stash if name in backward.inputs]
    stash = [_kept_port(forward, backward, n) if n in forward_outputs else n for n in stash]
    forward.outputs = [*forward_outputs, *stash]
    return Pair(forward=forward, backward=backward, stash=tuple(stash))


def _kept_port(forward: Graph, backward: Graph, name: str) -> str:
    """A stash value of its own for a port that the backward reads as well: tanh's result."""
    kept = forward.fresh("kept")
    forward.nodes.append(make("Identity", [name], [kept]))
    forward.types[kept] = forward.types[name]
    apply_names(backward, {name: kept})
    return kept


def choose_stash(whole: Graph, made: set[str], gradients: list[str]) -> tuple[list[str], set[str]]:
    """What one part of a graph reads from the part before it, and what of that it makes again.

    Args:
        whole: Both parts.
        made: Values of the first part.
        gradients: Outputs of the second.
    """
    forward_nodes = [node for node in whole.nodes if made.intersection(node.output)]
    free = set(whole.inputs) | set(whole.constants) | {""}
    needed = part(whole, gradients)
    stash = {
        name
        for node in needed.nodes
        if not made.intersection(node.output)
        for name in node.input
        if name in made
    }
    again: set[str] = set()
    changed = True
    while changed:
        changed = False
        for node in reversed(forward_nodes):
            if not stash.intersection(node.output):
                continue
            if not _again(node, stash | again, free) and not _of_weights(whole, node, free):
                continue
            stash.difference_update(node.output)
            again.update(node.output)
            stash.update(n for n in node.input if n in made and n not in again)
            changed = True
    order = [name for node in forward_nodes for name in node.output]
    return sorted(stash, key=order.index), again


def _again(node: onnx.NodeProto, known: set[str], free: set[str]) -> bool:
    """Whether the backward makes this forward node again rather than keep its result."""
    if node.op_type in ALIASES or node.op_type in SHAPE_ONLY:
        return True
    return node.op_type in CHEAP and all(name in known or name in free for name in node.input)


def _of_weights(whole: Graph, node: onnx.NodeProto, free: set[str]) -> bool:
    """Whether a product reads parameters and constants alone, and some data would be less to keep:
    the matrix of a plane, which a stash would hold once for every microbatch."""
    if node.op_type != "MatMul":
        return False
    fixed = (isinstance(axis, int) for axis in whole.axes(node.output[0]))
    return all(fixed) and all(_made_of(whole, name, free) for name in node.input)


def _made_of(whole: Graph, name: str, free: set[str]) -> bool:
    """Whether a value is one of these, or a view of one."""
    while name not in free:
        producer = whole.producers().get(name)
        if producer is None or producer.op_type not in ALIASES:
            return False
        name = producer.input[0]
    return True


def part(whole: Graph, outputs: list[str]) -> Graph:
    """What `outputs` need, with only the inputs that are read, in canonical order."""
    cone = whole.copy()
    cone.outputs = list(outputs)
    cone.prune()
    read = {name for node in cone.nodes for name in node.input}
    cone.inputs = {n: t for n, t in cone.inputs.items() if n in read}
    depth_first(cone)
    return cone


def name_stash(pair: Pair) -> Pair:
    """Canonical inner names on both sides; stash values are `stash_0`, `stash_1`, ..."""
    names = {old: f"stash_{index}" for index, old in enumerate(pair.stash)}
    for graph in (pair.forward, pair.backward):
        apply_names(graph, names)
    rename_inner(pair.forward, "f")
    rename_inner(pair.backward, "b")
    return Pair(
        forward=pair.forward, backward=pair.backward, stash=tuple(names[n] for n in pair.stash)
    )
