"""Operators that the builder cannot differentiate: their slopes, made in the forward pass.

The builder is shown `y = sum(x_i * slope_i)` with the slopes as inputs, which has the right
gradient at the right point; afterwards the true operator takes its place again. So an operator
needs no gradient kernel, only its slope, and the backward is one product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import onnx

from p2ptrain.graph.ir import FLOAT, Graph, attribute, full_name
from p2ptrain.graph.lowering.activations import CUBIC, ROOT_2_OVER_PI, fast_gelu_gate
from p2ptrain.graph.lowering.registry import Emitter
from p2ptrain.graph.shapes import BOOL

Terms = list[tuple[str, str]]
SlopeRule = Callable[[Emitter, onnx.NodeProto], Terms]
_SLOPES: Final[dict[str, SlopeRule]] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class StandIn:
    """One replaced node: what really computes it, and what the builder sees."""

    true: tuple[onnx.NodeProto, ...]
    linear: tuple[onnx.NodeProto, ...]
    given: tuple[str, ...]
    """Values that the builder takes as inputs: the slopes, or results without a gradient."""


def slope(*names: str) -> Callable[[SlopeRule], SlopeRule]:
    """Register the slopes of one or several operators."""

    def register(function: SlopeRule) -> SlopeRule:
        _SLOPES.update(dict.fromkeys(names, function))
        return function

    return register


def slope_names() -> tuple[str, ...]:
    """Every operator with a slope rule."""
    return tuple(sorted(_SLOPES))


def has_slope(node: onnx.NodeProto) -> bool:
    """Whether the node is differentiated by its slope; of products, only squares are."""
    name = full_name(node)
    return name in _SLOPES and (name != "Mul" or node.input[0] == node.input[1])


def find_stand_ins(
    graph: Graph, path: Iterable[onnx.NodeProto], stopping: Callable[[onnx.NodeProto], bool]
) -> tuple[StandIn, ...]:
    """Stand-ins for the nodes on the gradient's path that need one; adds types to the graph."""
    found = []
    for node in path:
        if stopping(node):
            found.append(StandIn(true=(node,), linear=(), given=tuple(filter(None, node.output))))
        elif has_slope(node):
            found.append(_stand_in(graph, node))
    return tuple(found)


def _stand_in(graph: Graph, node: onnx.NodeProto) -> StandIn:
    emit = Emitter(graph=graph)
    terms = _SLOPES[full_name(node)](emit, node)
    shown = Emitter(graph=graph)
    total = ""
    for index, (value, gradient) in enumerate(terms):
        last = index == len(terms) - 1
        axes = graph.axes(node.output[0])
        if full_name(node) in REDUCTIONS:
            weighted = shown.like("Mul", value, gradient)
            _reduce_again(shown, node, weighted)
            break
        alone = last and not total
        term = shown.op("Mul", value, gradient, axes=axes, out=node.output[0] if alone else None)
        if total:
            term = shown.op("Add", total, term, axes=axes, out=node.output[0] if last else None)
        total = term
    return StandIn(
        true=tuple(emit.nodes),
        linear=tuple(shown.nodes),
        given=tuple(dict.fromkeys(gradient for _, gradient in terms)),
    )


REDUCTIONS: Final = ("ReduceMax", "ReduceMin")


def _reduce_again(shown: Emitter, node: onnx.NodeProto, weighted: str) -> None:
    keep = int(attribute(node, "keepdims", 1))
    over = list(node.input[1:2])
    axes = shown.graph.axes(node.output[0])
    shown.op("ReduceSum", weighted, *over, axes=axes, out=node.output[0], keepdims=keep)


def _itself(emit: Emitter, node: onnx.NodeProto) -> str:
    """Emit the node as it is; gives its result."""
    emit.nodes.append(node)
    return str(node.output[0])


def _test(emit: Emitter, kind: str, left: str, right: str) -> str:
    return emit.op(kind, left, right, axes=emit.graph.axes(left), dtype=BOOL)


def _number(emit: Emitter, truth: str) -> str:
    return emit.op("Cast", truth, axes=emit.graph.axes(truth), to=FLOAT)


def _choose(emit: Emitter, truth: str, yes: str, no: str) -> str:
    return emit.op("Where", truth, yes, no, axes=emit.graph.axes(truth))


