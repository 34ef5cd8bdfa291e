"""Which operators a bundle's graphs may use.

Pure functions of tensors whose result has a size that follows from their inputs' sizes: no control
flow, no random numbers, no strings, sequences or optional values, nothing that reads a file, and
no operator of a vendor in the portable form. What is missing is missing on purpose; an operator
is added together with what makes the exporter emit it.
"""

from __future__ import annotations

from typing import Final

MICROSOFT: Final = "com.microsoft"
OPSETS: Final = (17, 18)
"""Versions of the standard domain for which the lists below were read."""
IRS: Final = (8, 9, 10)

_ELEMENTWISE: Final = (
    "Abs", "Acos", "Acosh", "Add", "And", "Asin", "Asinh", "Atan", "Atanh", "BitShift",
    "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Cast", "CastLike",
    "Ceil", "Celu", "Clip", "Cos", "Cosh", "Div", "Elu", "Equal", "Erf", "Exp", "Floor", "Greater",
    "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu",
    "Less", "LessOrEqual", "Log", "Max", "Mean", "Min", "Mish", "Mod", "Mul", "Neg", "Not", "Or",
    "PRelu", "Pow", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Sinh",
    "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Tan", "Tanh", "ThresholdedRelu", "Where", "Xor",
)  # fmt: skip
_REDUCTIONS: Final = (
    "ArgMax", "ArgMin", "CumSum", "LogSoftmax", "ReduceL1", "ReduceL2", "ReduceLogSum",
    "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum",
    "ReduceSumSquare", "Softmax", "TopK",
)  # fmt: skip
_PRODUCTS: Final = ("Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul")
_NORMALISATIONS: Final = (
    "BatchNormalization", "InstanceNormalization", "LayerNormalization", "LRN",
    "LpNormalization", "MeanVarianceNormalization",
)  # fmt: skip
_POOLS: Final = (
    "AveragePool", "Col2Im", "GlobalAveragePool", "GlobalMaxPool", "MaxPool", "Resize",
)  # fmt: skip
_LAYOUT: Final = (
    "Concat", "Constant", "ConstantOfShape", "DepthToSpace", "Expand", "EyeLike", "Flatten",
    "Gather", "GatherElements", "GatherND", "OneHot", "Pad", "Range", "Reshape", "ReverseSequence",
    "ScatterElements", "ScatterND", "Shape", "Size", "Slice", "SpaceToDepth", "Split", "Squeeze",
    "Tile", "Transpose", "Trilu", "Unsqueeze",
)  # fmt: skip
_LOSSES: Final = ("NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss")

STANDARD: Final = frozenset(
    ("", name)
    for names in (_ELEMENTWISE, _REDUCTIONS, _PRODUCTS, _NORMALISATIONS, _POOLS, _LAYOUT, _LOSSES)
    for name in names
)
"""For every graph of the portable form, and for evaluation, update and inference graphs."""

_KERNELS: Final = (
    "BatchNormInternal", "BiasFastGelu", "BiasGelu", "BroadcastGradientArgs", "FastGelu",
    "FusedMatMul", "GRUTraining", "Gelu", "LSTMTraining", "QuickGelu", "ReduceSumTraining",
    "Scale", "ConcatTraining", "SplitTraining",
)  # fmt: skip
_GRADIENTS: Final = (
    "AveragePoolGrad", "BatchNormalizationGrad", "BiasFastGeluGrad_dX", "BiasGeluGrad_dX",
    "ConvGrad", "ConvTransposeGrad", "DivGrad", "FastGeluGrad", "GRUGrad", "GatherElementsGrad",
    "GatherGrad", "GatherNDGrad", "GeluGrad", "InvertibleLayerNormalizationGrad", "LSTMGrad",
    "LayerNormalizationGrad", "LeakyReluGrad", "LogSoftmaxGrad", "LogSoftmaxGrad_13",
    "MaxPoolGrad", "QuickGeluGrad", "ReluGrad", "ResizeGrad", "SigmoidGrad",
    "SimplifiedLayerNormalizationGrad", "SliceGrad", "SoftmaxCrossEntropyLossGrad", "SoftmaxGrad",
    "SoftmaxGrad_13", "TanhGrad",
)  # fmt: skip
_STANDARD_GRADIENTS: Final = (
    "AveragePoolGrad", "MaxPoolGrad", "ReluGrad", "SimplifiedLayerNormalization", "SinGrad",
)  # fmt: skip
"""onnxruntime-training keeps these in the standard domain."""

TRAINING: Final = (
    STANDARD
    | {(MICROSOFT, name) for name in (*_KERNELS, *_GRADIENTS)}
    | {("", name) for name in _STANDARD_GRADIENTS}
)
"""For forward and backward graphs of the training form."""

SIZED_BY_INPUT: Final = {"ConstantOfShape": 0, "Expand": 1}
"""Operators whose result is as large as the numbers in one of their inputs say."""
