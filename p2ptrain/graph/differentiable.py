"""Which operators carry a gradient, which deliberately carry none, and what is refused.

A gradient stops at an operator of `NOT_DIFFERENTIABLE`, as it does in torch: its derivative is
zero almost everywhere (Floor), or its result is no real number (ArgMax). What is neither listed
here nor known to the builder is refused by name: a gradient is never dropped in silence.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

import onnx

from p2ptrain.errors import GraphError
from p2ptrain.graph.ir import FLOAT, Graph, full_name

NOT_DIFFERENTIABLE: Final = frozenset({
    # results that are indices, sizes, truth values or random
    "ArgMax", "ArgMin", "NonZero", "Shape", "Size", "OneHot", "Unique", "IsNaN", "IsInf",
    "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "And", "Or", "Xor",
    "Range", "ConstantOfShape", "EyeLike", "Bernoulli", "Multinomial",
    "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
    "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor",
    # steps: the derivative is zero wherever there is one
    "Ceil", "Floor", "Round", "Sign",
})  # fmt: skip
"""A Cast to another type than float32 stops the gradient as well, and so do integer results
(the indices of TopK and MaxPool)."""

DIFFERENTIABLE: Final = frozenset({
    "Abs", "Add", "AveragePool", "Cast", "Clip", "Concat", "Conv", "ConvTranspose", "Cos", "Div",
    "Erf", "Exp", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Gemm",
    "GlobalAveragePool", "Identity", "LayerNormalization", "LeakyRelu", "Log", "LogSoftmax",
    "MatMul", "Max", "MaxPool", "Min", "Mul", "Neg", "Pad", "Pow", "Reciprocal", "ReduceL2",
    "ReduceLogSumExp", "ReduceMean", "ReduceSum", "Relu", "Reshape", "ScatterElements",
    "ScatterND", "Sigmoid", "SimplifiedLayerNormalization", "Sin", "Slice", "Softmax",
    "SoftmaxCrossEntropyLoss", "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "Tile", "TopK",
    "Transpose", "Trilu", "Unsqueeze", "Where",
    "com.microsoft.BatchNormInternal", "com.microsoft.Gelu",
})  # fmt: skip
"""What onnxruntime-training 1.19.2 builds a gradient for, as far as a rule lowers it."""


def stops(node: onnx.NodeProto) -> bool:
    """Whether no gradient passes through the node, on purpose."""
    return full_name(node) in NOT_DIFFERENTIABLE


def on_path(graph: Graph, wanted: Iterable[str], outputs: Iterable[str]) -> list[onnx.NodeProto]:
    """The nodes between the wanted values and the outputs that a gradient passes or stops at."""
    active = set(wanted)
    touched = []
    for node in graph.nodes:
        if active.isdisjoint(node.input):
            continue
        touched.append(node)
        if not stops(node):
            active.update(name for name in node.output if _is_real(graph, name))
    useful = carrying(graph, outputs)
    return [node for node in touched if not useful.isdisjoint(node.output)]


def carrying(graph: Graph, outputs: Iterable[str]) -> set[str]:
    """The values that have a cotangent: from which an output is reached without a stop."""
    useful = set(outputs)
    for node in reversed(graph.nodes):
        if not useful.isdisjoint(node.output) and not stops(node):
            useful.update(name for name in node.input if _is_real(graph, name))
    return useful


def _is_real(graph: Graph, name: str) -> bool:
    return name not in graph.types or graph.types[name].dtype == FLOAT


def refuse_unknown(path: Iterable[onnx.NodeProto], replaced: Collection[str]) -> None:
    """Refuse what carries a gradient that nobody can build.

    Raises:
        GraphError: names the operator, its result, and the module that torch says it is from.
    """
    for node in path:
        name = full_name(node)
        if name in DIFFERENTIABLE or name in NOT_DIFFERENTIABLE or name in replaced:
            continue
        raise GraphError(
            f"no gradient for {name}, which makes {node.output[0]!r}{_where(node)}",
            hint="write it with other operators in the model, or, if its gradient is zero, "
            "list it in p2ptrain/graph/differentiable.py",
        )


def _where(node: onnx.NodeProto) -> str:
    """The module path that torch attached to the node, when it did."""
    for entry in node.metadata_props:
        if entry.key == "namespace":
            path = [part.split(":")[0].strip() for part in str(entry.value).split("/")]
            named = [part for part in path[:-1] if part]
            if named:
                return f" in module {'.'.join(named)!r}"
    return ""
