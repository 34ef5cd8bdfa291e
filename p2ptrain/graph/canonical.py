"""Bring a traced forward graph into the form that the gradient builder and the cuts expect.

After it: linears are `Gemm` over (tokens, features) with the weight untransposed at run time,
Dropout is a product with a mask input, LayerNormalization gives its mean and inverse deviation,
the loss gives its log-probabilities, GELU is one node, and no view freezes a size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import onnx

from p2ptrain.graph.fusions import fuse_activations
from p2ptrain.graph.ir import (
    FLOAT,
    MICROSOFT,
    Graph,
    Type,
    attribute,
    from_model,
    in_place_of,
    make,
    to_model,
)
from p2ptrain.graph.shapes import infer_missing
from p2ptrain.graph.views import drop_identities, product, rewrite_views, share_equal_nodes

MASK_PREFIX: Final = "mask."
UNARY: Final = ("Gelu", "Relu", "Tanh", "Sigmoid", "Erf", "Neg", "Exp", "Sqrt", "Identity")
WITH_SCALAR: Final = ("Mul", "Add", "Sub", "Div", "Pow")


@dataclass(frozen=True, slots=True, kw_only=True)
class DropoutSite:
    """A mask input of the canonical graph and the module's own probability."""

    name: str
    probability: float


def canonicalise(graph: Graph, *, data: str) -> tuple[DropoutSite, ...]:
    """Rewrite the graph in place; gives its dropout sites. `data` is the first input."""
    complete_types(graph)
    infer_missing(graph)
    sites = replace_dropout(graph)
    fuse_gelu(graph)
    fuse_activations(graph)
    linears_to_gemm(graph, data)
    _until_settled(graph, _sink_unflattened)
    rewrite_views(graph, data)
    drop_identities(graph)
    state_extra_outputs(graph)
    share_equal_nodes(graph)
    graph.prune()
    graph.sort()
    return sites


def _until_settled(graph: Graph, step: Callable[[Graph], bool]) -> None:
    while step(graph):
        graph.sort()


def complete_types(graph: Graph) -> None:
    """Fill in axes that the tracer left open, which read as 0, where they follow from the others:
    behind a Reshape to sizes that the graph computes."""
    open_ = {name for name, known in graph.types.items() if 0 in known.axes}
    if not open_:
        return
    stated = [n for node in graph.nodes for n in node.output if n in graph.types and n not in open_]
    model = to_model(graph, values=stated)
    inferred = from_model(onnx.shape_inference.infer_shapes(model, data_prop=True)).types
    for name in open_ & inferred.keys():
        graph.types[name] = inferred[name]


def replace_dropout(graph: Graph) -> tuple[DropoutSite, ...]:
    """Dropout becomes a product with a float32 mask input; p = 0 disappears."""
    sites: list[DropoutSite] = []
    for index, node in enumerate(graph.nodes):
        if node.op_type != "Dropout":
            continue
        source, target = node.input[0], node.output[0]
        ratio = float(graph.constants[node.input[1]]) if len(node.input) > 1 else 0.5
        if ratio == 0.0:
            graph.nodes[index] = make("Identity", [source], [target])
            continue
        mask = f"{MASK_PREFIX}{len(sites)}"
        graph.inputs[mask] = graph.types[mask] = graph.types[source]
        graph.nodes[index] = in_place_of(node, make("Mul", [source, mask], [target]))
        sites.append(DropoutSite(name=mask, probability=round(ratio, 6)))
    graph.prune()
    drop_identities(graph)
    return tuple(sites)


def evaluation_form(graph: Graph) -> Graph:
    """A copy without dropout: no value is multiplied by a mask, and all keep their names."""
    copied = graph.copy()
    for index, node in enumerate(copied.nodes):
        masks = [name for name in node.input if name.startswith(MASK_PREFIX)]
        if node.op_type == "Mul" and masks:
            (source,) = (name for name in node.input if name not in masks)
            copied.nodes[index] = make("Identity", [source], node.output)
    copied.inputs = {n: t for n, t in copied.inputs.items() if not n.startswith(MASK_PREFIX)}
    return copied


def fuse_gelu(graph: Graph) -> None:
    """x * (0.5 * (1 + erf(x / sqrt 2))) becomes one Gelu node, which has a gradient of its own."""
    producers = graph.producers()
    for index, node in enumerate(graph.nodes):
        source = _gelu_source(graph, producers, node)
        if source is not None:
            gelu = make("Gelu", [source], node.output, domain=MICROSOFT)
            graph.nodes[index] = in_place_of(node, gelu)
    graph.prune()


def _gelu_source(
    graph: Graph, producers: dict[str, onnx.NodeProto], node: onnx.NodeProto
) -> str | None:
    """The x of a node that ends an exact GELU, in the two orders in which torch writes it."""
    if node.op_type != "Mul":
        return None
    for x, gate in (tuple(node.input), tuple(node.input)[::-1]):
        half = _scalar_operand(graph, producers.get(gate), "Mul", 0.5)
        one = _scalar_operand(graph, producers.get(half or ""), "Add", 1.0)
        erf = producers.get(one or "")
        if erf is None or erf.op_type != "Erf":
            continue
        scaled = producers.get(erf.input[0])
        if x in (
            _scalar_operand(graph, scaled, "Div", 2.0**0.5),
            _scalar_operand(graph, scaled, "Mul", 0.5**0.5),
        ):
            return str(x)
    return None


