"""One rule per operator that only onnxruntime-training knows: the same thing in standard ONNX.

The families are imported here, so that whoever imports the registry finds it filled.
"""

from p2ptrain.graph.lowering import (
    activations,
    broadcasting,
    convolution,
    indexing,
    losses,
    normalisation,
    pooling,
    products,
)

__all__ = [
    "activations",
    "broadcasting",
    "convolution",
    "indexing",
    "losses",
    "normalisation",
    "pooling",
    "products",
]
