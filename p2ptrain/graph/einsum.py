"""Einsum of two operands as one batched matrix product."""

from __future__ import annotations

import onnx

from p2ptrain.errors import GraphError
from p2ptrain.graph.ir import Axis, attribute
from p2ptrain.graph.lowering.registry import Emitter
from p2ptrain.graph.views import product


def einsum(emit: Emitter, node: onnx.NodeProto) -> None:
    """Letters in both operands and the result are batch, in both only are summed.

    Each operand becomes (batch, own, summed) or (batch, summed, own); the result's letters are
    put into order at the end. A letter of one operand that the result lacks is summed first.

    Raises:
        GraphError: other than two operands, an ellipsis, or a letter twice in one operand.
    """
    equation = attribute(node, "equation").decode().replace(" ", "")
    given, _, wanted = equation.partition("->")
    terms = given.split(",")
    if len(terms) != 2 or "." in equation or any(len(set(t)) != len(t) for t in terms):
        raise GraphError(
            f"no gradient for Einsum {equation!r}, which makes {node.output[0]!r}",
            hint="write it with matmul, transpose and sum in the model",
        )
    sizes = {
        letter: axis
        for term, name in zip(terms, node.input, strict=True)
        for letter, axis in zip(term, emit.graph.axes(name), strict=True)
    }
    left, right = (
        _without_lonely(emit, name, term, other + wanted)
        for name, term, other in zip(node.input, terms, reversed(terms), strict=True)
    )
    batch = [c for c in wanted if c in left[1] and c in right[1]]
    summed = [c for c in left[1] if c in right[1] and c not in wanted]
    rows = [c for c in left[1] if c in wanted and c not in right[1]]
    columns = [c for c in right[1] if c in wanted and c not in left[1]]
    matrix = [
        _as_matrix(emit, left, [batch, rows, summed], sizes),
        _as_matrix(emit, right, [batch, summed, columns], sizes),
    ]
    flat = [product([sizes[c] for c in part]) for part in (rows, columns)]
    lead = [sizes[c] for c in batch]
    result = emit.op("MatMul", *matrix, axes=[*lead, *flat])
    have = [*batch, *rows, *columns]
    split = emit.view(result, [sizes[c] for c in have])
    emit.transpose(split, [have.index(c) for c in wanted], out=node.output[0])


def _without_lonely(emit: Emitter, name: str, term: str, elsewhere: str) -> tuple[str, str]:
    lonely = [i for i, letter in enumerate(term) if letter not in elsewhere]
    if not lonely:
        return name, term
    rest = "".join(letter for letter in term if letter in elsewhere)
    return emit.total(name, lonely, out=None, keep=False), rest


def _as_matrix(
    emit: Emitter, operand: tuple[str, str], parts: list[list[str]], sizes: dict[str, Axis]
) -> str:
    name, term = operand
    order = [term.index(letter) for part in parts for letter in part]
    moved = name if order == sorted(order) else emit.transpose(name, order)
    lead = [sizes[c] for c in parts[0]]
    return emit.view(moved, [*lead, *(product([sizes[c] for c in p]) for p in parts[1:])])
