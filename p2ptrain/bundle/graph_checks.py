"""Whether a graph is what its manifest says, before any runtime compiles it.

The naming contract is the one in `bundle.manifest`. A graph that several parts of the manifest
refer to must satisfy all of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from p2ptrain import limits
from p2ptrain.bundle.manifest import (
    BATCH,
    GraphPair,
    Manifest,
    SegmentKind,
    Tensor,
    UpdateRule,
    Value,
)
from p2ptrain.bundle.onnx_reader import GraphValue, OnnxGraph, read_graph
from p2ptrain.bundle.operators import MICROSOFT, SIZED_BY_INPUT, STANDARD, TRAINING
from p2ptrain.bundle.sharding_checks import local_values
from p2ptrain.errors import BundleError
from p2ptrain.ids import Digest

_ELEMENTS: Final = "n"
"""The one axis of an update graph's vectors; the run chooses it."""
_FREE: Final = (BATCH, _ELEMENTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphRole:
    """One use of a graph: what goes in and out of it there."""

    name: str
    inputs: Mapping[str, Value]
    """It may declare these; one that it does not need may be missing."""
    outputs: Mapping[str, Value]
    """It declares exactly these."""
    constants: frozenset[str] = frozenset()
    """Names that its nodes may read although nothing in the file defines them."""
    operators: frozenset[tuple[str, str]] = STANDARD


def check_graph(manifest: Manifest, digest: Digest, content: bytes) -> None:
    """Refuse a graph that is not what the manifest says.

    Raises:
        BundleError: names the graph by its role, and the first thing that is wrong with it.
    """
    problem = next(graph_problems(manifest, digest, content), None)
    if problem is not None:
        raise BundleError(problem)


def graph_problems(manifest: Manifest, digest: Digest, content: bytes) -> Iterator[str]:
    """Everything that is wrong with one graph, as sentences; a file that cannot be read is one."""
    roles = list(graph_roles(manifest, digest))
    where = roles[0].name if roles else f"graph {digest:.12}"
    try:
        graph = read_graph(content)
    except BundleError as error:
        yield f"{where}: {error.message}"
        return
    file = manifest.graphs[digest]
    if (graph.ir, graph.opsets.get("")) != (file.ir, file.opset):
        stated = f"IR {file.ir} and opset {file.opset}"
        yield f"{where}: it has IR {graph.ir} and opset {graph.opsets.get('')} instead of {stated}"
    for role in roles:
        for problem in _role_problems(manifest, role, graph):
            yield f"{role.name}: {problem}"


def graph_roles(manifest: Manifest, digest: Digest) -> Iterator[GraphRole]:
    """Every use that the manifest makes of one graph."""
    for kind in manifest.kinds.values():
        yield from _kind_roles(manifest, kind, digest)
    for name, rule in manifest.updates.items():
        if rule.graph == digest:
            yield _update_role(name, rule)
    whole = manifest.inference
    if whole.graph == digest:
        tensors = {tensor.name: _whole_tensor(tensor) for tensor in manifest.tensors}
        yield GraphRole(
            name="inference graph",
            inputs=tensors | _by_name(whole.inputs),
            outputs=_by_name([whole.output]),
            constants=frozenset(tensors),
        )


def _update_role(name: str, rule: UpdateRule) -> GraphRole:
    changed = ("parameter", *(f"state.{state}" for state in rule.state))
    vectors = [Value(name=vector, shape=(_ELEMENTS,)) for vector in ("gradient", *changed)]
    return GraphRole(
        name=f"update graph {name!r:.80}",
        inputs=_by_name([*vectors, *(Value(name=scalar, shape=()) for scalar in rule.scalars)]),
        outputs=_by_name(Value(name=f"new.{vector}", shape=(_ELEMENTS,)) for vector in changed),
    )


def _kind_roles(manifest: Manifest, kind: SegmentKind, digest: Digest) -> Iterator[GraphRole]:
    pairs = [graph for pair in kind.forms.values() for graph in pair.graphs]
    yield from _shard_roles(manifest, kind, digest)
    if digest not in (*pairs, kind.evaluation):
        return
    frozen = _frozen_names(manifest, kind)
    trainable = [value for value in kind.parameters if value.name not in frozen]
    state = [*(port.value for port in kind.inputs), *trainable, *kind.running]
    leaving = [port.value for port in kind.outputs]
    entering = [*state, *(site.value for site in kind.masks)]
    for form, pair in kind.forms.items():
        allowed = TRAINING if form == "training" else STANDARD
        if pair.forward == digest:
            renewed = [_renamed("new", value) for value in kind.running]
            yield GraphRole(
                name=f"forward graph of kind {kind.name!r:.80}, {form} form",
                inputs=_by_name(entering),
                outputs=_by_name([*leaving, *renewed, *pair.stash]),
                constants=frozen,
                operators=allowed,
            )
        seeds = [_renamed("cotangent", p.value) for p in kind.outputs if p.differentiable]
        read = [*leaving, *entering, *pair.stash, *seeds]
        for what, inputs, outputs in _backwards(kind, pair, trainable, digest):
            yield GraphRole(
                name=f"{what} graph of kind {kind.name!r:.80}, {form} form",
                inputs=_by_name([*read, *inputs]),
                outputs=_by_name(outputs),
                constants=frozen,
                operators=allowed,
            )
    if kind.evaluation == digest:
        yield GraphRole(
            name=f"evaluation graph of kind {kind.name!r:.80}",
            inputs=_by_name(state),
            outputs=_by_name(leaving),
            constants=frozen,
        )


def _shard_roles(manifest: Manifest, kind: SegmentKind, digest: Digest) -> Iterator[GraphRole]:
    """A graph's uses as parts of what shards compute."""
    for mode, sharding in manifest.sharding.items():
        sharded = sharding.kinds.get(kind.name)
        for part in () if sharded is None else sharded.parts:
            if sharded is None or part.graph != digest:
                continue
            frozen = _frozen_names(manifest, kind)
            values = local_values(kind, sharded)
            yield GraphRole(
                name=f"{mode} part of kind {kind.name!r:.80}",
                inputs={n: v for n, v in values.items() if n not in frozen},
                outputs={name: values[name] for name in part.outputs},
                constants=frozen,
            )


def _backwards(
    kind: SegmentKind, pair: GraphPair, trainable: Iterable[Value], digest: Digest
) -> Iterator[tuple[str, Sequence[Value], list[Value]]]:
    """Each use of a graph as a backward: its name, what it reads beside the rest, what it gives."""
    cotangents = [_renamed("cotangent", port.value) for port in kind.inputs if port.differentiable]
    gradients = [_renamed("gradient", value) for value in trainable]
    if pair.backward == digest:
        yield "backward", (), [*cotangents, *gradients]
    if pair.parts is not None and pair.parts.cotangents == digest:
        yield "cotangent", (), [*cotangents, *pair.parts.kept]
    if pair.parts is not None and pair.parts.gradients == digest:
        yield "gradient", pair.parts.kept, gradients


def _frozen_names(manifest: Manifest, kind: SegmentKind) -> frozenset[str]:
    """Local names of the parameters that a kind's segments bind as constants."""
    index = {tensor.name: tensor for tensor in manifest.tensors}
    return frozenset(
        local
        for segment in manifest.segments
        if segment.kind == kind.name
        for local, name in segment.parameters.items()
        if index[name].binding == "frozen"
    )


def _role_problems(manifest: Manifest, role: GraphRole, graph: OnnxGraph) -> Iterator[str]:
    yield from _declared_problems(manifest, "input", graph.inputs, role.inputs)
    yield from _declared_problems(manifest, "output", graph.outputs, role.outputs)
    for name in sorted(role.outputs.keys() - {value.name for value in graph.outputs}):
        yield f"it has no output {name!r:.80}"
    yield from _operator_problems(role, graph)
    yield from _flow_problems(role, graph)
    yield from _size_problems(graph)


def _declared_problems(
    manifest: Manifest, what: str, declared: tuple[GraphValue, ...], stated: Mapping[str, Value]
) -> Iterator[str]:
    for value in declared:
        expected = stated.get(value.name)
        if expected is None:
            yield f"its {what} {value.name!r:.80} is not in the manifest"
        elif value.dtype != expected.dtype:
            yield f"its {what} {value.name!r:.80} is {value.dtype} instead of {expected.dtype}"
        elif not _shape_fits(manifest, value, expected):
            stated_axes = f"({', '.join(expected.shape)})"
            yield f"its {what} {value.name!r:.80} has axes {value.axes} instead of {stated_axes}"


def _shape_fits(manifest: Manifest, value: GraphValue, expected: Value) -> bool:
    if value.axes is None:
        return True
    return len(value.axes) == len(expected.shape) and all(
        not isinstance(axis, int) or axis == _fixed_size(manifest, stated)
        for axis, stated in zip(value.axes, expected.shape, strict=True)
    )


def _fixed_size(manifest: Manifest, axis: str) -> int | None:
    """The size of an axis of the manifest; None where the run chooses it."""
    sizes = []
    for factor in axis.split("*"):
        if factor.isdecimal():
            sizes.append(int(factor))
        elif factor in _FREE or factor not in manifest.symbols:
            return None
        else:
            size = manifest.symbols[factor].size
            if size is None:
                return None
            sizes.append(size)
    return math.prod(sizes)


def _operator_problems(role: GraphRole, graph: OnnxGraph) -> Iterator[str]:
    known = {"", MICROSOFT} if role.operators is TRAINING else {""}
    for domain in graph.opsets.keys() - known:
        yield f"it asks for operators of {domain!r:.80}"
    used = {(node.domain, node.operator) for node in graph.nodes}
    for domain, operator in sorted(used - role.operators):
        name = f"{domain}.{operator}" if domain else operator
        yield f"operator {name!r:.80} is not allowed in it"


def _flow_problems(role: GraphRole, graph: OnnxGraph) -> Iterator[str]:
    """Every value is defined once and before it is read, so that there is no cycle."""
    given = {value.name for value in graph.inputs}
    count = Counter(constant.name for constant in graph.initialisers)
    count.update(value.name for value in graph.inputs)
    count.update(name for node in graph.nodes for name in node.outputs if name)
    count.update(role.constants - given)
    for name in sorted(name for name, times in count.items() if times > 1):
        yield f"its value {name!r:.80} is defined twice"
    defined = {"", *given, *role.constants, *(constant.name for constant in graph.initialisers)}
    for node in graph.nodes:
        for name in node.inputs:
            if name not in defined:
                yield f"node {node.operator!r:.80} reads {name!r:.80} before anything defines it"
        defined.update(node.outputs)
    for value in graph.outputs:
        if value.name not in defined:
            yield f"nothing defines its output {value.name!r:.80}"


def _size_problems(graph: OnnxGraph) -> Iterator[str]:
    """Sizes that stand in the file; those that a graph computes are the runtime's to refuse."""
    sizes = {constant.name: constant.integers for constant in graph.initialisers}
    for node in graph.nodes:
        place = SIZED_BY_INPUT.get(node.operator)
        if place is not None and place < len(node.inputs):
            wanted = sizes.get(node.inputs[place]) or ()
            if math.prod(wanted) > limits.TENSOR_ELEMENTS_MAX or min(wanted, default=0) < 0:
                yield f"node {node.operator!r:.80} makes a tensor of shape {wanted}"


def _by_name(values: Iterable[Value]) -> dict[str, Value]:
    return {value.name: value for value in values}


def _renamed(prefix: str, value: Value) -> Value:
    return Value(name=f"{prefix}.{value.name}", shape=value.shape, dtype=value.dtype)


def _whole_tensor(tensor: Tensor) -> Value:
    return Value(name=tensor.name, shape=tuple(map(str, tensor.shape)), dtype=tensor.dtype)