def _scalar_operand(graph: Graph, node: onnx.NodeProto | None, op: str, value: float) -> str | None:
    """The other operand of `node`, when it is `op` with a constant of about `value`."""
    if node is None or node.op_type != op:
        return None
    for index, name in enumerate(node.input):
        constant = graph.constants.get(name)
        if constant is not None and constant.size == 1 and abs(constant.item() - value) < 1e-6:
            return str(node.input[1 - index])
    return None


def linears_to_gemm(graph: Graph, data: str) -> None:
    """x @ W (+ b) over a parameter becomes Flatten, Gemm and a view back."""
    producers, readers = graph.producers(), graph.readers()
    for node in list(graph.nodes):
        if node.op_type != "MatMul":
            continue
        weight, transposed = _weight(graph, producers, node.input[1])
        if weight is None:
            continue
        bias = _bias(graph, readers, node)
        _emit_gemm(graph, node, weight, transposed, bias)
    graph.prune()
    graph.sort()


def _weight(
    graph: Graph, producers: dict[str, onnx.NodeProto], name: str
) -> tuple[str | None, bool]:
    made_by = producers.get(name)
    if name in graph.inputs and len(graph.axes(name)) == 2:
        return name, False
    if made_by is not None and made_by.op_type == "Transpose":
        source = str(made_by.input[0])
        if source in graph.inputs and attribute(made_by, "perm") == [1, 0]:
            return source, True
    return None, False


def _bias(
    graph: Graph, readers: dict[str, list[onnx.NodeProto]], node: onnx.NodeProto
) -> onnx.NodeProto | None:
    """The Add of a one-dimensional parameter that alone reads the product."""
    following = readers.get(node.output[0], [])
    if len(following) != 1 or following[0].op_type != "Add":
        return None
    other = [name for name in following[0].input if name != node.output[0]]
    known = bool(other) and other[0] in graph.inputs and len(graph.axes(other[0])) == 1
    return following[0] if known else None


def _emit_gemm(
    graph: Graph, node: onnx.NodeProto, weight: str, transposed: bool, bias: onnx.NodeProto | None
) -> None:
    source, final = node.input[0], (bias if bias is not None else node).output[0]
    have, want = graph.axes(source), graph.axes(final)
    flat, result = graph.fresh("flat"), graph.fresh("gemm")
    tokens = product(have[:-1])
    graph.types[flat] = Type(dtype=FLOAT, axes=(tokens, have[-1]))
    graph.types[result] = Type(dtype=FLOAT, axes=(tokens, want[-1]))
    inputs = [flat, weight]
    if bias is not None:
        inputs += [name for name in bias.input if name != node.output[0]]
        graph.nodes.remove(bias)
    at = graph.nodes.index(node)
    graph.nodes[at : at + 1] = [
        make("Flatten", [source], [flat], axis=len(have) - 1),
        in_place_of(node, make("Gemm", inputs, [result], transB=int(transposed))),
        make("Flatten", [result], [final], axis=1),  # written anew by rewrite_views
    ]


def _sink_unflattened(graph: Graph) -> bool:
    """Move one elementwise node before the view of its input, so that views meet and vanish."""
    producers, readers = graph.producers(), graph.readers()
    for node in graph.nodes:
        position = _elementwise_operand(graph, node)
        if position is None or node.output[0] in graph.outputs:
            continue
        view = producers.get(node.input[position])
        if view is None or view.op_type != "Flatten" or len(readers[view.output[0]]) > 1:
            continue
        root, target = view.input[0], node.output[0]
        if len(graph.axes(root)) >= len(graph.axes(target)):
            continue
        moved = graph.fresh("sunk")
        graph.types[moved] = graph.types[root]
        node.input[position] = root
        node.output[0] = moved
        view.input[0] = moved
        view.output[0] = target
        return True
    return False


def _elementwise_operand(graph: Graph, node: onnx.NodeProto) -> int | None:
    """Index of the one tensor that an elementwise node works on; None for other nodes."""
    if node.op_type in UNARY:
        return 0
    if node.op_type not in WITH_SCALAR:
        return None
    tensors = [
        index
        for index, name in enumerate(node.input)
        if name not in graph.constants or graph.constants[name].size != 1
    ]
    return tensors[0] if len(tensors) == 1 else None


def state_extra_outputs(graph: Graph) -> None:
    """LayerNormalization gives Mean and InvStdDev, the loss its log-probabilities."""
    for node in graph.nodes:
        if node.op_type == "LayerNormalization":
            axes = graph.axes(node.input[0])
            axis = int(attribute(node, "axis", -1)) % len(axes)
            row = Type(dtype=FLOAT, axes=(*axes[:axis], *[1] * (len(axes) - axis)))
            _add_outputs(graph, node, {"mean": row, "inverse": row})
        elif node.op_type == "SoftmaxCrossEntropyLoss":
            _add_outputs(graph, node, {"log_probability": graph.types[node.input[0]]})


def _add_outputs(graph: Graph, node: onnx.NodeProto, extra: dict[str, Type]) -> None:
    del node.output[1:]
    for stem, known in extra.items():
        name = graph.fresh(stem)
        graph.types[name] = known
        node.output.append(name)
