"""A small, mutable picture of one ONNX graph while the exporter works on it.

Nodes are `onnx.NodeProto` in topological order; constants are numpy arrays; types are known for
every value that a pass may ask about. Nothing here runs on a peer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from p2ptrain.errors import GraphError

OPSET: Final = 18
IR_VERSION: Final = 8
MICROSOFT: Final = "com.microsoft"

Axis = int | str
Array = NDArray[Any]  # Any: constants of every dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Type:
    """dtype (an onnx element type) and axes of a value; an axis is a size or a symbol."""

    dtype: int
    axes: tuple[Axis, ...]

    @property
    def dtype_name(self) -> str:
        return str(np.dtype(helper.tensor_dtype_to_np_dtype(self.dtype)).name)


FLOAT: Final = int(onnx.TensorProto.FLOAT)
INT64: Final = int(onnx.TensorProto.INT64)


@dataclass(slots=True, kw_only=True)
class Graph:
    """Inputs by name, nodes in order, constants, output names, and types of all values."""

    inputs: dict[str, Type] = field(default_factory=dict)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    types: dict[str, Type] = field(default_factory=dict)
    _fresh: int = 0

    def fresh(self, stem: str) -> str:
        """A value name that nothing uses yet."""
        self._fresh += 1
        while f"{stem}__{self._fresh}" in self.types:
            self._fresh += 1
        return f"{stem}__{self._fresh}"

    def constant(self, value: Array, stem: str = "const") -> str:
        """The name of a constant of this value; equal constants share one name."""
        for name, known in self.constants.items():
            if known.dtype == value.dtype and known.shape == value.shape and (known == value).all():
                return name
        name = self.fresh(stem)
        self.constants[name] = value
        dtype = int(helper.np_dtype_to_tensor_dtype(value.dtype))
        self.types[name] = Type(dtype=dtype, axes=tuple(value.shape))
        return name

    def axes(self, name: str) -> tuple[Axis, ...]:
        """Axes of a value.

        Raises:
            GraphError: its type is not known; the pass that made it forgot to say.
        """
        if name not in self.types:
            raise GraphError(f"the shape of graph value {name!r} is not known")
        return self.types[name].axes

    def producers(self) -> dict[str, onnx.NodeProto]:
        """The node that makes each value."""
        return {output: node for node in self.nodes for output in node.output if output}

    def readers(self) -> dict[str, list[onnx.NodeProto]]:
        """The nodes that read each value, in order; once per node."""
        found: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                found.setdefault(name, []).append(node)
        return found

    def rename(self, old: str, new: str) -> None:
        """Let every reader of `old`, and the outputs, use `new`."""
        for node in self.nodes:
            for index, name in enumerate(node.input):
                if name == old:
                    node.input[index] = new
        self.outputs = [new if name == old else name for name in self.outputs]

    def copy(self) -> Graph:
        """An independent copy; constants are shared, they are never written to."""
        nodes = []
        for node in self.nodes:
            copied = onnx.NodeProto()
            copied.CopyFrom(node)
            nodes.append(copied)
        return Graph(
            inputs=dict(self.inputs),
            nodes=nodes,
            constants=dict(self.constants),
            outputs=list(self.outputs),
            types=dict(self.types),
            _fresh=self._fresh,
        )

    def prune(self) -> None:
        """Drop nodes and constants that no output needs; keep the inputs."""
        needed = set(self.outputs)
        kept = []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                kept.append(node)
        self.nodes = kept[::-1]
        self.constants = {n: v for n, v in self.constants.items() if n in needed}

    def sort(self) -> None:
        """Put the nodes into topological order, stable in their present order.

        Raises:
            GraphError: a cycle, or a value that nothing makes.
        """
        ready = set(self.inputs) | set(self.constants) | {""}
        waiting, ordered = list(self.nodes), []
        while waiting:
            later = []
            for node in waiting:
                if all(name in ready for name in node.input):
                    ready.update(node.output)
                    ordered.append(node)
                else:
                    later.append(node)
            if len(later) == len(waiting):
                missing = sorted({n for n in later[0].input if n not in ready})
                raise GraphError(f"nothing makes {missing}, read by {later[0].op_type}")
            waiting = later
        self.nodes = ordered


def depth_first(graph: Graph) -> None:
    """Order the nodes by walking down from the outputs: equal graphs get equal orders."""
    producers = graph.producers()
    done: set[int] = set()
    ordered: list[onnx.NodeProto] = []
    for output in graph.outputs:
        stack = [(producers[output], 0)] if output in producers else []
        while stack:
            node, position = stack.pop()
            if id(node) in done:
                continue
            if position == len(node.input):
                done.add(id(node))
                ordered.append(node)
                continue
            stack.append((node, position + 1))
            below = producers.get(node.input[position])
            if below is not None and id(below) not in done:
                stack.append((below, 0))
    graph.nodes = ordered


def apply_names(graph: Graph, names: Mapping[str, str]) -> None:
    """Rename values everywhere: inputs, nodes, constants, outputs, types."""

    def new(name: str) -> str:
        return names.get(name, name)

    for node in graph.nodes:
        node.input[:] = [new(name) for name in node.input]
        node.output[:] = [new(name) for name in node.output]
    graph.inputs = {new(n): t for n, t in graph.inputs.items()}
    graph.constants = {new(n): v for n, v in graph.constants.items()}
    graph.outputs = [new(name) for name in graph.outputs]
    graph.types = {new(n): t for n, t in graph.types.items()}


def make(op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> Any:
    """One node. `domain=` may be given. (Any: attribute values, and an untyped library.)"""
    return helper.make_node(op, list(inputs), list(outputs), **attributes)


def in_place_of(old: onnx.NodeProto, new: onnx.NodeProto) -> onnx.NodeProto:
    """The new node, said to come from where the old one came from."""
    new.metadata_props.extend(old.metadata_props)
    return new


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """An attribute's value, or the default. (Any: attributes are of every type.)"""
    for candidate in node.attribute:
        if candidate.name == name:
            return helper.get_attribute_value(candidate)
    return default


