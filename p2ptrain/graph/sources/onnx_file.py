"""A source from an ONNX inference file: its float initialisers become parameters again.

Which initialisers were trained is not written anywhere. Taken are those that differentiable
operators read where they read weights (a convolution's kernel, an embedding's rows, an operand of
an addition); left as constants are single numbers and additive masks, whose values are so large
that no training made them. `--freeze` leaves out more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, shape_inference, version_converter

from p2ptrain.bundle.manifest import BATCH, Initialiser
from p2ptrain.errors import ConfigError, GraphError
from p2ptrain.graph.ir import FLOAT, OPSET, Graph, apply_names, attribute, from_model
from p2ptrain.graph.source import LABELS, LOGITS, LOSS_WEIGHT, Source, Traced
from p2ptrain.graph.sources.inputs import INPUT_DTYPES, SEQUENCE, Input
from p2ptrain.graph.sources.losses import append_loss
from p2ptrain.graph.sources.onnx_reference import OnnxReference
from p2ptrain.graph.sources.requests import Request
from p2ptrain.graph.sources.simplify import simplify
from p2ptrain.graph.sources.tasks import (
    Images,
    Text,
    choose_task,
    data_section,
    example_of,
    refuse_misfit,
)

Array = NDArray[Any]  # Any: every dtype

WEIGHT_OPERANDS: Final = {
    "BatchNormalization": (1, 2),
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Gather": (0,),
    "Gemm": (0, 1, 2),
    "GRU": (1, 2, 3),
    "GroupNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "LSTM": (1, 2, 3),
    "MatMul": (0, 1),
    "PRelu": (1,),
}
TABLE_OPERANDS: Final = ("Add", "Concat", "Div", "Mul", "Sub")
"""Any operand with more than one element."""
VIEWS: Final = (
    "Cast",
    "Expand",
    "Identity",
    "Reshape",
    "Slice",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)
MASK_FROM: Final = 1e4
"""A larger number in an operand says that it is a mask."""


def file_source(path: Path, request: Request) -> Source:
    """Read the file, find its parameters and put a loss behind its first output.

    Raises:
        ConfigError: the file cannot be read or converted, or options do not fit it.
        GraphError: the file has operators that cannot be checked.
    """
    if request.task is None:
        raise ConfigError(f"{path}: an ONNX file does not say its task", hint="give --task")
    task = choose_task(request.task, loss=request.loss, label_smoothing=request.label_smoothing)
    model = _load(path)
    inputs = _inputs(model, request)
    _name_axes(model, inputs)
    parameters = _parameters(model)
    running = _running(model)
    weights = _move(model, {*parameters, *running})
    reference_graph = _graph(model, simplified=False)
    training = Traced(graph=_graph(model, simplified=True), parameters=parameters)
    context = _context(inputs, request)
    reference = OnnxReference(
        graph=reference_graph,
        data_inputs=tuple(inputs),
        parameters=parameters,
        loss=task.loss,
    )
    logits = _result_shape(reference, inputs, weights, context)
    axes = training.graph.axes(LOGITS)
    refuse_misfit(task, axes)
    inference = Traced(graph=_without_dropout(training.graph.copy()), parameters=parameters)
    append_loss(training.graph, task.loss)
    text = _text(inputs, reference_graph, weights, context)
    return Source(
        name=request.name,
        description=request.description,
        task=task.name,
        loss=task.loss,
        data=data_section(
            task, text=text, images=Images() if _is_image(inputs) else None, classes=logits[-1]
        ),
        data_inputs=tuple(inputs),
        training=training,
        inference=inference,
        initialisers={name: _initialiser(value) for name, value in weights.items()},
        reference=reference,
        weights=weights if request.use_weights else {},
        example=example_of(task, _bounded(inputs, text), logits, sequence=context),
    )


def _load(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
        version = next(e.version for e in model.opset_import if e.domain in ("", "ai.onnx"))
        if version != OPSET:
            _expand_gelu(model)
            model = version_converter.convert_version(model, OPSET)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # protobuf, the checker and the converter have their own
        raise ConfigError(
            f"{path}: not an ONNX model that can be written at opset {OPSET}: "
            + str(error).strip().partition("\n")[0]
        ) from error
    large = [t.name for t in model.graph.initializer if t.data_type in (10, 11, 16)]
    if large:  # float16, float64, bfloat16
        raise ConfigError(f"{path}: {large[0]!r} is not float32", hint="convert it to float32")
    return model


def _expand_gelu(model: onnx.ModelProto) -> None:
    """Exact Gelu, which opset 18 lacks and the converter refuses, as x * (0.5 * (1 + erf(...)))."""
    nodes = []
    for node in model.graph.node:
        if (
            node.op_type != "Gelu"
            or node.domain
            or attribute(node, "approximate", b"none") != b"none"
        ):
            nodes.append(node)
            continue
        x, stem = node.input[0], f"{node.output[0]}.gelu"
        numbers = {"root": 2.0**0.5, "one": 1.0, "half": 0.5}
        for name, number in numbers.items():
            value = onnx.numpy_helper.from_array(np.array(number, np.float32), f"{stem}.{name}")
            model.graph.initializer.append(value)
        nodes += [
            helper.make_node("Div", [x, f"{stem}.root"], [f"{stem}.scaled"]),
            helper.make_node("Erf", [f"{stem}.scaled"], [f"{stem}.erf"]),
            helper.make_node("Add", [f"{stem}.erf", f"{stem}.one"], [f"{stem}.above"]),
            helper.make_node("Mul", [f"{stem}.above", f"{stem}.half"], [f"{stem}.gate"]),
            helper.make_node("Mul", [x, f"{stem}.gate"], list(node.output)),
        ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _inputs(model: onnx.ModelProto, request: Request) -> dict[str, Input]:
    """Data inputs: batch first; an integer input's free second axis is the sequence."""
    held = {tensor.name for tensor in model.graph.initializer}
    found: dict[str, Input] = {}
    for value in model.graph.input:
        if value.name in held:
            continue
        tensor = value.type.tensor_type
        dtype = str(helper.tensor_dtype_to_np_dtype(tensor.elem_type).name)
        if dtype not in INPUT_DTYPES or not tensor.shape.dim:
            raise ConfigError(
                f"input {value.name!r} is {dtype} with {len(tensor.shape.dim)} axes",
                hint=f"data inputs are {' or '.join(INPUT_DTYPES)} with the batch first",
            )
        if value.name in (LABELS, LOSS_WEIGHT):
            raise ConfigError(f"the file has an input {value.name!r}: it is not an inference file")
        axes = [BATCH]
        for position, axis in enumerate(tensor.shape.dim[1:], start=1):
            free = axis.dim_value < 1
            if free and (position > 1 or dtype != "int64"):
                raise ConfigError(f"axis {position} of input {value.name!r} has no size")
            axes.append(SEQUENCE if free else str(axis.dim_value))
        found[value.name] = Input(
            name=value.name,
            dtype=dtype,
            axes=tuple(axes),
            is_padding_mask=dtype == "int64" and "mask" in value.name,
        )
    if not found:
        raise ConfigError("the file has no data input")
    return found


