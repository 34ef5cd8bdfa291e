"""The table of lowering rules, and the pass that applies it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnx

from p2ptrain.errors import GraphError
from p2ptrain.graph.ir import FLOAT, INT64, Axis, Graph, Type, full_name, make


@dataclass(slots=True, kw_only=True)
class Emitter:
    """What a rule writes with: nodes in order, typed values, shared constants."""

    graph: Graph
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    notes: dict[tuple[str, str], str] = field(default_factory=dict)
    """Forward values that a gradient rule may reuse: (what, of which value) -> name."""

    def op(
        self,
        kind: str,
        *inputs: str,
        axes: Sequence[Axis],
        out: str | None = None,
        dtype: int = FLOAT,
        **attributes: Any,  # Any: attribute values
    ) -> str:
        """Emit one standard operator; gives the name of its output."""
        name = out if out is not None else self.graph.fresh("low")
        self.graph.types.setdefault(name, Type(dtype=dtype, axes=tuple(axes)))
        self.nodes.append(make(kind, inputs, [name], **attributes))
        return name

    def like(self, kind: str, *inputs: str, out: str | None = None) -> str:
        """Emit an elementwise operator whose result has the axes of its first input."""
        return self.op(kind, *inputs, axes=self.graph.axes(inputs[0]), out=out)

    def scalar(self, value: float) -> str:
        """A float32 constant without axes."""
        return self.graph.constant(np.array(value, np.float32))

    def integers(self, *values: int) -> str:
        """A one-dimensional int64 constant."""
        return self.graph.constant(np.array(values, np.int64))

    def size(self, name: str, axis: int) -> str:
        """The run-time size of one axis, int64 of shape (1,)."""
        return self.op("Shape", name, axes=(1,), dtype=INT64, start=axis, end=axis + 1)

    def total(self, name: str, axes: Sequence[int], *, out: str | None, keep: bool) -> str:
        """ReduceSum over constant axes."""
        have = self.graph.axes(name)
        taken = {axis % len(have) for axis in axes}
        left = [1 if i in taken else a for i, a in enumerate(have) if keep or i not in taken]
        return self.op(
            "ReduceSum", name, self.integers(*sorted(taken)), axes=left, out=out, keepdims=int(keep)
        )


Rule = Callable[[Emitter, onnx.NodeProto], None]
_RULES: Final[dict[str, Rule]] = {}


def rule(name: str) -> Callable[[Rule], Rule]:
    """Register the rule for one operator, spelt with its domain."""

    def register(function: Rule) -> Rule:
        if name in _RULES:
            raise GraphError(f"two lowering rules for {name}")
        _RULES[name] = function
        return function

    return register


def rule_names() -> tuple[str, ...]:
    """Every operator that can be lowered."""
    return tuple(sorted(_RULES))


def lower(graph: Graph, forward: set[str]) -> None:
    """Replace every non-standard operator, and what has a better form, by standard ones.

    `forward` names the values of the forward pass; what their rules emit is added to it.

    Raises:
        GraphError: an operator without a rule; names it, its result and what to do.
    """
    emitter = Emitter(graph=graph)
    for node in graph.nodes:
        found = _RULES.get(full_name(node))
        if found is None and not node.domain:
            emitter.nodes.append(node)
            continue
        if found is None:
            raise GraphError(
                f"no lowering rule for {full_name(node)}, which makes {node.output[0]!r}",
                hint="add a rule to p2ptrain/graph/lowering, or avoid the operator in the model",
            )
        before = len(emitter.nodes)
        found(emitter, node)
        if forward.intersection(node.output):
            forward.update(name for new in emitter.nodes[before:] for name in new.output)
    graph.nodes = emitter.nodes
    graph.prune()