@slope("Elu", "Celu", "Selu")
def _elu(emit: Emitter, node: onnx.NodeProto) -> Terms:
    """x > 0: gamma. Else gamma * alpha * exp(x / width), which is the result + gamma * alpha."""
    x, y = node.input[0], _itself(emit, node)
    selu = node.op_type == "Selu"
    alpha = float(attribute(node, "alpha", 1.67326319217681884765625 if selu else 1.0))
    gamma = float(attribute(node, "gamma", 1.05070102214813232421875)) if selu else 1.0
    level = emit.like("Add", y, emit.scalar(gamma * alpha))
    if node.op_type == "Celu":
        level = emit.like("Mul", level, emit.scalar(1.0 / alpha))
    positive = _test(emit, "Greater", x, emit.scalar(0.0))
    return [(x, _choose(emit, positive, emit.scalar(gamma), level))]


@slope("Softplus")
def _softplus(emit: Emitter, node: onnx.NodeProto) -> Terms:
    """sigmoid(x)."""
    _itself(emit, node)
    return [(node.input[0], emit.like("Sigmoid", node.input[0]))]


@slope("Softsign")
def _softsign(emit: Emitter, node: onnx.NodeProto) -> Terms:
    """1 / (1 + |x|)^2 = (1 - |y|)^2."""
    y = _itself(emit, node)
    rest = emit.like("Add", emit.like("Neg", emit.like("Abs", y)), emit.scalar(1.0))
    return [(node.input[0], emit.like("Mul", rest, rest))]


@slope("HardSigmoid")
def _hard_sigmoid(emit: Emitter, node: onnx.NodeProto) -> Terms:
    """alpha where 0 < y < 1, else 0."""
    y = _itself(emit, node)
    alpha = float(attribute(node, "alpha", 0.2))
    return [(node.input[0], emit.like("Mul", _inside(emit, y), emit.scalar(alpha)))]


def _inside(emit: Emitter, gate: str) -> str:
    above = _test(emit, "Greater", gate, emit.scalar(0.0))
    below = _test(emit, "Less", gate, emit.scalar(1.0))
    both = emit.op("And", above, below, axes=emit.graph.axes(gate), dtype=BOOL)
    return _number(emit, both)


@slope("HardSwish")
def _hard_swish(emit: Emitter, node: onnx.NodeProto) -> Terms:
    """gate + x / 6 where 0 < gate < 1, with gate = clip(x / 6 + 1 / 2, 0, 1)."""
    x = node.input[0]
    gate = emit.graph.fresh("gate")
    emit.graph.types[gate] = emit.graph.types[x]
    emit.nodes.append(onnx.helper.make_node("HardSigmoid", [x], [gate], alpha=1 / 6, beta=0.5))
    emit.like("Mul", x, gate, out=node.output[0])
    sixth = emit.like("Mul", x, emit.scalar(1 / 6))
    return [(x, emit.like("Add", gate, emit.like("Mul", sixth, _inside(emit, gate))))]


@slope("Mish")
def _mish(emit: Emitter, node: onnx.NodeProto) -> Terms:
    """t + x * (1 - t^2) * sigmoid(x), with t = tanh(softplus(x))."""
    x = node.input[0]
    gate = emit.like("Tanh", emit.like("Softplus", x))
    emit.like("Mul", x, gate, out=node.output[0])
    left = emit.like("Sub", x, emit.like("Mul", emit.like("Mul", x, gate), gate))
    return [(x, emit.like("Add", emit.like("Mul", left, emit.like("Sigmoid", x)), gate))]


@slope("com.microsoft.QuickGelu")
def _quick_gelu(emit: Emitter, node: onnx.NodeProto) -> Terms:
    """s + alpha * (y - y * s), with s = sigmoid(alpha x)."""
    x = node.input[0]
    alpha = float(attribute(node, "alpha", 1.702))
    scaled = x if alpha == 1.0 else emit.like("Mul", x, emit.scalar(alpha))
    gate = emit.like("Sigmoid", scaled)
    y = emit.like("Mul", x, gate, out=node.output[0])
    rest = emit.like("Sub", y, emit.like("Mul", y, gate))
    if alpha != 1.0:
        rest = emit.like("Mul", rest, emit.scalar(alpha))
    return [(x, emit.like("Add", rest, gate))]


