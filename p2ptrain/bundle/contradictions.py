"""What can be wrong with a manifest although every field has its type.

Checks come in groups, and each group relies on the ones before: names and numbers, then
references, then tensors, then the chain of segments, then the data section. The first group with
problems is the last one that is read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Final

from p2ptrain import limits
from p2ptrain.bundle.manifest import (
    BATCH,
    BINDINGS,
    DATA_KINDS,
    DTYPES,
    FORMS,
    LOSSES,
    PORT_ROLES,
    TASKS,
    GraphPair,
    Manifest,
    Port,
    Segment,
    SegmentKind,
    Tensor,
    Value,
)
from p2ptrain.bundle.operators import IRS, OPSETS
from p2ptrain.bundle.sharding_checks import sharding_problems
from p2ptrain.ids import is_digest

INITIALISERS: Final = ("zeros", "ones", "normal", "uniform")
TEXT_KINDS: Final = ("windows", "masked-windows", "texts", "words")
TASK_DATA: Final = {
    "language-modelling": ("windows", "arrays"),
    "masked-language-modelling": ("masked-windows", "arrays"),
    "sequence-classification": ("texts", "arrays"),
    "token-classification": ("words", "arrays"),
    "image-classification": ("images", "arrays"),
    "regression": ("texts", "images", "arrays"),
}
"""What each task can be trained on."""


def contradictions(manifest: Manifest) -> Iterator[str]:
    """Every contradiction in a manifest, as sentences; none: it may be used."""
    for group in (_part_problems, _reference_problems, _tensor_problems, _chain_problems):
        found = False
        for problem in group(manifest):
            found = True
            yield problem
        if found:
            return
    yield from _data_problems(manifest)
    yield from sharding_problems(manifest)


def _part_problems(manifest: Manifest) -> Iterator[str]:
    """Each part by itself: names, sizes, words, finite numbers."""
    for what, count, most in (
        ("segments", len(manifest.segments), limits.SEGMENTS_MAX),
        ("tensors", len(manifest.tensors), limits.TENSORS_MAX),
        ("kinds", len(manifest.kinds), limits.SEGMENTS_MAX),
        ("updates", len(manifest.updates), limits.SEGMENTS_MAX),
    ):
        if not 1 <= count <= most:
            yield f"{count} {what}"
    yield from _name_problems(manifest)
    yield from _graph_file_problems(manifest)
    for name, symbol in manifest.symbols.items():
        if not name.isascii() or not name.isidentifier():
            yield f"symbol {name!r:.80} is not a plain word"
        size = 1 if name == BATCH and symbol.size is None else symbol.size
        if size is None or not 1 <= size <= limits.TENSOR_ELEMENTS_MAX:
            yield f"symbol {name!r:.80} has size {symbol.size}"
    if manifest.task not in TASKS or manifest.loss.kind not in LOSSES:
        yield f"unknown task {manifest.task!r:.40} or loss {manifest.loss.kind!r:.40}"
    if not 0.0 <= manifest.loss.label_smoothing < 1.0:
        yield f"a label smoothing of {manifest.loss.label_smoothing}"
    for name, error in manifest.checks.items():
        if not math.isfinite(error):
            yield f"check {name!r:.80} found an error of {error}"
    for name, kind in manifest.kinds.items():
        if kind.name != name:
            yield f"kind {name!r:.80} calls itself {kind.name!r:.80}"
        yield from _kind_problems(manifest, kind)
    for value in (*manifest.inference.inputs, manifest.inference.output):
        yield from _value_problems(manifest, "inference", value)


def _name_problems(manifest: Manifest) -> Iterator[str]:
    """Names of files to be are flat; names of tensors may have folders, which lead nowhere."""
    flat = [manifest.name, *manifest.kinds, *manifest.updates]
    flat += [segment.name for segment in manifest.segments]
    for name in flat:
        if not _is_plain(name) or "/" in name or name.startswith("."):
            yield f"{name!r:.80} is not a name"
    names = [tensor.name for tensor in manifest.tensors]
    for rule in manifest.updates.values():
        names += [*rule.state, *rule.scalars]
        if len(set(rule.state)) < len(rule.state) or len(set(rule.scalars)) < len(rule.scalars):
            yield "an update names a vector or scalar twice"
    for name in names:
        if not _is_plain(name) or name.startswith("/") or ".." in name.split("/"):
            yield f"{name!r:.80} is not a name"


def _is_plain(name: str) -> bool:
    return (
        0 < len(name.encode(errors="replace")) <= limits.NAME_BYTES_MAX
        and name.isprintable()
        and "\\" not in name
    )


def _graph_file_problems(manifest: Manifest) -> Iterator[str]:
    for digest, graph in manifest.graphs.items():
        if not is_digest(digest):
            yield f"graph {digest!r:.80} is not named by its sha256"
        if not 0 < graph.bytes <= limits.GRAPH_BYTES_MAX:
            yield f"graph {digest:.12} has {graph.bytes} bytes"
        if graph.opset not in OPSETS or graph.ir not in IRS or graph.dtype not in DTYPES:
            yield f"graph {digest:.12} has opset {graph.opset}, IR {graph.ir}, {graph.dtype!r:.40}"
    if not is_digest(manifest.golden_parameters):
        yield "golden_parameters is not a sha256"
    if manifest.weights is not None and not is_digest(manifest.weights):
        yield "weights is not a sha256"


def _kind_problems(manifest: Manifest, kind: SegmentKind) -> Iterator[str]:
    ports = (*kind.inputs, *kind.outputs)
    entering = [port.value for port in kind.inputs]
    entering += [*kind.parameters, *kind.running, *(site.value for site in kind.masks)]
    leaving = [port.value for port in kind.outputs]
    stashes = [_kept(pair) for pair in kind.forms.values()]
    for values in ((*entering, *leaving), *stashes):
        for name, count in Counter(value.name for value in values).items():
            if count > 1:
                yield f"kind {kind.name!r:.80} has two values {name!r:.80}"
        for value in values:
            yield from _value_problems(manifest, kind.name, value)
    for port in ports:
        if port.role not in PORT_ROLES:
            yield f"{kind.name}.{port.value.name} has unknown role {port.role!r:.40}"
        if port.differentiable and port.value.dtype != "float32":
            yield f"{kind.name}.{port.value.name} is differentiable, but {port.value.dtype}"
    for site in kind.masks:
        if not 0.0 <= site.probability < 1.0:
            yield f"{kind.name}.{site.value.name} drops with probability {site.probability}"
    if kind.forward_flops < 0 or kind.backward_flops < 0:
        yield f"kind {kind.name!r:.80} has negative FLOPs"


def _kept(pair: GraphPair) -> tuple[Value, ...]:
    """What a form keeps between its graphs; one set of buffers holds both."""
    return pair.stash if pair.parts is None else (*pair.stash, *pair.parts.kept)


def _value_problems(manifest: Manifest, owner: str, value: Value) -> Iterator[str]:
    where = f"{owner:.80}.{value.name:.80}"
    if not _is_plain(value.name):
        yield f"{where!r} is not a name"
    if value.dtype not in DTYPES:
        yield f"{where} has unknown dtype {value.dtype!r:.40}"
    if len(value.shape) > limits.RANK_MAX:
        yield f"{where} has {len(value.shape)} axes"
        return
    elements = 1
    for axis in value.shape:
        factors = axis.split("*", limits.AXIS_FACTORS_MAX)
        sizes = [_factor(manifest, factor) for factor in factors]
        if len(factors) > limits.AXIS_FACTORS_MAX or None in sizes:
            yield f"{where} has unknown axis {axis!r:.80}"
            return
        elements *= math.prod(size for size in sizes if size is not None)
    if elements > limits.TENSOR_ELEMENTS_MAX:
        yield f"{where} has {elements} elements for one sample"


def _factor(manifest: Manifest, factor: str) -> int | None:
    """The size of one factor of an axis for one sample; None when there is no such thing."""
    if factor in manifest.symbols:
        size = manifest.symbols[factor].size
        return 1 if size is None else size
    is_number = factor.isascii() and factor.isdecimal() and len(factor) <= limits.AXIS_DIGITS_MAX
    return int(factor) if is_number else None


def _reference_problems(manifest: Manifest) -> Iterator[str]:
    referred = [manifest.inference.graph, *(rule.graph for rule in manifest.updates.values())]
    referred += [graph for sharding in manifest.sharding.values() for graph in sharding.graphs]
    for kind in manifest.kinds.values():
        for form, pair in kind.forms.items():
            if form not in FORMS:
                yield f"kind {kind.name!r:.80} has an unknown form {form!r:.40}"
            referred += pair.graphs
        if kind.evaluation is not None:
            referred.append(kind.evaluation)
        if "portable" not in kind.forms:
            yield f"kind {kind.name!r:.80} has no portable form"
    for digest in referred:
        if digest not in manifest.graphs:
            yield f"graph {digest!r:.80} is referred to but not listed"
    if len(set(referred)) < len(manifest.graphs):
        yield "a listed graph is not referred to"
    names = Counter(segment.name for segment in manifest.segments)
    for name, count in names.items():
        if count > 1:
            yield f"two segments are called {name!r:.80}"
    used = {segment.kind for segment in manifest.segments}
    for kind_name in sorted(used - manifest.kinds.keys()):
        yield f"a segment has unknown kind {kind_name!r:.80}"
    for kind_name in sorted(manifest.kinds.keys() - used):
        yield f"no segment is of kind {kind_name!r:.80}"


def _tensor_problems(manifest: Manifest) -> Iterator[str]:
    names = [tensor.name for tensor in manifest.tensors]
    if len(set(names)) != len(names):
        yield "two tensors have the same name"
        return
    used = [name for segment in manifest.segments for name in segment.parameters.values()]
    used += [name for segment in manifest.segments for name in segment.running.values()]
    if sorted(used) != sorted(names):
        yield "the segments' parameters and running values are not exactly the listed tensors"
        return
    shapes_hold = True
    for tensor in manifest.tensors:
        for problem in _single_tensor_problems(manifest, tensor):
            shapes_hold = False
            yield problem
    if not shapes_hold:
        return
    if sum(tensor.elements for tensor in manifest.tensors) > limits.PARAMETERS_MAX:
        yield f"{manifest.parameter_count} parameters, over the limit"
    if manifest.weights is not None and not any(tensor.digest for tensor in manifest.tensors):
        yield "no tensor lies in its weights"
    yield from _relation_problems(manifest)


def _single_tensor_problems(manifest: Manifest, tensor: Tensor) -> Iterator[str]:
    where = f"tensor {tensor.name!r:.80}"
    if tensor.binding not in BINDINGS:
        yield f"{where} has unknown binding {tensor.binding!r:.40}"
    if tensor.dtype not in DTYPES or (tensor.binding == "trainable" and tensor.dtype != "float32"):
        yield f"{where} is {tensor.binding} and of dtype {tensor.dtype!r:.40}"
    if tensor.initialiser.kind not in INITIALISERS:
        yield f"{where} has unknown initialiser {tensor.initialiser.kind!r:.40}"
    if not 0.0 <= tensor.initialiser.scale < math.inf:
        yield f"{where} is drawn with scale {tensor.initialiser.scale}"
    if (
        len(tensor.shape) > limits.RANK_MAX
        or any(axis < 1 for axis in tensor.shape)
        or tensor.elements > limits.TENSOR_ELEMENTS_MAX
    ):
        yield f"{where} has shape {tensor.shape[: limits.RANK_MAX + 1]}"
    elif (shard := tensor.shard) is not None and (
        shard.symbol not in manifest.symbols
        or not 0 <= shard.axis < len(tensor.shape)
        or shard.block < 1
        or tensor.shape[shard.axis] % shard.block
    ):
        yield f"{where} cannot be sharded along {shard.symbol!r:.80}"
    if tensor.digest is not None and (manifest.weights is None or not is_digest(tensor.digest)):
        yield f"{where} names weights that do not exist"


def _relation_problems(manifest: Manifest) -> Iterator[str]:
    """Ties and adapters, which join tensors."""
    index = {tensor.name: tensor for tensor in manifest.tensors}
    segment_of = {
        name: position
        for position, segment in enumerate(manifest.segments)
        for name in (*segment.parameters.values(), *segment.running.values())
    }
    adapting: Counter[str] = Counter()
    earlier: set[str] = set()
    for tensor in manifest.tensors:
        where = f"tensor {tensor.name!r:.80}"
        owner = index.get(tensor.tied_to) if tensor.tied_to is not None else tensor
        if owner is None or (owner is not tensor and owner.tied_to is not None):
            yield f"{where} is tied to {tensor.tied_to!r:.80}, which owns nothing"
        elif owner is not tensor:
            if owner.name not in earlier or segment_of[owner.name] >= segment_of[tensor.name]:
                yield f"{where} comes before {owner.name!r:.80}, to which it is tied"
            if _substance(owner) != _substance(tensor):
                yield f"{where} is not what it is tied to"
        elif tensor.tied_to is not None:
            yield f"{where} is tied to itself"
        earlier.add(tensor.name)
        if tensor.adapter is not None:
            adapting.update((tensor.adapter.down, tensor.adapter.up))
            yield from _adapter_problems(tensor, index, segment_of)
    for name, count in adapting.items():
        if count > 1:
            yield f"tensor {name!r:.80} adapts two tensors"


def _substance(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype, tensor.binding, tensor.digest


def _adapter_problems(
    tensor: Tensor, index: dict[str, Tensor], segment_of: dict[str, int]
) -> Iterator[str]:
    adapter = tensor.adapter
    if adapter is None:
        return
    where = f"the adapter of {tensor.name!r:.80}"
    down, up = index.get(adapter.down), index.get(adapter.up)
    if down is None or up is None:
        yield f"{where} names tensors that do not exist"
        return
    if tensor.binding != "frozen" or {down.binding, up.binding} != {"trainable"}:
        yield f"{where} does not leave a frozen tensor for trainable ones"
    if not math.isfinite(adapter.scale):
        yield f"{where} has scale {adapter.scale}"
    if len({segment_of[each.name] for each in (tensor, down, up)}) > 1:
        yield f"{where} lies in another segment"

    stored = tensor.shape[::-1] if adapter.transposed else tensor.shape
    if not (
        len(up.shape) == len(down.shape) == 2
        and up.shape[1] == down.shape[0]
        and (up.shape[0], down.shape[1]) == stored
    ):
        yield f"{where} has shapes {up.shape} and {down.shape} for {tensor.shape}"


def _chain_problems(manifest: Manifest) -> Iterator[str]:
    last = len(manifest.segments) - 1
    index = {tensor.name: tensor for tensor in manifest.tensors}
    previous: tuple[Value, ...] = ()
    for position, segment in enumerate(manifest.segments):
        kind = manifest.kinds[segment.kind]
        named = True
        for problem in _binding_problems(manifest, segment, kind, index):
            named = False
            yield problem
        if not named:
            return
        yield from _port_problems(segment, kind, is_first=position == 0, is_last=position == last)
        entering = _boundary(kind.inputs)
        if [(v.shape, v.dtype) for v in entering] != [(v.shape, v.dtype) for v in previous]:
            yield f"segment {segment.name!r:.80} does not fit onto the one before it"
        previous = _boundary(kind.outputs)
    yield from _shared_binding_problems(manifest, index)


def _binding_problems(
    manifest: Manifest, segment: Segment, kind: SegmentKind, index: dict[str, Tensor]
) -> Iterator[str]:
    where = f"segment {segment.name!r:.80}"
    for what, given, values in (
        ("parameters", segment.parameters, kind.parameters),
        ("running values", segment.running, kind.running),
    ):
        if sorted(given) != sorted(value.name for value in values):
            yield f"{where} does not name its kind's {what}"
            continue
        for value in values:
            tensor = index[given[value.name]]
            if (manifest.shape(value, batch=1), value.dtype) != (tensor.shape, tensor.dtype):
                yield f"{where}: {value.name!r:.80} has another shape or dtype"
            if (tensor.binding == "running") != (what == "running values"):
                yield f"{where}: {value.name!r:.80} is bound to a {tensor.binding} tensor"


def _port_problems(
    segment: Segment, kind: SegmentKind, *, is_first: bool, is_last: bool
) -> Iterator[str]:
    where = f"segment {segment.name!r:.80}"
    entering = Counter(port.role for port in kind.inputs)
    leaving = Counter(port.role for port in kind.outputs)
    if bool(entering["data"]) != is_first or bool(entering["boundary"]) == is_first:
        yield f"{where} does not take data where only the first segment does"
    wanted = 1 if is_last else 0
    if entering["labels"] != wanted or entering["loss_weight"] != wanted:
        yield f"{where} does not take labels and a weight where only the last segment does"
    if is_last and dict(leaving) != {"loss": 1}:
        yield "the last segment does not end in the loss"
    if not is_last and dict(leaving) != {"boundary": len(kind.outputs)}:
        yield f"{where} does not hand on to the next one"
    if entering["loss"]:
        yield f"{where} takes a loss"
    for port in (*kind.inputs, *kind.outputs):
        if port.role in ("loss", "loss_weight") and (port.value.shape, port.value.dtype) != (
            (),
            "float32",
        ):
            yield f"{where}: {port.value.name!r:.80} is not a number"


def _shared_binding_problems(manifest: Manifest, index: dict[str, Tensor]) -> Iterator[str]:
    """Segments of a kind share their graphs, which declare what is trainable."""
    bindings: dict[tuple[str, str], str] = {}
    for segment in manifest.segments:
        for local, name in segment.parameters.items():
            binding = index[name].binding
            if bindings.setdefault((segment.kind, local), binding) != binding:
                yield f"segment {segment.name!r:.80}: {local!r:.80} is {binding}, elsewhere not"


def _boundary(ports: Iterable[Port]) -> tuple[Value, ...]:
    return tuple(port.value for port in ports if port.role == "boundary")


def _data_problems(manifest: Manifest) -> Iterator[str]:
    data, task = manifest.data, manifest.task
    if data.kind not in DATA_KINDS:
        yield f"unknown data kind {data.kind!r:.40}"
    elif data.kind not in TASK_DATA[task]:
        yield f"{task} cannot be trained on {data.kind}"
    is_text = data.kind in TEXT_KINDS
    if is_text and (data.vocabulary < 1 or data.context < 1):
        yield f"text with {data.vocabulary} token ids and samples of {data.context} tokens"
    if (data.tokenizer == "tokenizer.json") != (data.tokenizer_digest is not None):
        yield "tokenizer.json and its sha256 do not come together"
    if data.tokenizer not in ("", "bytes", "tokenizer.json") or (is_text and not data.tokenizer):
        yield f"unknown tokenizer {data.tokenizer!r:.80}"
    if data.tokenizer_digest is not None and not is_digest(data.tokenizer_digest):
        yield "tokenizer_digest is not a sha256"
    for name, token in data.special_tokens.items():
        if not 0 <= token < data.vocabulary:
            yield f"special token {name!r:.80} is {token}, outside the vocabulary"
    if data.kind == "masked-windows" and not 0.0 < data.mask_probability < 1.0:
        yield f"tokens are masked with probability {data.mask_probability}"
    if data.classes < 0 or (task.endswith("-classification") and data.classes < 1):
        yield f"a classification into {data.classes} classes"
    if data.class_names and len(data.class_names) != data.classes:
        yield f"{len(data.class_names)} names for {data.classes} classes"
    if len(data.image_mean) != len(data.image_std):
        yield "image_mean and image_std are not of one length"
    if not all(map(math.isfinite, data.image_mean)):
        yield "image_mean is not finite"
    if not all(0.0 < std < math.inf for std in data.image_std):
        yield "image_std is not positive"
