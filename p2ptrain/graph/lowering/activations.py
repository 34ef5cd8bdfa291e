"""Activations: the slope times the cotangent."""

from __future__ import annotations

import math

import onnx

from p2ptrain.graph.ir import attribute
from p2ptrain.graph.lowering.registry import Emitter, rule

_ROOT_HALF = math.sqrt(0.5)
ROOT_2_OVER_PI = math.sqrt(2.0 / math.pi)
CUBIC = 0.044715


@rule("com.microsoft.Gelu")
def gelu(emit: Emitter, node: onnx.NodeProto) -> None:
    """z = x / sqrt 2; gate = 1 + erf z; y = z * gate / sqrt 2; and the slope for later.

    dy/dx = (gate + 2 / sqrt pi * z exp(-z^2)) / 2. Both constant factors of a half, and that of
    z, fold into the matrix products beside them; the slope is made here, where z and gate are at
    hand: keeping z * gate and the slope costs what keeping x and y would, and leaves one product
    to the backward.
    """
    x = node.input[0]
    z = emit.like("Mul", x, emit.scalar(_ROOT_HALF))
    gate = emit.like("Add", emit.like("Erf", z), emit.scalar(1.0))
    emit.like("Mul", emit.like("Mul", z, gate), emit.scalar(_ROOT_HALF), out=node.output[0])
    height = emit.scalar(math.log(2.0 / math.sqrt(math.pi)))
    exponent = emit.op("Sub", height, emit.like("Mul", z, z), axes=emit.graph.axes(x))
    bell = emit.like("Mul", emit.like("Exp", exponent), z)
    emit.notes["gelu.slope", x] = emit.like("Add", bell, gate)


@rule("com.microsoft.GeluGrad")
def gelu_grad(emit: Emitter, node: onnx.NodeProto) -> None:
    """dx = dy / 2 * slope; the factor folds into the product that makes dy."""
    dy, x = node.input
    scaled = emit.like("Mul", dy, emit.scalar(0.5))
    emit.like("Mul", scaled, emit.notes["gelu.slope", x], out=node.output[0])


@rule("com.microsoft.TanhGrad")
def tanh_grad(emit: Emitter, node: onnx.NodeProto) -> None:
    """dx = dy - dy * y * y."""
    dy, y = node.input
    product = emit.like("Mul", emit.like("Mul", dy, y), y)
    emit.like("Sub", dy, product, out=node.output[0])


@rule("com.microsoft.SigmoidGrad")
def sigmoid_grad(emit: Emitter, node: onnx.NodeProto) -> None:
    """dx = p - p * y with p = dy * y."""
    dy, y = node.input
    product = emit.like("Mul", dy, y)
    emit.like("Sub", product, emit.like("Mul", product, y), out=node.output[0])


@rule("com.microsoft.ReluGrad")
def relu_grad(emit: Emitter, node: onnx.NodeProto) -> None:
    """dx = dy where the output is positive, else 0."""
    dy, y = node.input
    boolean = int(onnx.TensorProto.BOOL)
    positive = emit.op("Greater", y, emit.scalar(0.0), axes=emit.graph.axes(y), dtype=boolean)
    emit.op("Where", positive, dy, emit.scalar(0.0), axes=emit.graph.axes(y), out=node.output[0])


@rule("com.microsoft.LeakyReluGrad")
def leaky_relu_grad(emit: Emitter, node: onnx.NodeProto) -> None:
    """dx = dy where the output is positive, else alpha * dy."""
    dy, y = node.input
    axes = emit.graph.axes(y)
    boolean = int(onnx.TensorProto.BOOL)
    positive = emit.op("Greater", y, emit.scalar(0.0), axes=axes, dtype=boolean)
    leak = emit.like("Mul", dy, emit.scalar(float(attribute(node, "alpha", 0.01))))
    emit.op("Where", positive, dy, leak, axes=axes, out=node.output[0])


@rule("com.microsoft.QuickGelu")
def quick_gelu(emit: Emitter, node: onnx.NodeProto) -> None:
    """y = x * sigmoid(alpha x); SiLU where alpha is 1."""
    x = node.input[0]
    alpha = float(attribute(node, "alpha", 1.702))
    scaled = x if alpha == 1.0 else emit.like("Mul", x, emit.scalar(alpha))
    emit.like("Mul", x, emit.like("Sigmoid", scaled), out=node.output[0])


@rule("com.microsoft.FastGelu")
def fast_gelu(emit: Emitter, node: onnx.NodeProto) -> None:
    """y = x * gate with gate = (1 + tanh(u)) / 2 and u = sqrt(2 / pi) * (x + 0.044715 x^3)."""
    fast_gelu_gate(emit, node)


def fast_gelu_gate(emit: Emitter, node: onnx.NodeProto) -> tuple[str, str]:
    """Emit the tanh GELU; gives the names of x^2 and of its gate, sigmoid(2 u)."""
    x = node.input[0]
    square = emit.like("Mul", x, x)
    cubic = emit.like("Mul", square, emit.scalar(2.0 * ROOT_2_OVER_PI * CUBIC))
    twice = emit.like("Mul", emit.like("Add", cubic, emit.scalar(2.0 * ROOT_2_OVER_PI)), x)
    gate = emit.like("Sigmoid", twice)
    emit.like("Mul", x, gate, out=node.output[0])
    return square, gate
