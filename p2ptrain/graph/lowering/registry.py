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

    def shape(self, name: str) -> str:
        """The run-time sizes of all axes, int64."""
        return self.op("Shape", name, axes=(len(self.graph.axes(name)),), dtype=INT64)

    def zeros_like(self, name: str, target: str) -> str:
        """Zeros of the axes of `target`, whose sizes `name` holds."""
        return self.op("ConstantOfShape", name, axes=self.graph.axes(target))

    def view(self, name: str, axes: Sequence[Axis], *, out: str | None = None) -> str:
        """The same values under other axes; `rewrite_views` states the sizes."""
        dtype = self.graph.types[name].dtype
        return self.op("Flatten", name, axes=axes, out=out, dtype=dtype, axis=0)

    def transpose(self, name: str, order: Sequence[int], *, out: str | None = None) -> str:
        """Axes in another order."""
        have, dtype = self.graph.axes(name), self.graph.types[name].dtype
        axes = [have[axis] for axis in order]
        return self.op("Transpose", name, axes=axes, out=out, dtype=dtype, perm=list(order))

    def sum_to(self, name: str, axes: Sequence[Axis], *, out: str) -> str:
        """The totals of a broadcast value over the axes that `axes` lacks or has as 1."""
        have = self.graph.axes(name)
        extra = len(have) - len(axes)
        taken = [i for i, a in enumerate(have) if i < extra or (axes[i - extra] == 1 and a != 1)]
        if not taken:
            return self.like("Identity", name, out=out)
        if len(taken) == extra:
            return self.total(name, taken, out=out, keep=False)
        kept = self.total(name, taken, out=None if extra else out, keep=True)
        if not extra:
            return kept
        return self.op("Squeeze", kept, self.integers(*range(extra)), axes=axes, out=out)

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
_IN_EVERY_FORM: Final[set[str]] = set()


def rule(name: str, *, every_form: bool = False) -> Callable[[Rule], Rule]:
    """Register the rule for one operator, spelt with its domain.

    `every_form`: the training form needs it as well, since no runtime has a sound kernel on a CPU.
    """

    def register(function: Rule) -> Rule:
        if name in _RULES:
            raise GraphError(f"two lowering rules for {name}")
        _RULES[name] = function
        if every_form:
            _IN_EVERY_FORM.add(name)
        return function

    return register


def rule_names() -> tuple[str, ...]:
    """Every operator that can be lowered."""
    return tuple(sorted(_RULES))


def lower(graph: Graph, forward: set[str], *, portable: bool = True) -> None:
    """Replace every non-standard operator, and what has a better form, by standard ones.

    `forward` names the values of the forward pass; what their rules emit is added to it. Unless
    `portable`, only what no runtime can run on a CPU is replaced.

    Raises:
        GraphError: an operator without a rule; names it, its result and what to do.
    """
    emitter = Emitter(graph=graph)
    for node in graph.nodes:
        name = full_name(node)
        found = _RULES.get(name) if portable or name in _IN_EVERY_FORM else None
        if found is None and not (node.domain and portable):
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
