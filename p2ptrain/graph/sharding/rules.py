"""What each operator does with slices and sums: one rule per operator, in a registry.

A rule is given operands of which at least one is sliced, none partial. It asks the sharder for
each operand as it needs it, emits the node and says where its outputs are. An operator without a
rule gets whole operands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import onnx

from p2ptrain.errors import InvariantBroken
from p2ptrain.graph.ir import attribute, full_name
from p2ptrain.graph.sharding.families import Blocked
from p2ptrain.graph.sharding.placements import WHOLE, Partial, Sliced, reshaped, sliced
from p2ptrain.graph.sharding.sharder import ALL, Sharder

Rule = Callable[[Sharder, onnx.NodeProto], None]
RULES: Final[dict[str, Rule]] = {}

ELEMENTWISE: Final = (
    "Abs", "Add", "And", "Cast", "Ceil", "Clip", "Cos", "Div", "Elu", "Equal", "Erf", "Exp",
    "Floor", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN",
    "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Mean", "Min", "Mod", "Mul", "Neg", "Not",
    "Or", "Pow", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus",
    "Softsign", "Sqrt", "Sub", "Sum", "Tanh", "Where", "Xor",
)  # fmt: skip


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Register a rule for these operators."""

    def register(found: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators, found))
        return found

    return register


def needs_whole(s: Sharder, node: onnx.NodeProto, why: str = "") -> None:
    """The node as it was, on whole operands."""
    why = why or f"{full_name(node)} is not computed slice by slice"
    inputs = [s.whole(name, why) if name else "" for name in node.input]
    s.put(node, inputs, *[WHOLE for name in node.output if name])


def place_of(s: Sharder, name: str) -> Sliced | None:
    """How an operand is sliced; None: it is not."""
    place = s.place(name) if name else WHOLE
    return place if isinstance(place, Sliced) else None


@rule(*ELEMENTWISE)
def elementwise(s: Sharder, node: onnx.NodeProto) -> None:
    """Operands are sliced along the same axis of the result, or are one element wide there."""
    rank = len(s.axes(node.output[0]))
    target = _aligned(s, node, rank)
    inputs = [_operand(s, name, target, rank) if name else "" for name in node.input]
    s.put(node, inputs, target)


def _aligned(s: Sharder, node: onnx.NodeProto, rank: int) -> Sliced:
    """The first slice, as an axis of the result."""
    for name in node.input:
        place = place_of(s, name)
        if place is not None:
            return place.at(place.axis + rank - len(s.axes(name)))
    raise InvariantBroken("a rule was called without a slice")


def _operand(s: Sharder, name: str, target: Sliced, rank: int) -> str:
    axes = s.axes(name)
    axis = target.axis - (rank - len(axes))
    if axis < 0 or axes[axis] == 1:
        return s.whole(name, f"an operand of all shards is divided: {name!r}")
    return s.sliced(name, target.at(axis))


@rule("Softmax", "LogSoftmax", "CumSum")
def along_an_axis(s: Sharder, node: onnx.NodeProto) -> None:
    """Slices pass where another axis is worked on."""
    place, axes = place_of(s, node.input[0]), s.axes(node.input[0])
    axis = int(attribute(node, "axis", -1)) % len(axes)
    if place is None or node.op_type == "CumSum" or axis == place.axis:
        needs_whole(s, node, f"{node.op_type} works along the divided axis")
        return
    s.put(node, [s.held(node.input[0])], place)


@rule("LayerNormalization")
def layer_norm(s: Sharder, node: onnx.NodeProto) -> None:
    """Rows are normalised one by one."""
    place, axes = place_of(s, node.input[0]), s.axes(node.input[0])
    axis = int(attribute(node, "axis", -1)) % len(axes)
    if place is None or place.axis >= axis:
        needs_whole(s, node, "LayerNormalization works along the divided axis")
        return
    inputs = [s.held(node.input[0]), *(s.whole(name) for name in node.input[1:])]
    s.put(node, inputs, *[place for name in node.output if name])


@rule("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceSumSquare", "ReduceL2")
def reduction(s: Sharder, node: onnx.NodeProto) -> None:
    """Over the sliced axis only a sum is a sum of the shards'; over others slices pass."""
    place, axes = place_of(s, node.input[0]), s.axes(node.input[0])
    over = _constant_axes(s, node, 1, len(axes))
    if place is None or over is None:
        needs_whole(s, node)
        return
    inputs = [s.held(node.input[0]), *(s.whole(name) if name else "" for name in node.input[1:])]
    if place.axis not in over:
        gone = 0 if attribute(node, "keepdims", 1) else sum(a < place.axis for a in over)
        s.put(node, inputs, place.at(place.axis - gone))
    elif node.op_type == "ReduceSum":
        s.put(node, inputs, Partial(family=place.family))
    else:
        needs_whole(s, node, f"{node.op_type} works along the divided axis")


