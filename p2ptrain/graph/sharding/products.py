"""Rules for matrix products: the only operators that start a family, and most that end one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx

from p2ptrain.graph.ir import Axis, attribute
from p2ptrain.graph.sharding.placements import WHOLE, Partial, Sliced, sliced
from p2ptrain.graph.sharding.rules import ELEMENTWISE, needs_whole, place_of, rule
from p2ptrain.graph.sharding.sharder import DOMAIN, REDUCE, VIEWS, Sharder


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gemm:
    """A Gemm's operands and which of their axes are rows, columns and contracted."""

    left: str
    right: str
    bias: str
    row: int
    inner_left: int
    inner_right: int
    column: int


def _gemm(node: onnx.NodeProto) -> _Gemm:
    row = int(attribute(node, "transA", 0))
    inner = int(attribute(node, "transB", 0))
    return _Gemm(
        left=node.input[0],
        right=node.input[1],
        bias=node.input[2] if len(node.input) > 2 else "",
        row=row,
        inner_left=1 - row,
        inner_right=inner,
        column=1 - inner,
    )


def may_start(s: Sharder, node: onnx.NodeProto) -> bool:
    """Whether a linear over a free parameter has whole rows and columns that may be divided."""
    if s.sequence is not None or node.op_type != "Gemm" or node.output[0] in s.refused:
        return False
    gemm = _gemm(node)
    size = s.axes(node.output[0])[1]
    whole = place_of(s, gemm.left) is None and not s.is_free(gemm.left)
    return whole and s.is_free(gemm.right) and isinstance(size, int) and size > 1


def start(s: Sharder, node: onnx.NodeProto) -> None:
    """Divide a linear's columns, in the parts in which its result is split later."""
    gemm = _gemm(node)
    family = s.families.start(node.output[0])
    columns = s.axes(node.output[0])[1]
    sizes = _parts_later(s, node.output[0], columns) or (columns,)
    s.sliced(gemm.right, sliced(family, gemm.column, sizes))
    multiply(s, node)


def _parts_later(s: Sharder, name: str, columns: Axis) -> tuple[Axis, ...]:
    """The parts into which a Split cuts the last axis of a value, or of what is made of it."""
    reached = {name}
    for node in s.source.nodes:  # in topological order
        source = next((given for given in node.input if given in reached), None)
        if source is None or s.axes(source)[-1:] != (columns,):
            continue
        last = len(s.axes(source)) - 1
        if node.op_type == "Split" and int(attribute(node, "axis", 0)) % (last + 1) == last:
            return tuple(s.axes(part)[-1] for part in node.output)
        if node.op_type in VIEWS or node.op_type in ELEMENTWISE:
            reached.update(node.output)
    return ()


@rule("Gemm")
def multiply(s: Sharder, node: onnx.NodeProto) -> None:
    """Sliced rows or columns stay; over a sliced inner axis each shard has a term of the sum."""
    gemm = _gemm(node)
    left, right = place_of(s, gemm.left), place_of(s, gemm.right)
    if left is not None and left.axis == gemm.row:
        if gemm.bias and len(s.axes(gemm.bias)) > 1:
            needs_whole(s, node)
            return
        bias = [s.whole(gemm.bias)] if gemm.bias else []
        s.put(node, [s.held(gemm.left), s.whole(gemm.right), *bias], left.at(0))
    elif left is not None:
        _sum(s, node, gemm, left)
    elif right is not None and right.axis == gemm.inner_right:
        _sum(s, node, gemm, right)
    elif right is not None:
        place = right.at(1)
        bias = [_column_bias(s, gemm.bias, place)] if gemm.bias else []
        s.put(node, [s.whole(gemm.left), s.held(gemm.right), *bias], place)


def _column_bias(s: Sharder, bias: str, place: Sliced) -> str:
    axes = s.axes(bias)
    return s.whole(bias) if not axes or axes[-1] == 1 else s.sliced(bias, place.at(len(axes) - 1))


def _sum(s: Sharder, node: onnx.NodeProto, gemm: _Gemm, place: Sliced) -> None:
    """Terms of a sum; a bias is added once, to the sum."""
    inputs = [
        s.sliced(gemm.left, place.at(gemm.inner_left)),
        s.sliced(gemm.right, place.at(gemm.inner_right)),
    ]
    if not gemm.bias:
        s.put(node, inputs, Partial(family=place.family))
        return
    settings = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    beta = float(settings.pop("beta", 1.0))
    terms = s.emit("Gemm", inputs, node.output[0], **settings)
    total = s.emit(REDUCE, [terms], node.output[0], domain=DOMAIN, axis=0)
    s.origin[total] = s.origin[terms] = (node.output[0], WHOLE)
    bias = s.whole(gemm.bias)
    if beta != 1.0:
        bias = s.emit("Mul", [bias, s.number(beta)], gemm.bias)
    s.put(onnx.helper.make_node("Add", [total, bias], node.output), [total, bias], WHOLE)


@rule("MatMul")
def matmul(s: Sharder, node: onnx.NodeProto) -> None:
    """As a Gemm; leading axes are elementwise."""
    left, right = node.input
    ranks = [len(s.axes(left)), len(s.axes(right))]
    if min(ranks) < 2:
        needs_whole(s, node, "MatMul of a vector is not divided")
        return
    of_left, of_right = place_of(s, left), place_of(s, right)
    rank = max(ranks)
    if of_left is not None and of_left.axis < ranks[0] - 2:
        _batched(s, node, of_left.at(of_left.axis + rank - ranks[0]), rank)
    elif of_right is not None and of_right.axis < ranks[1] - 2:
        _batched(s, node, of_right.at(of_right.axis + rank - ranks[1]), rank)
    elif of_left is not None and of_left.axis == ranks[0] - 2:
        s.put(node, [s.held(left), s.whole(right)], of_left.at(rank - 2))
    elif of_left is not None or (of_right is not None and of_right.axis == ranks[1] - 2):
        place = of_left or of_right
        if place is not None:
            inputs = [s.sliced(left, place.at(ranks[0] - 1))]
            inputs.append(s.sliced(right, place.at(ranks[1] - 2)))
            s.put(node, inputs, Partial(family=place.family))
    elif of_right is not None:
        s.put(node, [s.whole(left), s.held(right)], of_right.at(rank - 1))


def _batched(s: Sharder, node: onnx.NodeProto, place: Sliced, rank: int) -> None:
    s.put(node, _leading(s, node.input, place, rank), place)


def _leading(s: Sharder, names: Sequence[str], place: Sliced, rank: int) -> list[str]:
    operands = []
    for name in names:
        axes = s.axes(name)
        axis = place.axis - (rank - len(axes))
        alike = axis >= 0 and axes[axis] != 1
        operands.append(s.sliced(name, place.at(axis)) if alike else s.whole(name))
    return operands
