"""Elementwise operators that broadcast, and the factors of means."""

from __future__ import annotations

import onnx

from p2ptrain.graph.ir import FLOAT, Axis, Graph, attribute
from p2ptrain.graph.lowering.registry import Emitter, rule
from p2ptrain.graph.views import product


@rule("com.microsoft.DivGrad")
def div_grad(emit: Emitter, node: onnx.NodeProto) -> None:
    """With q = dy / b: da = q and db = -q * a / b, each summed over its broadcast axes."""
    dy, a, b = node.input
    quotient = emit.like("Div", dy, b)
    if node.output[0]:
        emit.sum_to(quotient, emit.graph.axes(a), out=node.output[0])
    if len(node.output) > 1 and node.output[1]:
        slope = emit.like(
            "Mul", quotient, emit.like("Neg", emit.op("Div", a, b, axes=emit.graph.axes(dy)))
        )
        emit.sum_to(slope, emit.graph.axes(b), out=node.output[1])


@rule("com.microsoft.Scale")
def scale(emit: Emitter, node: onnx.NodeProto) -> None:
    """y = x * s, or x / s with scale_down; s is a number where the axes tell it.

    For a mean the builder divides by Size(x) / Size(y): known at export when no symbol is reduced.
    """
    value, factor = node.input
    down = bool(attribute(node, "scale_down", 0))
    known = _known_factor(emit, factor)
    if known is not None:
        number = emit.scalar(1.0 / known if down else known)
        emit.op("Mul", value, number, axes=emit.graph.axes(value), out=node.output[0])
        return
    single = emit.op("Cast", factor, axes=(), to=FLOAT)
    emit.like("Div" if down else "Mul", value, single, out=node.output[0])


def _known_factor(emit: Emitter, factor: str) -> float | None:
    graph = emit.graph
    if factor in graph.constants:
        return float(graph.constants[factor].item())
    producers = {name: node for node in emit.nodes for name in node.output}
    ratio = producers.get(factor)
    if ratio is None or ratio.op_type != "Div":
        return None
    above, below = (producers.get(name) for name in ratio.input)
    if above is None or below is None or {above.op_type, below.op_type} != {"Size"}:
        return None
    return axes_ratio(graph, above.input[0], below.input[0])


def axes_ratio(graph: Graph, large: str, small: str) -> float | None:
    """How many values of `large` there are for each of `small`, when no symbol is left over."""
    left = list(graph.axes(large))
    divisor = 1
    for axis in graph.axes(small):
        if axis in left:
            left.remove(axis)
        elif isinstance(axis, int):
            divisor *= axis
        else:
            return None
    ratio = product(left)
    return ratio / divisor if isinstance(ratio, int) else None


@rule("com.microsoft.BroadcastGradientArgs")
def broadcast_gradient_args(emit: Emitter, node: onnx.NodeProto) -> None:
    """The axes over which each operand's gradient is summed, told from the symbolic axes.

    An operand was broadcast along an axis that it lacks, or has as 1 where the other has not.
    Axes of different symbols are taken to have one size, as the forward operator requires.
    """
    producers = {name: made for made in emit.nodes for name in made.output}
    have = [emit.graph.axes(producers[name].input[0]) for name in node.input]
    rank = max(map(len, have))
    padded: list[tuple[Axis, ...]] = [(*[1] * (rank - len(axes)), *axes) for axes in have]
    for index, output in enumerate(node.output):
        axes, other, missing = padded[index], padded[1 - index], rank - len(have[index])
        taken = [i for i in range(rank) if i < missing or (axes[i] == 1 and other[i] != 1)]
        if output:
            emit.graph.rename(output, emit.integers(*taken))
