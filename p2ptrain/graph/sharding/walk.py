"""Walk a segment's graph node by node and let each rule say what a shard computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import onnx

from p2ptrain.graph.ir import full_name, make
from p2ptrain.graph.sharding import products
from p2ptrain.graph.sharding.families import Blocked
from p2ptrain.graph.sharding.placements import Partial, Sliced
from p2ptrain.graph.sharding.rules import RULES, needs_whole
from p2ptrain.graph.sharding.sharder import Sharder

LINEAR: Final = (
    "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Transpose", "Expand", "Neg",
    "ReduceSum", "ReduceMean",
)  # fmt: skip
"""Of a sum's terms they make the terms of another sum."""
SUMS: Final = ("Add", "Sum")
ELEMENTWISE_SUMS: Final = (*SUMS, "Sub")


def walk(s: Sharder, nodes: Sequence[onnx.NodeProto]) -> None:
    """Let a shard compute these nodes.

    Raises:
        Blocked: a family's axes cannot stay sliced; nothing of this walk holds.
        PortNeededWhole: likewise, for an input.
    """
    for node in nodes:
        if node.op_type == "Shape":
            RULES["Shape"](s, node)
        elif products.may_start(s, node):
            products.start(s, node)
        else:
            _follow(s, node)


def _follow(s: Sharder, node: onnx.NodeProto) -> None:
    if _stays_partial(s, node):
        others = [name if _is_partial(s, name) else s.whole(name) for name in node.input if name]
        names = iter(others)
        operands = [next(names) if name else "" for name in node.input]
        s.put(node, operands, _together(s, [n for n in node.input if _is_partial(s, n)]))
        return
    node = _settled(s, node)
    if not any(isinstance(s.place(name), Sliced) for name in node.input if name):
        needs_whole(s, node)
        return
    found = RULES.get(full_name(node))
    if found is None:
        needs_whole(s, node)
    else:
        found(s, node)


def _together(s: Sharder, names: Sequence[str]) -> Partial:
    """The placement of a sum of sums: their families are one."""
    families = [place.family for name in names if isinstance(place := s.place(name), Partial)]
    for family in families[1:]:
        s.families.join(families[0], family)
    return Partial(family=families[0])


def _is_partial(s: Sharder, name: str) -> bool:
    return bool(name) and isinstance(s.place(name), Partial)


def _stays_partial(s: Sharder, node: onnx.NodeProto) -> bool:
    """Whether a sum is better added up after this node: it is linear, and the only reader."""
    partial = [name for name in node.input if _is_partial(s, name)]
    if not partial or not all(s.alone(name) for name in partial):
        return False
    if node.op_type in LINEAR:
        first = s.axes(node.input[0])
        lost = s.sequence in first and s.sequence not in s.axes(node.output[0])
        return not lost or node.op_type.startswith("Reduce")
    if node.op_type in ELEMENTWISE_SUMS:
        return len(partial) == len(node.input)
    if node.op_type in ("Mul", "Div"):
        other = s.source.constants.get(node.input[1])
        return _is_partial(s, node.input[0]) and other is not None and other.size == 1
    return node.op_type == "Pad" and not "".join(node.input[2:3])


def _settled(s: Sharder, node: onnx.NodeProto) -> onnx.NodeProto:
    """The node on sums that are added up; several terms of one sum are added up together."""
    partial = [name for name in node.input if _is_partial(s, name)]
    mixed = [name for name in node.input if name and isinstance(s.place(name), Sliced)]
    for name in partial if s.sequence is None and node.op_type in ELEMENTWISE_SUMS else ():
        place = s.place(name)
        other = s.place(mixed[0]) if mixed else None
        if isinstance(place, Partial) and isinstance(other, Sliced):
            later = max(s.families.root(place.family), s.families.root(other.family))
            raise Blocked(later, "a sum over units is added to what stays divided")
    together = node.op_type in SUMS and len(partial) > 1 and all(s.alone(n) for n in partial)
    if together and all(s.axes(name) == s.axes(node.output[0]) for name in partial):
        return _joined(s, node, partial)
    for name in partial:
        s.settled(name)
    return node


def _joined(s: Sharder, node: onnx.NodeProto, partial: Sequence[str]) -> onnx.NodeProto:
    target = node.output[0]
    name = s.source.fresh("joined")
    s.source.types[name] = s.made.types[name] = s.source.types[target]
    s.put(make("Sum", partial, [name]), partial, _together(s, partial))
    s.settled(name)
    others = [each for each in node.input if each not in partial]
    joined: onnx.NodeProto = make("Sum", [name, *others], [target])
    return joined


def give(s: Sharder, name: str, want: Sliced | None, *, partial: bool = False) -> str:
    """An output as it has to be; gives what the made graph calls it.

    Args:
        want: The slice that it has to be; None: whole.
        partial: A sum's terms will do.
    """
    if want is not None:
        return s.sliced(name, want)
    place = s.place(name)
    if partial and isinstance(place, Partial):
        return s.held(name)
    if partial and isinstance(place, Sliced):
        return s.spread(name, place)
    return s.whole(name, f"{name!r} leaves the segment whole")