def _name_axes(model: onnx.ModelProto, inputs: dict[str, Input]) -> None:
    """Write our symbols into the inputs and infer all shapes anew."""
    for value in model.graph.input:
        if value.name in inputs:
            dims = value.type.tensor_type.shape.dim
            for dim, axis in zip(dims, inputs[value.name].axes, strict=True):
                dim.Clear()
                if axis.isdigit():
                    dim.dim_value = int(axis)
                else:
                    dim.dim_param = axis
    del model.graph.value_info[:]
    result = model.graph.output[0]
    del model.graph.output[1:]
    result.type.tensor_type.ClearField("shape")
    model.CopyFrom(shape_inference.infer_shapes(model, data_prop=True))


def _parameters(model: onnx.ModelProto) -> tuple[str, ...]:
    """Initialisers that were trained, in the file's order; see the module's first lines."""
    readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            readers.setdefault(name, []).append((node, position))

    def is_weight(name: str, elements: int) -> bool:
        for node, position in readers.get(name, []):
            if position in WEIGHT_OPERANDS.get(node.op_type, ()):
                return True
            if node.op_type in TABLE_OPERANDS and elements > 1:
                return True
            if node.op_type in VIEWS and position == 0 and is_weight(node.output[0], elements):
                return True
        return False

    found = []
    for tensor in model.graph.initializer:
        if tensor.data_type != FLOAT or not is_weight(tensor.name, int(np.prod(tensor.dims))):
            continue
        if not np.abs(onnx.numpy_helper.to_array(tensor)).max(initial=0.0) < MASK_FROM:
            continue
        found.append(str(tensor.name))
    if not found:
        raise ConfigError("the file has no initialiser that could be trained")
    return tuple(found)