@slope("com.microsoft.FastGelu")
def _fast_gelu(emit: Emitter, node: onnx.NodeProto) -> Terms:
    """gate + (y - y * gate) * d(2 u)/dx, with gate = sigmoid(2 u) = (1 + tanh u) / 2."""
    square, gate = fast_gelu_gate(emit, node)
    y = node.output[0]
    rest = emit.like("Sub", y, emit.like("Mul", y, gate))
    bend = emit.like("Mul", square, emit.scalar(6.0 * ROOT_2_OVER_PI * CUBIC))
    inner = emit.like("Add", bend, emit.scalar(2.0 * ROOT_2_OVER_PI))
    return [(node.input[0], emit.like("Add", emit.like("Mul", rest, inner), gate))]


@slope("ThresholdedRelu")
def _thresholded_relu(emit: Emitter, node: onnx.NodeProto) -> Terms:
    """1 where x > alpha, else 0."""
    _itself(emit, node)
    limit = emit.scalar(float(attribute(node, "alpha", 1.0)))
    return [(node.input[0], _number(emit, _test(emit, "Greater", node.input[0], limit)))]


@slope("PRelu")
def _prelu(emit: Emitter, node: onnx.NodeProto) -> Terms:
    """Of x: 1 where x > 0, else the weight. Of the weight: min(x, 0)."""
    x, weight = node.input
    _itself(emit, node)
    positive = _test(emit, "Greater", x, emit.scalar(0.0))
    of_x = _choose(emit, positive, emit.scalar(1.0), weight)
    return [(x, of_x), (weight, _choose(emit, positive, emit.scalar(0.0), x))]


@slope("Atan", "Tan", "Sinh", "Cosh", "Asinh")
def _trigonometric(emit: Emitter, node: onnx.NodeProto) -> Terms:
    """1 / (1 + x^2), 1 + y^2, cosh x, sinh x, 1 / sqrt(1 + x^2)."""
    x, y = node.input[0], _itself(emit, node)
    if node.op_type in ("Sinh", "Cosh"):
        return [(x, emit.like("Cosh" if node.op_type == "Sinh" else "Sinh", x))]
    base = y if node.op_type == "Tan" else x
    raised = emit.like("Add", emit.like("Mul", base, base), emit.scalar(1.0))
    if node.op_type == "Asinh":
        raised = emit.like("Sqrt", raised)
    return [(x, raised if node.op_type == "Tan" else emit.like("Reciprocal", raised))]


@slope("ReduceMax", "ReduceMin")
def _extreme(emit: Emitter, node: onnx.NodeProto) -> Terms:
    """1 / (how many share the extreme) where a value is the extreme, else 0: as torch's amax."""
    x, y = node.input[0], _itself(emit, node)
    graph = emit.graph
    over = graph.constants[node.input[1]].ravel() if len(node.input) > 1 else None
    rank = len(graph.axes(x))
    taken = sorted({int(axis) % rank for axis in over} if over is not None else range(rank))
    row = [1 if i in taken else axis for i, axis in enumerate(graph.axes(x))]
    if not attribute(node, "keepdims", 1):
        y = emit.op("Unsqueeze", y, emit.integers(*taken), axes=row)
    hits = _number(emit, _test(emit, "Equal", x, y))
    return [(x, emit.like("Div", hits, emit.total(hits, taken, out=None, keep=True)))]


@slope("Pow")
def _pow(emit: Emitter, node: onnx.NodeProto) -> Terms:
    """Of x: e * x^(e - 1). Of the exponent: y * log(x), 0 where x is 0 (as torch)."""
    x, exponent = node.input
    y = _itself(emit, node)
    axes = emit.graph.axes(y)
    less = emit.like("Sub", exponent, emit.scalar(1.0))
    of_x = emit.op("Mul", emit.op("Pow", x, less, axes=axes), exponent, axes=axes)
    if exponent in emit.graph.constants:
        return [(x, of_x)]
    zero = _test(emit, "Equal", x, emit.scalar(0.0))
    safe = _choose(emit, zero, emit.scalar(1.0), x)
    return [(x, of_x), (exponent, emit.op("Mul", y, emit.like("Log", safe), axes=axes))]


@slope("Mul")
def _square(emit: Emitter, node: onnx.NodeProto) -> Terms:
    """2 x; the builder fails on a product of a value with itself."""
    _itself(emit, node)
    return [(node.input[0], emit.like("Mul", node.input[0], emit.scalar(2.0)))]


@slope("Clip")
def _clip(emit: Emitter, node: onnx.NodeProto) -> Terms:
    """1 where the value was left as it is, else 0."""
    y = _itself(emit, node)
    return [(node.input[0], _number(emit, _test(emit, "Equal", node.input[0], y)))]