def _constant_axes(s: Sharder, node: onnx.NodeProto, index: int, rank: int) -> set[int] | None:
    """Axes that an operand names; all of them where it is missing, None where it is computed."""
    if len(node.input) <= index or not node.input[index]:
        return set(range(rank))
    given = s.source.constants.get(node.input[index])
    return None if given is None else {int(axis) % rank for axis in given.ravel()}


@rule("Transpose")
def transpose(s: Sharder, node: onnx.NodeProto) -> None:
    """The sliced axis moves."""
    place, axes = place_of(s, node.input[0]), s.axes(node.input[0])
    order = attribute(node, "perm", list(reversed(range(len(axes)))))
    if place is not None:
        s.put(node, [s.held(node.input[0])], place.at(list(order).index(place.axis)))


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def view(s: Sharder, node: onnx.NodeProto) -> None:
    """The sliced factor stays together; a Reshape's shape is written anew."""
    source, target = node.input[0], node.output[0]
    place = place_of(s, source)
    after = None if place is None else reshaped(place, s.axes(source), s.axes(target))
    if after is None:
        needs_whole(s, node, f"{node.op_type} mixes the divided axis with others")
        return
    inputs = [s.held(source), *(s.whole(name) for name in node.input[1:])]
    if node.op_type == "Reshape":
        inputs[1] = s.shape_of(target, source, after)
    s.put(node, inputs, after)


@rule("Expand")
def expand(s: Sharder, node: onnx.NodeProto) -> None:
    """Only axes of one element grow; 1 in a shape keeps what an operand has."""
    source, axes = node.input[0], s.axes(node.output[0])
    place = place_of(s, source)
    if place is None:
        needs_whole(s, node)
        return
    new = len(axes) - len(s.axes(source))
    have = (*[1] * new, *s.axes(source))
    parts = [
        s.numbers(1) if had == wanted else s.dimension(wanted, place.family)
        for had, wanted in zip(have, axes, strict=True)
    ]
    shape = s.vector("Concat", parts, len(axes), axis=0)
    s.put(node, [s.held(source), shape], place.at(place.axis + new))


@rule("Concat")
def concat(s: Sharder, node: onnx.NodeProto) -> None:
    """Along the sliced axis the operands become parts of the result."""
    axes = s.axes(node.output[0])
    axis = int(attribute(node, "axis")) % len(axes)
    places = [place_of(s, name) for name in node.input]
    first = next(place for place in places if place is not None)
    if first.axis != axis:
        s.put(node, [s.sliced(name, first) for name in node.input], first)
        return
    known = [place for place in places if place is not None]
    if len(known) < len(places) or s.sequence or any(place.axis != axis for place in known):
        needs_whole(s, node, "Concat joins what is divided with what is not")
        return
    sizes = [size for place in known for size in _parts(place)]
    for place in known[1:]:
        s.families.join(first.family, place.family)
    s.put(node, [s.held(n) for n in node.input], sliced(first.family, axis, sizes))


def _parts(place: Sliced) -> list[int | str]:
    """The consecutive parts of a slice's axis.

    Raises:
        Blocked: their number is not fixed.
    """
    if not isinstance(place.lead, int):
        raise Blocked(place.family, "parts of a divided axis are not told apart")
    return list(place.parts) * place.lead


@rule("Split")
def split(s: Sharder, node: onnx.NodeProto) -> None:
    """Along the sliced axis the parts become results, if they are those that are divided."""
    source = node.input[0]
    place, axes = place_of(s, source), s.axes(source)
    axis = int(attribute(node, "axis", 0)) % len(axes)
    if place is None:
        needs_whole(s, node)
        return
    if place.axis != axis:
        inputs = [s.held(source), *(s.whole(name) for name in node.input[1:])]
        s.put(node, inputs, *[place for _ in node.output])
        return
    sizes = [s.axes(name)[axis] for name in node.output]
    if s.sequence or _parts(place) != sizes:
        needs_whole(s, node, "Split cuts across units of the divided axis")
        return
    inputs = [s.held(source)]
    if len(set(sizes)) > 1:
        inputs.append(_local_sizes(s, source, axis, sizes))
    found = [Sliced(family=place.family, axis=axis, parts=(size,)) for size in sizes]
    if len(inputs) == 1 and len(node.input) > 1:
        node = onnx.helper.make_node(
            "Split", node.input, node.output, axis=axis, num_outputs=len(sizes)
        )
    s.put(node, inputs, *found)


def _local_sizes(s: Sharder, source: str, axis: int, sizes: Sequence[int | str]) -> str:
    """A shard's sizes of unequal parts, in proportion to the whole ones."""
    numbers = [size for size in sizes if isinstance(size, int)]
    local = s.vector("Shape", [s.held(source)], 1, start=axis, end=axis + 1)
    scaled = s.vector("Mul", [local, s.numbers(*numbers)], len(numbers))
    return s.vector("Div", [scaled, s.numbers(sum(numbers))], len(numbers))