def full_name(node: onnx.NodeProto) -> str:
    """Operator with its domain, as the registries and messages spell it."""
    return f"{node.domain}.{node.op_type}" if node.domain else str(node.op_type)


def from_model(model: onnx.ModelProto) -> Graph:
    """Read a model; Constant nodes become constants, value types come from its value_info."""
    graph = Graph()
    proto = model.graph
    for tensor in proto.initializer:
        graph.constants[tensor.name] = numpy_helper.to_array(tensor)
    for value in (*proto.input, *proto.value_info, *proto.output):
        if _is_known(value):
            graph.types[value.name] = _type_of(value)
    graph.inputs = {
        v.name: graph.types[v.name] for v in proto.input if v.name not in graph.constants
    }
    for node in proto.node:
        if node.op_type == "Constant" and not node.domain:
            graph.constants[node.output[0]] = _constant_value(node)
        else:
            kept = onnx.NodeProto()
            kept.CopyFrom(node)
            graph.nodes.append(kept)
    for name, constant in graph.constants.items():
        dtype = int(helper.np_dtype_to_tensor_dtype(constant.dtype))
        graph.types[name] = Type(dtype=dtype, axes=tuple(constant.shape))
    graph.outputs = [value.name for value in proto.output]
    return graph


def _is_known(value: onnx.ValueInfoProto) -> bool:
    """Whether every axis has a size or a name; a tracer leaves some without either."""
    tensor = value.type.tensor_type
    known = (d.HasField("dim_param") or d.HasField("dim_value") for d in tensor.shape.dim)
    return bool(tensor.HasField("shape")) and all(known)


def _type_of(value: onnx.ValueInfoProto) -> Type:
    tensor = value.type.tensor_type
    axes = tuple(d.dim_param if d.dim_param else int(d.dim_value) for d in tensor.shape.dim)
    return Type(dtype=int(tensor.elem_type), axes=axes)


def _constant_value(node: onnx.NodeProto) -> Array:
    for kind, dtype in (("value_int", np.int64), ("value_float", np.float32)):
        value = attribute(node, kind)
        if value is not None:
            return np.array(value, dtype)
    for kind, dtype in (("value_ints", np.int64), ("value_floats", np.float32)):
        value = attribute(node, kind)
        if value is not None:
            return np.array(list(value), dtype)
    return np.asarray(numpy_helper.to_array(attribute(node, "value")))


def to_model(graph: Graph, *, name: str = "graph", values: Iterable[str] = ()) -> onnx.ModelProto:
    """Write a model at opset 18, IR 8; `values` are the extra values whose types it states."""
    inputs = [_info(graph, n) for n in graph.inputs]
    outputs = [_info(graph, n) for n in graph.outputs]
    tensors = [numpy_helper.from_array(v, n) for n, v in graph.constants.items()]
    stated = [_info(graph, n) for n in values if n not in graph.inputs and n not in graph.outputs]
    proto = helper.make_graph(
        graph.nodes, name, inputs, outputs, initializer=tensors, value_info=stated
    )
    imports = [helper.make_opsetid("", OPSET)]
    if any(node.domain == MICROSOFT for node in graph.nodes):
        imports.append(helper.make_opsetid(MICROSOFT, 1))
    return helper.make_model(proto, opset_imports=imports, ir_version=IR_VERSION)


def _info(graph: Graph, name: str) -> onnx.ValueInfoProto:
    known = graph.types[name] if name in graph.types else graph.inputs[name]
    return helper.make_tensor_value_info(name, known.dtype, list(known.axes))