def _running(model: onnx.ModelProto) -> tuple[str, ...]:
    nodes = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    return tuple(dict.fromkeys(name for node in nodes for name in node.input[3:5]))


def _move(model: onnx.ModelProto, names: set[str]) -> dict[str, Array]:
    """Initialisers of these names become inputs; gives their values."""
    values: dict[str, Array] = {}
    kept = []
    declared = {value.name for value in model.graph.input}
    for tensor in model.graph.initializer:
        if tensor.name not in names:
            kept.append(tensor)
            continue
        values[tensor.name] = np.array(onnx.numpy_helper.to_array(tensor))
        if tensor.name not in declared:
            model.graph.input.append(
                helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return values


def _graph(model: onnx.ModelProto, *, simplified: bool) -> Graph:
    graph = from_model(simplify(_copy(model)) if simplified else model)
    apply_names(graph, {graph.outputs[0]: LOGITS})
    return graph


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    return copied


def _without_dropout(graph: Graph) -> Graph:
    """Evaluation mode: dropout passes its input on."""
    for node in graph.nodes:
        if node.op_type == "Dropout":
            node.op_type = "Identity"
            del node.input[1:], node.output[1:], node.attribute[:]
    return graph


def _context(inputs: dict[str, Input], request: Request) -> int:
    """Tokens of a sample: free, then as asked for; or fixed by the file."""
    for each in inputs.values():
        if SEQUENCE in each.axes:
            if request.context is None:
                raise ConfigError("the file leaves the sequence open", hint="give --context")
            return request.context
        if each.dtype == "int64" and len(each.axes) == 2:
            return int(each.axes[1])
    return 0


def _result_shape(
    reference: OnnxReference, inputs: dict[str, Input], weights: dict[str, Array], context: int
) -> tuple[int, ...]:
    """Of the logits for the example's batch; a file made for one batch size shows here."""
    generator = np.random.Generator(np.random.Philox(12))
    feeds = {n: i.example(generator, batch=3, sequence=context) for n, i in inputs.items()}
    for name, each in inputs.items():
        if each.dtype == "int64":
            feeds[name] = np.minimum(feeds[name], 1)
    try:
        shape = reference.infer(weights, feeds).shape
    except (RuntimeError, IndexError) as error:
        raise ConfigError(
            f"the file does not run with a batch of 3: {str(error).partition(chr(10))[0]}",
            hint="export it with a free batch axis",
        ) from error
    if not shape or shape[0] != 3:
        raise ConfigError(f"the file's first output has shape {shape} for a batch of 3")
    return tuple(int(size) for size in shape)


def _text(
    inputs: dict[str, Input], graph: Graph, weights: dict[str, Array], context: int
) -> Text | None:
    """Token ids are what an embedding is read by: its rows are the vocabulary."""
    if not context:
        return None
    for node in graph.nodes:
        if node.op_type == "Gather" and node.input[1] in inputs and node.input[0] in weights:
            return Text(vocabulary=int(weights[node.input[0]].shape[0]), context=context)
    raise GraphError("no embedding reads an input of the file, so its vocabulary is unknown")


def _bounded(inputs: dict[str, Input], text: Text | None) -> tuple[Input, ...]:
    """Inputs whose integers lie below the vocabulary."""
    if text is None:
        return tuple(inputs.values())
    return tuple(
        each
        if each.dtype != "int64" or each.is_padding_mask
        else Input(name=each.name, dtype=each.dtype, axes=each.axes, high=text.vocabulary)
        for each in inputs.values()
    )


def _is_image(inputs: dict[str, Input]) -> bool:
    (first, *others) = inputs.values()
    return not others and first.dtype == "float32" and len(first.axes) == 4


def _initialiser(value: Array) -> Initialiser:
    low, high = float(value.min()), float(value.max())
    if low == high and low in (0.0, 1.0):
        return Initialiser(kind="ones" if low else "zeros")
    return Initialiser(
        kind="normal", scale=round(float((value.astype(float) ** 2).mean() ** 0.5), 9)
    )
