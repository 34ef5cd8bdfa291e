"""What an ONNX file says, read without onnx and without trusting it.

A peer reads a graph here before onnxruntime sees it. Only the fields that the exporter writes are
known, and a file with any other is refused: graphs inside nodes, functions, data in other files,
sequences, strings. Nothing is allocated for what the file merely claims: weights stay where they
are, and of every list at most a fixed number of entries is taken. Messages nest to a fixed depth,
one function each, so that no file makes the reader recurse.

Source of the field numbers: onnx.proto of ONNX 1.17, proto2 wire format.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from p2ptrain import limits
from p2ptrain.errors import BundleError

ELEMENT_BYTES: Final = {
    "float32": 4, "uint8": 1, "int8": 1, "int32": 4, "int64": 8, "bool": 1, "float16": 2,
    "float64": 8,
}  # fmt: skip
"""Every dtype that a graph may hold."""
INTEGERS_KEPT_MAX: Final = limits.RANK_MAX

_DTYPES: Final = {
    1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16",
    11: "float64",
}  # fmt: skip
_DATA_FIELDS: Final = {"float32": "float_data", "float64": "double_data", "int64": "int64_data"}
_FIXED_DATA: Final = {"raw_data", "float_data", "double_data"}
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_VARINT_BYTES_MAX: Final = 10
_INT64_MAX: Final = (1 << 63) - 1
_OPSETS_MAX: Final = 8
_CONTINUED: Final = bytes(range(128, 256))


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphValue:
    """A declared input or output."""

    name: str
    dtype: str
    axes: tuple[int | str | None, ...] | None
    """Each a size, a symbol or unknown; None: the file states no shape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """An initialiser, or a tensor among a node's attributes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    integers: tuple[int, ...] | None
    """The values of a short int64 tensor: sizes and axes of other nodes; None for all else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One operator; optional inputs and outputs that are left out have an empty name."""

    domain: str
    """Empty for the standard one."""
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxGraph:
    """A whole file."""

    ir: int
    opsets: Mapping[str, int]
    """By domain."""
    inputs: tuple[GraphValue, ...]
    outputs: tuple[GraphValue, ...]
    initialisers: tuple[Constant, ...]
    nodes: tuple[Node, ...]


def read_graph(content: bytes) -> OnnxGraph:
    """Read one ONNX file.

    Raises:
        BundleError: longer than `limits` allow, not a well-formed ONNX file, or one with parts
            that a bundle's graph may not have; names the part.
    """
    if len(content) > limits.GRAPH_BYTES_MAX:
        raise BundleError(f"a graph of {len(content)} bytes is over the limit")
    return _Reader(content).model()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Field:
    """A field that a message may have; one with `at_most` 0 is passed over."""

    name: str
    at_most: int


_Span = tuple[int, int]
"""Start and end in the file; of a number: its value, and 0."""
_Message = dict[str, list[_Span]]


def _number(number: int, name: str, at_most: int = 1) -> tuple[int, _Field]:
    return number << 3 | _VARINT, _Field(name=name, at_most=at_most)


def _bytes(number: int, name: str, at_most: int = 1) -> tuple[int, _Field]:
    return number << 3 | _LENGTH, _Field(name=name, at_most=at_most)


_MODEL: Final = dict((
    _number(1, "ir"), _bytes(2, "producer", 0), _bytes(3, "producer version", 0),
    _bytes(4, "domain", 0), _number(5, "model version", 0), _bytes(6, "text", 0),
    _bytes(7, "graph"), _bytes(8, "opset", _OPSETS_MAX), _bytes(14, "properties", 0),
))  # fmt: skip
_OPSET: Final = dict((_bytes(1, "domain"), _number(2, "version")))
_GRAPH: Final = dict((
    _bytes(1, "node", limits.GRAPH_NODES_MAX), _bytes(2, "name", 0),
    _bytes(5, "initialiser", limits.GRAPH_VALUES_MAX), _bytes(10, "text", 0),
    _bytes(11, "input", limits.GRAPH_VALUES_MAX), _bytes(12, "output", limits.GRAPH_VALUES_MAX),
    _bytes(13, "value", 0),
))  # fmt: skip
_NODE: Final = dict((
    _bytes(1, "input", limits.NODE_VALUES_MAX), _bytes(2, "output", limits.NODE_VALUES_MAX),
    _bytes(3, "name", 0), _bytes(4, "operator"),
    _bytes(5, "attribute", limits.NODE_ATTRIBUTES_MAX), _bytes(6, "text", 0), _bytes(7, "domain"),
))  # fmt: skip
_ATTRIBUTE: Final = dict((
    _bytes(1, "name"), (2 << 3 | _FIXED32, _Field(name="float", at_most=0)),
    _number(3, "integer", 0), _bytes(4, "string", 0), _bytes(5, "tensor"),
    (7 << 3 | _FIXED32, _Field(name="floats", at_most=0)), _bytes(7, "floats", 0),
    _number(8, "integers", 0), _bytes(8, "integers", 0), _bytes(9, "strings", 0),
    _bytes(13, "text", 0), _number(20, "type", 0), _bytes(6, "graph"), _bytes(11, "graph"),
))  # fmt: skip
_TENSOR: Final = dict((
    _number(1, "shape", limits.RANK_MAX), _bytes(1, "packed shape"), _number(2, "dtype"),
    _bytes(4, "float_data"), _bytes(5, "int32_data"), _bytes(7, "int64_data"), _bytes(8, "name"),
    _bytes(9, "raw_data"), _bytes(10, "double_data"), _bytes(12, "text", 0),
    _bytes(13, "external", 64), _number(14, "location"),
))  # fmt: skip
_VALUE: Final = dict((_bytes(1, "name"), _bytes(2, "type"), _bytes(3, "text", 0)))
_TYPE: Final = dict((_bytes(1, "tensor"), _bytes(6, "meaning", 0)))
_TENSOR_TYPE: Final = dict((_number(1, "dtype"), _bytes(2, "shape")))
_SHAPE: Final = dict((_bytes(1, "axis", limits.RANK_MAX),))
_AXIS: Final = dict((_number(1, "size"), _bytes(2, "symbol"), _bytes(3, "meaning", 0)))


class _Reader:
    """Reads one file; counts fields, so that no file keeps it busy for long."""

    __slots__ = ("_content", "_fields_left")

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._fields_left = limits.GRAPH_FIELDS_MAX

    def model(self) -> OnnxGraph:
        message = self._message("model", _MODEL, (0, len(self._content)))
        opsets: dict[str, int] = {}
        for span in message["opset"]:
            opset = self._message("opset", _OPSET, span)
            domain = _standard(self._text(opset, "domain"))
            if domain in opsets:
                raise BundleError(f"the graph states two opsets of domain {domain!r:.80}")
            opsets[domain] = _value(opset, "version")
        graph = self._message("graph", _GRAPH, _only(message, "graph", "model"))
        return OnnxGraph(
            ir=_value(message, "ir"),
            opsets=opsets,
            inputs=tuple(self._declared(span) for span in graph["input"]),
            outputs=tuple(self._declared(span) for span in graph["output"]),
            initialisers=tuple(self._constant(span) for span in graph["initialiser"]),
            nodes=tuple(self._node(span) for span in graph["node"]),
        )

    def _declared(self, span: _Span) -> GraphValue:
        message = self._message("value", _VALUE, span)
        name = self._text(message, "name")
        kind = self._message("type", _TYPE, _only(message, "type", f"value {name!r:.80}"))
        tensor = self._message(
            "tensor type", _TENSOR_TYPE, _only(kind, "tensor", f"value {name!r:.80}")
        )
        axes = None
        if tensor["shape"]:
            shape = self._message("shape", _SHAPE, tensor["shape"][0])
            axes = tuple(self._axis(axis) for axis in shape["axis"])
        return GraphValue(name=name, dtype=_dtype(tensor, name), axes=axes)

    def _axis(self, span: _Span) -> int | str | None:
        message = self._message("axis", _AXIS, span)
        if message["symbol"]:
            return self._text(message, "symbol") or None
        if not message["size"]:
            return None
        return _size(message["size"][0][0])

    def _node(self, span: _Span) -> Node:
        message = self._message("node", _NODE, span)
        operator = self._text(message, "operator")
        return Node(
            domain=_standard(self._text(message, "domain")),
            operator=operator,
            inputs=tuple(self._decoded(value) for value in message["input"]),
            outputs=tuple(self._decoded(value) for value in message["output"]),
            attributes=tuple(self._attribute(each, operator) for each in message["attribute"]),
        )

    def _attribute(self, span: _Span, operator: str) -> str:
        message = self._message(f"attribute of {operator:.80}", _ATTRIBUTE, span)
        if message["graph"]:
            raise BundleError(f"node {operator!r:.80} holds a graph of its own")
        for tensor in message["tensor"]:
            self._constant(tensor)
        return self._text(message, "name")

    def _constant(self, span: _Span) -> Constant:
        message = self._message("tensor", _TENSOR, span)
        name = self._text(message, "name")
        if message["external"] or any(value for value, _ in message["location"]):
            raise BundleError(f"tensor {name!r:.80} lies in another file")
        dtype = _dtype(message, name)
        shape = self._constant_shape(message)
        elements = math.prod(shape)
        if elements > limits.TENSOR_ELEMENTS_MAX:
            raise BundleError(f"tensor {name!r:.80} has {elements} elements, over the limit")
        field, data = self._data(message, dtype, name)
        if field in _FIXED_DATA:
            fits = data[1] - data[0] == elements * ELEMENT_BYTES[dtype]
        else:
            fits = self._varint_count(data) == elements
        if not fits:
            raise BundleError(f"tensor {name!r:.80} does not hold the {elements} elements it has")
        short = dtype == "int64" and len(shape) <= 1 and elements <= INTEGERS_KEPT_MAX
        integers = self._integers(field, data) if short else None
        return Constant(name=name, dtype=dtype, shape=shape, integers=integers)

    def _constant_shape(self, message: _Message) -> tuple[int, ...]:
        sizes = [value for value, _ in message["shape"]]
        for span in message["packed shape"]:
            if self._varint_count(span) > limits.RANK_MAX:
                raise BundleError("a tensor has too many axes")
            sizes += self._varints(span)
        if len(sizes) > limits.RANK_MAX:
            raise BundleError("a tensor has too many axes")
        return tuple(_size(value) for value in sizes)

    def _data(self, message: _Message, dtype: str, name: str) -> tuple[str, _Span]:
        """Which field holds the elements, and where; an empty span where none does."""
        typed = _DATA_FIELDS.get(dtype, "int32_data")
        known = {"raw_data", "float_data", "double_data", "int32_data", "int64_data"}
        held = [field for field in known if message[field]]
        if not held:
            return "raw_data", (0, 0)
        if len(held) > 1 or held[0] not in ("raw_data", typed):
            raise BundleError(f"tensor {name!r:.80} has data of another type")
        return held[0], message[held[0]][0]

    def _integers(self, field: str, data: _Span) -> tuple[int, ...]:
        if field == "raw_data":
            return struct.unpack(f"<{(data[1] - data[0]) // 8}q", self._content[slice(*data)])
        return tuple(v - (1 << 64) if v > _INT64_MAX else v for v in self._varints(data))

    def _varint_count(self, span: _Span) -> int:
        return len(self._content[slice(*span)].translate(None, _CONTINUED))

    def _varints(self, span: _Span) -> list[int]:
        """Packed numbers; the caller has counted them."""
        position, end = span
        values = []
        while position < end:
            value, position = self._varint(position, end)
            values.append(value)
        return values

    def _text(self, message: _Message, field: str) -> str:
        return self._decoded(message[field][0]) if message[field] else ""

    def _decoded(self, span: _Span) -> str:
        if span[1] - span[0] > limits.NAME_BYTES_MAX:
            raise BundleError(f"a name in the graph has {span[1] - span[0]} bytes")
        try:
            return self._content[slice(*span)].decode()
        except UnicodeDecodeError as error:
            raise BundleError("a name in the graph is not text") from error

    def _message(self, what: str, fields: Mapping[int, _Field], span: _Span) -> _Message:
        """Where each field of one message lies; BundleError for unknown or too many of them."""
        found: _Message = {field.name: [] for field in fields.values()}
        for key, start, end in self._split(span):
            field = fields.get(key)
            if field is None:
                raise BundleError(f"the graph's {what} has a field {key >> 3} of kind {key & 7}")
            if field.at_most:
                spans = found[field.name]
                if len(spans) == field.at_most:
                    raise BundleError(f"the graph's {what} has more than {len(spans)} {field.name}")
                spans.append((start, end))
        return found

    def _split(self, span: _Span) -> Iterator[tuple[int, int, int]]:
        """Key, start and end of every field; of a number: key, value, 0."""
        position, end = span
        while position < end:
            self._fields_left -= 1
            if self._fields_left < 0:
                raise BundleError("the graph has too many parts")
            key, position = self._varint(position, end)
            wire = key & 7
            if wire == _VARINT:
                value, position = self._varint(position, end)
                yield key, value, 0
                continue
            if wire == _LENGTH:
                length, position = self._varint(position, end)
            elif wire in (_FIXED32, _FIXED64):
                length = 4 if wire == _FIXED32 else 8
            else:
                raise BundleError("the graph is not a well-formed ONNX file")
            if length > end - position:
                raise BundleError("the graph is cut short")
            yield key, position, position + length
            position += length

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        if position < end and self._content[position] < 0x80:  # nearly all of them
            return self._content[position], position + 1
        value = shift = 0
        for index in range(position, min(end, position + _VARINT_BYTES_MAX)):
            byte = self._content[index]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFF_FFFF_FFFF_FFFF, index + 1
            shift += 7
        raise BundleError("the graph is cut short, or a number in it is too long")


def _value(message: _Message, field: str) -> int:
    return message[field][0][0] if message[field] else 0


def _only(message: _Message, field: str, owner: str) -> _Span:
    if not message[field]:
        raise BundleError(f"the graph's {owner} has no {field}")
    return message[field][0]


def _dtype(message: _Message, name: str) -> str:
    code = _value(message, "dtype")
    dtype = _DTYPES.get(code)
    if dtype is None:
        raise BundleError(f"value {name!r:.80} has a dtype that no graph may have: {code}")
    return dtype


def _size(value: int) -> int:
    if value > limits.TENSOR_ELEMENTS_MAX:
        raise BundleError(f"an axis in the graph has size {value}")
    return value


def _standard(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain
