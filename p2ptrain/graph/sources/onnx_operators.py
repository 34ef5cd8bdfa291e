"""Standard ONNX operators as torch functions, for the float64 reference of an ONNX file.

Each function gets a node and its inputs (None where one is left out) and gives its outputs. What
is not here is refused by name. Written from the ONNX operator specification, opset 18.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Final

import onnx
import torch
from torch.nn import functional

from p2ptrain.errors import GraphError
from p2ptrain.graph.ir import attribute

Tensor = Any  # Any: torch tensors; torch is untyped here
Operator = Callable[[onnx.NodeProto, Sequence[Tensor]], Tensor]


def run_operator(node: onnx.NodeProto, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Outputs of one node.

    Raises:
        GraphError: an operator or attribute that is not here; nothing can be checked with it.
    """
    operator = OPERATORS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if operator is None:
        raise GraphError(
            f"the reference for ONNX files does not know the operator {node.op_type!r}"
            f" of node {node.name or node.output[0]!r}",
            hint="export the model from torch, or write it with other operators",
        )
    result = operator(node, inputs)
    return result if isinstance(result, tuple | list) else (result,)


def _fold(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return lambda node, inputs: functools.reduce(function, inputs)


def _plain(function: Callable[..., Tensor]) -> Operator:
    return lambda node, inputs: function(*inputs)


def _integers(value: Tensor) -> list[int]:
    return [int(entry) for entry in value.reshape(-1).tolist()]


def _axes(node: onnx.NodeProto, inputs: Sequence[Tensor], position: int = 1) -> list[int] | None:
    """Axes given as an input, or as an attribute in older operators."""
    if len(inputs) > position and inputs[position] is not None:
        return _integers(inputs[position])
    found = attribute(node, "axes")
    return None if found is None else list(found)


def _reduce(function: Callable[..., Tensor]) -> Operator:
    def run(node: onnx.NodeProto, inputs: Sequence[Tensor]) -> Tensor:
        axes = _axes(node, inputs)
        if axes is None and attribute(node, "noop_with_empty_axes", 0):
            return inputs[0]
        over = axes or list(range(inputs[0].ndim))
        return function(inputs[0], over, bool(attribute(node, "keepdims", 1)))

    return run


def _softmax(function: Callable[..., Tensor]) -> Operator:
    return lambda node, inputs: function(inputs[0], dim=attribute(node, "axis", -1))


def _reshape(node: onnx.NodeProto, inputs: Sequence[Tensor]) -> Tensor:
    wanted = _integers(inputs[1])
    if not attribute(node, "allowzero", 0):
        wanted = [inputs[0].shape[i] if size == 0 else size for i, size in enumerate(wanted)]
    return inputs[0].reshape(wanted)


def _flatten(node: onnx.NodeProto, inputs: Sequence[Tensor]) -> Tensor:
    axis = int(attribute(node, "axis", 1)) % (inputs[0].ndim + 1)
    rows = 1
    for size in inputs[0].shape[:axis]:
        rows *= size
    return inputs[0].reshape(rows, -1)


def _transpose(node: onnx.NodeProto, inputs: Sequence[Tensor]) -> Tensor:
    return inputs[0].permute(attribute(node, "perm", list(range(inputs[0].ndim))[::-1]))


def _squeeze(node: onnx.NodeProto, inputs: Sequence[Tensor]) -> Tensor:
    axes = _axes(node, inputs)
    return inputs[0].squeeze() if axes is None else inputs[0].squeeze(tuple(axes))


def _unsqueeze(node: onnx.NodeProto, inputs: Sequence[Tensor]) -> Tensor:
    result, rank = inputs[0], inputs[0].ndim + len(_axes(node, inputs) or ())
    for axis in sorted(axis % rank for axis in _axes(node, inputs) or ()):
        result = result.unsqueeze(axis)
    return result


def _split(node: onnx.NodeProto, inputs: Sequence[Tensor]) -> Tensor:
    axis = int(attribute(node, "axis", 0))
    sizes = _axes(node, inputs)
    if sizes is None:
        sizes = [len(part) for part in torch.arange(inputs[0].shape[axis]).chunk(len(node.output))]
    return torch.split(inputs[0], sizes, dim=axis)


def _slice(node: onnx.NodeProto, inputs: Sequence[Tensor]) -> Tensor:
    starts, ends = _integers(inputs[1]), _integers(inputs[2])
    axes = _axes(node, inputs, 3) or list(range(len(starts)))
    steps = _integers(inputs[4]) if len(inputs) > 4 and inputs[4] is not None else [1] * len(starts)
    result = inputs[0]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = result.shape[axis]
        bounds = slice(start, None if step < 0 and end < -size else end, step).indices(size)
        result = result.index_select(axis, torch.arange(*bounds))
    return result


def _gather(node: onnx.NodeProto, inputs: Sequence[Tensor]) -> Tensor:
    axis = int(attribute(node, "axis", 0)) % inputs[0].ndim
    size = inputs[0].shape[axis]
    flat = (inputs[1].reshape(-1) % size).long()
    shape = (*inputs[0].shape[:axis], *inputs[1].shape, *inputs[0].shape[axis + 1 :])
    return inputs[0].index_select(axis, flat).reshape(shape)


def _gather_elements(node: onnx.NodeProto, inputs: Sequence[Tensor]) -> Tensor:
    axis = int(attribute(node, "axis", 0))
    return torch.gather(inputs[0], axis, inputs[1] % inputs[0].shape[axis])


def _expand(node: onnx.NodeProto, inputs: Sequence[Tensor]) -> Tensor:
    wanted = torch.broadcast_shapes(inputs[0].shape, tuple(_integers(inputs[1])))
    return inputs[0].expand(wanted)


def _shape(node: onnx.NodeProto, inputs: Sequence[Tensor]) -> Tensor:
    start, end = attribute(node, "start", 0), attribute(node, "end")
    return torch.tensor(list(inputs[0].shape)[start:end], dtype=torch.int64)


def _cast(node: onnx.NodeProto, inputs: Sequence[Tensor]) -> Tensor:
    """Every floating type becomes float64: this is the reference."""
    kind = onnx.helper.tensor_dtype_to_np_dtype(attribute(node, "to"))
    return inputs[0].to(torch.float64 if kind.kind == "f" else getattr(torch, kind.name))


def _constant_of_shape(node: onnx.NodeProto, inputs: Sequence[Tensor]) -> Tensor:
    value = attribute(node, "value")
    number = 0.0 if value is None else onnx.numpy_helper.to_array(value).item()
    kind = torch.float64 if isinstance(number, float) else torch.int64
    return torch.full(_integers(inputs[0]), number, dtype=kind)


def _gemm(node: onnx.NodeProto, inputs: Sequence[Tensor]) -> Tensor:
    a = inputs[0].T if attribute(node, "transA", 0) else inputs[0]
    b = inputs[1].T if attribute(node, "transB", 0) else inputs[1]
    result = attribute(node, "alpha", 1.0) * (a @ b)
    has_bias = len(inputs) > 2 and inputs[2] is not None
    return result + attribute(node, "beta", 1.0) * inputs[2] if has_bias else result


def _padded(node: onnx.NodeProto, value: Tensor, window: Sequence[int], fill: float) -> Tensor:
    """Pad the spatial axes as `pads` or `auto_pad` say."""
    rank = value.ndim - 2
    pads = list(attribute(node, "pads", [0] * 2 * rank))
    auto = attribute(node, "auto_pad", b"NOTSET")
    if auto in (b"SAME_UPPER", b"SAME_LOWER"):
        strides = attribute(node, "strides", [1] * rank)
        dilations = attribute(node, "dilations", [1] * rank)
        for axis in range(rank):
            size = value.shape[2 + axis]
            reach = (window[axis] - 1) * dilations[axis] + 1
            total = max(0, (-(-size // strides[axis]) - 1) * strides[axis] + reach - size)
            before = total // 2 if auto == b"SAME_UPPER" else total - total // 2
            pads[axis], pads[rank + axis] = before, total - before
    if not any(pads):
        return value
    order = [pads[i + rank * side] for i in reversed(range(rank)) for side in (0, 1)]
    return functional.pad(value, order, value=fill)


def _conv(node: onnx.NodeProto, inputs: Sequence[Tensor]) -> Tensor:
    x, weight = inputs[0], inputs[1]
    rank = x.ndim - 2
    function = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
    return function(
        _padded(node, x, weight.shape[2:], 0.0),
        weight,
        inputs[2] if len(inputs) > 2 else None,
        stride=list(attribute(node, "strides", [1] * rank)),
        dilation=list(attribute(node, "dilations", [1] * rank)),
        groups=int(attribute(node, "group", 1)),
    )


def _conv_transpose(node: onnx.NodeProto, inputs: Sequence[Tensor]) -> Tensor:
    """What lies at the far end of an axis is cut off after the sum: ONNX's two pads may differ."""
    x, weight = inputs[0], inputs[1]
    rank = x.ndim - 2
    pads = list(attribute(node, "pads", [0] * 2 * rank))
    if attribute(node, "auto_pad", b"NOTSET") != b"NOTSET" or attribute(node, "output_shape"):
        raise GraphError("the reference for ONNX files knows ConvTranspose with stated pads only")
    convolve = (
        functional.conv_transpose1d,
        functional.conv_transpose2d,
        functional.conv_transpose3d,
    )[rank - 1]
    grown = convolve(
        x,
        weight,
        stride=list(attribute(node, "strides", [1] * rank)),
        dilation=list(attribute(node, "dilations", [1] * rank)),
        groups=int(attribute(node, "group", 1)),
    )
    extra = attribute(node, "output_padding", [0] * rank)
    order = [
        size
        for axis in reversed(range(rank))
        for size in (-pads[axis], extra[axis] - pads[rank + axis])
    ]
    result = functional.pad(grown, order)
    if len(inputs) < 3 or inputs[2] is None:
        return result
    return result + inputs[2].reshape(-1, *[1] * rank)


def _max_pool(node: onnx.NodeProto, inputs: Sequence[Tensor]) -> Tensor:
    """The largest values, and their flat places in the whole of the input."""
    x, window = inputs[0], list(attribute(node, "kernel_shape"))
    rank = len(window)
    if attribute(node, "ceil_mode", 0) or attribute(node, "storage_order", 0):
        raise GraphError(
            "the reference for ONNX files does not know MaxPool with ceil_mode or storage_order"
        )
    function = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[rank - 1]
    places = torch.arange(x.numel(), dtype=torch.float64).reshape(x.shape)
    filled = _padded(node, x, window, float("-inf"))
    values, indices = function(
        filled,
        window,
        stride=list(attribute(node, "strides", [1] * rank)),
        dilation=list(attribute(node, "dilations", [1] * rank)),
        return_indices=True,
    )
    padded_places = _padded(node, places, window, 0.0).flatten(2).long()
    return values, padded_places.gather(2, indices.flatten(2)).reshape(indices.shape)


def _average_pool(node: onnx.NodeProto, inputs: Sequence[Tensor]) -> Tensor:
    window = list(attribute(node, "kernel_shape"))
    rank = len(window)
    if attribute(node, "ceil_mode", 0):
        raise GraphError("the reference for ONNX files does not know AveragePool with ceil_mode")
    function = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[rank - 1]
    strides = list(attribute(node, "strides", [1] * rank))
    summed = function(_padded(node, inputs[0], window, 0.0), window, stride=strides)
    if attribute(node, "count_include_pad", 0):
        return summed
    ones = torch.ones_like(inputs[0])
    return summed / function(_padded(node, ones, window, 0.0), window, stride=strides)


def _layer_norm(node: onnx.NodeProto, inputs: Sequence[Tensor]) -> Tensor:
    axis = int(attribute(node, "axis", -1)) % inputs[0].ndim
    bias = inputs[2] if len(inputs) > 2 else None
    epsilon = attribute(node, "epsilon", 1e-5)
    y = functional.layer_norm(inputs[0], inputs[0].shape[axis:], inputs[1], bias, epsilon)
    over = list(range(axis, inputs[0].ndim))
    mean = inputs[0].mean(over, keepdim=True)
    variance = inputs[0].var(over, unbiased=False, keepdim=True)
    return (y, mean, torch.rsqrt(variance + epsilon))


def _batch_norm(node: onnx.NodeProto, inputs: Sequence[Tensor]) -> Tensor:
    """Training mode gives the new running values as well, from the biased variance."""
    x, scale, bias, *old = inputs
    epsilon = attribute(node, "epsilon", 1e-5)
    if not attribute(node, "training_mode", 0):
        return functional.batch_norm(x, old[0], old[1], scale, bias, eps=epsilon)
    over = [axis for axis in range(x.ndim) if axis != 1]
    batch = (x.mean(over), x.var(over, unbiased=False))
    y = functional.batch_norm(x, *batch, scale, bias, eps=epsilon)
    momentum = float(attribute(node, "momentum", 0.9))
    kept = [
        before * momentum + now * (1.0 - momentum) for before, now in zip(old, batch, strict=True)
    ]
    return (y, *kept)


def _clip(node: onnx.NodeProto, inputs: Sequence[Tensor]) -> Tensor:
    low, high = (*inputs[1:], None, None)[:2]
    return torch.clip(inputs[0], low, high) if low is not None or high is not None else inputs[0]


def _gelu(node: onnx.NodeProto, inputs: Sequence[Tensor]) -> Tensor:
    return functional.gelu(inputs[0], approximate=attribute(node, "approximate", b"none").decode())


def _global_average(node: onnx.NodeProto, inputs: Sequence[Tensor]) -> Tensor:
    return inputs[0].mean(tuple(range(2, inputs[0].ndim)), keepdim=True)


def _pad(node: onnx.NodeProto, inputs: Sequence[Tensor]) -> Tensor:
    """Constants around, or values cut off where a size is negative."""
    if attribute(node, "mode", b"constant") != b"constant":
        raise GraphError("the reference for ONNX files knows Pad with constants only")
    sizes, axes = _integers(inputs[1]), _axes(node, inputs, 3)
    rank = inputs[0].ndim
    before, after = [0] * rank, [0] * rank
    for index, axis in enumerate(range(rank) if axes is None else axes):
        before[axis], after[axis] = sizes[index], sizes[index + len(sizes) // 2]
    order = [side[axis] for axis in reversed(range(rank)) for side in (before, after)]
    fill = inputs[2].item() if len(inputs) > 2 and inputs[2] is not None else 0
    return functional.pad(inputs[0], order, value=fill)


def _scatter_elements(node: onnx.NodeProto, inputs: Sequence[Tensor]) -> Tensor:
    axis, kind = int(attribute(node, "axis", 0)), attribute(node, "reduction", b"none")
    places = inputs[1] % inputs[0].shape[axis]
    if kind == b"none":
        return inputs[0].scatter(axis, places, inputs[2])
    if kind != b"add":
        raise GraphError("the reference for ONNX files knows ScatterElements that adds only")
    return inputs[0].scatter_add(axis, places, inputs[2])


def _triangle(node: onnx.NodeProto, inputs: Sequence[Tensor]) -> Tensor:
    diagonal = int(inputs[1].item()) if len(inputs) > 1 and inputs[1] is not None else 0
    return (torch.triu if attribute(node, "upper", 1) else torch.tril)(inputs[0], diagonal)


def _power(node: onnx.NodeProto, inputs: Sequence[Tensor]) -> Tensor:
    return inputs[0] ** inputs[1].to(inputs[0].dtype)


def _divide(node: onnx.NodeProto, inputs: Sequence[Tensor]) -> Tensor:
    whole = not inputs[0].is_floating_point()
    return torch.div(inputs[0], inputs[1], rounding_mode="trunc" if whole else None)


OPERATORS: Final[dict[str, Operator]] = {
    "Abs": _plain(torch.abs),
    "Add": _plain(torch.add),
    "And": _plain(torch.logical_and),
    "Atan": _plain(torch.atan),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Ceil": _plain(torch.ceil),
    "Clip": _clip,
    "Concat": lambda node, inputs: torch.cat(list(inputs), dim=attribute(node, "axis")),
    "ConstantOfShape": _constant_of_shape,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Cos": _plain(torch.cos),
    "Div": _divide,
    "Elu": lambda node, inputs: functional.elu(inputs[0], attribute(node, "alpha", 1.0)),
    "Equal": _plain(torch.eq),
    "Erf": _plain(torch.erf),
    "Exp": _plain(torch.exp),
    "Expand": _expand,
    "Flatten": _flatten,
    "Floor": _plain(torch.floor),
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average,
    "Greater": _plain(torch.gt),
    "GreaterOrEqual": _plain(torch.ge),
    "HardSigmoid": lambda node, inputs: torch.clip(
        attribute(node, "alpha", 0.2) * inputs[0] + attribute(node, "beta", 0.5), 0.0, 1.0
    ),
    "HardSwish": _plain(functional.hardswish),
    "Identity": lambda node, inputs: inputs[0],
    "IsNaN": _plain(torch.isnan),
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda node, inputs: functional.leaky_relu(
        inputs[0], attribute(node, "alpha", 0.01)
    ),
    "Less": _plain(torch.lt),
    "LessOrEqual": _plain(torch.le),
    "Log": _plain(torch.log),
    "LogSoftmax": _softmax(torch.log_softmax),
    "MatMul": _plain(torch.matmul),
    "Max": _fold(torch.maximum),
    "MaxPool": _max_pool,
    "Min": _fold(torch.minimum),
    "Mul": _plain(torch.mul),
    "Neg": _plain(torch.neg),
    "Not": _plain(torch.logical_not),
    "Or": _plain(torch.logical_or),
    "PRelu": lambda node, inputs: torch.where(inputs[0] < 0, inputs[0] * inputs[1], inputs[0]),
    "Pad": _pad,
    "Pow": _power,
    "Range": lambda node, inputs: torch.arange(*(each.item() for each in inputs)),
    "Reciprocal": _plain(torch.reciprocal),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMin": _reduce(torch.amin),
    "ReduceSum": _reduce(torch.sum),
    "Relu": _plain(torch.relu),
    "Reshape": _reshape,
    "Round": _plain(torch.round),
    "ScatterElements": _scatter_elements,
    "Shape": _shape,
    "Sigmoid": _plain(torch.sigmoid),
    "Sign": _plain(torch.sign),
    "Sin": _plain(torch.sin),
    "Size": lambda node, inputs: torch.tensor(inputs[0].numel()),
    "Slice": _slice,
    "Softmax": _softmax(torch.softmax),
    "Softplus": lambda node, inputs: torch.logaddexp(inputs[0], torch.zeros_like(inputs[0])),
    "Split": _split,
    "Sqrt": _plain(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _plain(torch.sub),
    "Sum": _fold(torch.add),
    "Tan": _plain(torch.tan),
    "Tanh": _plain(torch.tanh),
    "Transpose": _transpose,
    "Trilu": _triangle,
    "Unsqueeze": _unsqueeze,
    "Where": _plain(torch.where),
}
