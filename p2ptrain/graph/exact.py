"""Run a bundle's standard graphs in float64, node by node, by torch functions.

onnxruntime has float32 kernels only for much of a model. In a deep network with kinks, float32
rounding alone can decide on which side of a kink a value lies, and gradients then differ by far
more than rounding. In float64 that noise is gone, and a wrong rule stands out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from p2ptrain.graph.runner import Arrays, GraphFunction
from p2ptrain.graph.sources.onnx_operators import run_operator


def float64_function(content: bytes, frozen: Arrays) -> GraphFunction:
    """`runner.session_function` in float64.

    Args:
        content: A model of standard operators; its float32 constants become the decimals that
            they were written as (1e-5, not 9.99999975e-06).
        frozen: Tensors that the graph reads and does not declare; their values stay as they are.

    Raises:
        GraphError: when it runs, an operator that is not known here.
    """
    model = onnx.load_from_string(content)
    constants = {tensor.name: _as_written(tensor) for tensor in model.graph.initializer}
    constants |= {name: _tensor(value) for name, value in frozen.items()}
    declared = {entry.name for entry in model.graph.input}

    def run(feeds: Mapping[str, NDArray[Any]]) -> Arrays:  # Any: float64, int64 and bool
        values = dict(constants)
        values |= {name: _tensor(value) for name, value in feeds.items() if name in declared}
        with torch.no_grad():
            for node in model.graph.node:
                given = [values[name] if name else None for name in node.input]
                values |= dict(zip(node.output, run_operator(node, given), strict=False))
        return {entry.name: values[entry.name].numpy() for entry in model.graph.output}

    return run


def _as_written(tensor: onnx.TensorProto) -> Any:  # Any: a torch tensor
    """A float32 constant as the shortest decimal that means it; anything else unchanged."""
    value = onnx.numpy_helper.to_array(tensor)
    if value.dtype == np.float32:
        decimals = [float(str(entry)) for entry in value.reshape(-1)]
        value = np.array(decimals, np.float64).reshape(value.shape)
    return _tensor(value)


def _tensor(value: NDArray[Any]) -> Any:  # Any: arrays of several types, and a torch tensor
    tensor = torch.from_numpy(np.array(value))
    return tensor.double() if tensor.is_floating_point() else tensor