@rule("Slice")
def slice_(s: Sharder, node: onnx.NodeProto) -> None:
    """Other axes may be cut."""
    place, axes = place_of(s, node.input[0]), s.axes(node.input[0])
    over = _constant_axes(s, node, 3, len(axes))
    if place is None or over is None or place.axis in over:
        needs_whole(s, node, "Slice cuts the divided axis")
        return
    s.put(node, [s.held(node.input[0]), *(s.whole(name) for name in node.input[1:])], place)


@rule("Pad")
def pad(s: Sharder, node: onnx.NodeProto) -> None:
    """Other axes may be padded; the sliced one by making it a sum first."""
    source = node.input[0]
    place, axes = place_of(s, source), s.axes(source)
    over = _constant_axes(s, node, 3, len(axes))
    rest = [s.whole(name) if name else "" for name in node.input[1:]]
    if place is None or over is None:
        needs_whole(s, node)
    elif place.axis not in over:
        s.put(node, [s.held(source), *rest], place)
    elif s.sequence and axes[place.axis] == s.sequence and not "".join(node.input[2:3]):
        s.put(node, [s.spread(source, place), *rest], Partial(family=place.family))
    else:
        needs_whole(s, node, "Pad pads the divided axis")


@rule("Gather")
def gather(s: Sharder, node: onnx.NodeProto) -> None:
    """Rows for the indices that a shard has; or from slices of rows."""
    data, indices = node.input
    axis = int(attribute(node, "axis", 0)) % len(s.axes(data))
    of_data, of_indices = place_of(s, data), place_of(s, indices)
    if of_data is None and of_indices is not None:
        place = of_indices.at(of_indices.axis + axis)
        s.put(node, [s.whole(data), s.held(indices)], place)
    elif of_data is not None and of_indices is None and of_data.axis != axis:
        more = len(s.axes(indices)) - 1 if of_data.axis > axis else 0
        place = of_data.at(of_data.axis + more)
        s.put(node, [s.held(data), s.whole(indices)], place)
    else:
        needs_whole(s, node, "Gather picks along the divided axis")


@rule("GatherElements")
def gather_elements(s: Sharder, node: onnx.NodeProto) -> None:
    """Row by row along another axis."""
    axis = int(attribute(node, "axis", 0)) % len(s.axes(node.input[0]))
    place = _aligned(s, node, len(s.axes(node.output[0])))
    if place.axis == axis:
        needs_whole(s, node, "GatherElements picks along the divided axis")
        return
    s.put(node, [s.sliced(name, place) for name in node.input], place)


@rule("ScatterElements")
def scatter_elements(s: Sharder, node: onnx.NodeProto) -> None:
    """Row by row along another axis; along the sliced one each shard adds its own to zeros."""
    data, indices, updates = node.input
    axis = int(attribute(node, "axis", 0)) % len(s.axes(data))
    place = place_of(s, updates) or place_of(s, indices)
    if place is None:
        needs_whole(s, node)
    elif place.axis != axis:
        s.put(node, [s.sliced(name, place) for name in node.input], place)
    elif _adds_to_zeros(s, node):
        inputs = [s.whole(data), s.sliced(indices, place), s.sliced(updates, place)]
        s.put(node, inputs, Partial(family=place.family))
    else:
        needs_whole(s, node, "ScatterElements writes along the divided axis")


def _adds_to_zeros(s: Sharder, node: onnx.NodeProto) -> bool:
    below = s.producer(node.input[0])
    zeros = below is not None and below.op_type == "ConstantOfShape"
    return zeros and attribute(node, "reduction", b"none") == b"add"


@rule("Shape")
def shape(s: Sharder, node: onnx.NodeProto) -> None:
    """The sizes of the whole, so that what is computed from them is what it was."""
    place, axes = place_of(s, node.input[0]), s.axes(node.input[0])
    if place is None:
        s.put(node, [s.held(node.input[0])], WHOLE)
        return
    start, end = int(attribute(node, "start", 0)), int(attribute(node, "end", len(axes)))
    held = s.held(node.input[0])
    parts = []
    for index, axis in list(enumerate(axes))[start:end]:
        if index == place.axis or isinstance(axis, int):
            parts.append(_whole_size(s, axis, place))
        else:
            parts.append(s.vector("Shape", [held], 1, start=index, end=index + 1))
    joined = onnx.helper.make_node("Concat", parts, node.output, axis=0)
    s.put(joined, parts, WHOLE)


def _whole_size(s: Sharder, axis: int | str, place: Sliced) -> str:
    if axis == s.sequence:
        return s.size(ALL, Sliced(family=place.family, axis=0, parts=(axis,)))
    return s.dimension(axis, place.family)
