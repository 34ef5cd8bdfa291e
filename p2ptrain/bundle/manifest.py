"""What a bundle says about itself: segments, graphs, tensors, costs, data.

A bundle is a directory: `manifest.json`, `graphs/<sha256>.onnx`, optionally
`weights.safetensors`. This module is pure: it turns the manifest's bytes into checked, frozen
objects and back. `store.bundles` reads the files.

Names inside the graphs are the contract between exporter and engine:

- forward graph: inputs are the segment's ports, parameters and masks by their local names;
  outputs are the output ports, then the stash.
- backward graph: inputs are any of the forward's inputs, its stash, and `cotangent.<output>`;
  outputs are `cotangent.<input>` for every differentiable input port and `gradient.<parameter>`
  for every trainable parameter.
- update graph: `parameter`, `gradient`, `state.<name>` of shape (n,), scalars by name; outputs
  `new.parameter`, `new.state.<name>`.

Shapes are tuples of integers and symbol names; a symbol's size is in `symbols`, except `batch`,
which the run chooses (the microbatch size).
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from p2ptrain import limits
from p2ptrain.errors import BundleError, RemoteProtocolError
from p2ptrain.ids import Digest, is_digest
from p2ptrain.wire.codec import from_plain, to_plain

FORMAT: Final = "p2ptrain-bundle"
VERSION: Final = 1
BATCH: Final = "batch"
FORMS: Final = ("portable", "training")
DTYPES: Final = {"float32": 4, "int64": 8, "int32": 4, "uint8": 1, "bool": 1}

Form = Literal["portable", "training"]
PORT_ROLES: Final = ("boundary", "data", "labels", "loss_weight", "loss")


@dataclass(frozen=True, slots=True, kw_only=True)
class Symbol:
    """An axis that sharding or the run may change; `size` is its whole size, None for batch."""

    size: int | None
    kind: str
    """batch, sequence, heads or columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A tensor in a graph: its local name, shape in symbols, dtype."""

    name: str
    shape: tuple[str, ...]
    """Each axis a symbol name, a decimal integer as text, or a product of these joined by `*`."""
    dtype: str = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """A value that enters or leaves a segment."""

    value: Value
    role: str
    """boundary: from or to the neighbouring segment; data, labels, loss_weight: fed by the run;
    loss: the scalar result."""
    differentiable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskSite:
    """A dropout site: the graph multiplies by this float32 mask input (0 or 1 / (1 - p))."""

    value: Value
    probability: float
    """The model's own dropout probability; a run may override it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphPair:
    """Forward and backward graph of one form, and what the forward keeps for the backward."""

    forward: Digest
    backward: Digest
    stash: tuple[Value, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentKind:
    """A distinct segment; all segments of a kind share their compiled sessions."""

    name: str
    forms: dict[str, GraphPair]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    parameters: tuple[Value, ...]
    masks: tuple[MaskSite, ...]
    forward_flops: int
    """Floating-point operations for one sample."""
    backward_flops: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One position in the model: a kind with the global names of its parameters."""

    name: str
    kind: str
    parameters: dict[str, str]
    """Local parameter name -> tensor name; the order is the kind's, JSON keeps none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Initialiser:
    """How a parameter is drawn without weights: zeros, ones, normal (scale = std) or uniform
    (scale = bound)."""

    kind: str
    scale: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardGroup:
    """Parameters sliced together: `symbol` is the axis symbol, `axis` where it lies in this one."""

    symbol: str
    axis: int
    block: int
    """Elements along the axis per unit of the symbol, for example head_dim."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """A parameter of the whole model, in manifest order."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    binding: str
    """trainable or frozen."""
    initialiser: Initialiser
    decay: bool
    """Whether weight decay applies (matrices yes; biases and norms no)."""
    shard: ShardGroup | None = None
    tied_to: str | None = None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateRule:
    """An optimizer's update graph: elementwise over flat vectors, so any slicing is allowed."""

    graph: Digest
    state: tuple[str, ...]
    """Names of the state vectors, all zero at the start: ("m", "v") or ("momentum",)."""
    scalars: tuple[str, ...]
    """Names of its float32 scalar inputs."""
    in_place: bool
    """Proved by the exporter: an output may share its input's buffer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphFile:
    """One ONNX file of the bundle."""

    bytes: int
    opset: int
    ir: int
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Inference:
    """The whole model without weights: token ids in, logits out."""

    graph: Digest
    input: Value
    output: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSection:
    """What the model eats: `bytes` = byte-level text windows, labels shifted by one."""

    kind: str
    tokenizer: str
    vocabulary: int
    context: int
    dtype: str
    sampling: str
    """Version of the sampling order: `philox-1`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A checked manifest. `digest` identifies the bundle."""

    name: str
    task: str
    description: str
    symbols: dict[str, Symbol]
    graphs: dict[str, GraphFile]
    """By digest."""
    kinds: dict[str, SegmentKind]
    segments: tuple[Segment, ...]
    tensors: tuple[Tensor, ...]
    updates: dict[str, UpdateRule]
    inference: Inference
    data: DataSection
    loss: str
    golden_parameters: Digest
    """sha256 over all parameters drawn with seed 0, little-endian, manifest order."""
    checks: dict[str, float] = field(default_factory=dict)
    """Worst errors of the exporter's own check against torch."""
    weights: Digest | None = None

    @property
    def digest(self) -> Digest:
        return Digest(hashlib.sha256(self.to_bytes()).hexdigest())

    def to_bytes(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces after the indent, a final newline."""
        document = {"format": FORMAT, "version": VERSION, **to_plain(self)}
        return (json.dumps(document, sort_keys=True, indent=1) + "\n").encode()

    def tensor(self, name: str) -> Tensor:
        return self._tensor_index[name]

    @property
    def _tensor_index(self) -> dict[str, Tensor]:
        return {tensor.name: tensor for tensor in self.tensors}

    def segment_tensors(self, segment_index: int) -> tuple[Tensor, ...]:
        """The parameters of one segment, in its kind's parameter order."""
        index = self._tensor_index
        segment = self.segments[segment_index]
        values = self.kinds[segment.kind].parameters
        return tuple(index[segment.parameters[value.name]] for value in values)

    @property
    def parameter_count(self) -> int:
        return sum(tensor.elements for tensor in self.tensors)

    def shape(self, value: Value, *, batch: int) -> tuple[int, ...]:
        """The concrete shape of a graph value for a microbatch of `batch` samples."""
        return tuple(self._axis(axis, batch) for axis in value.shape)

    def value_bytes(self, value: Value, *, batch: int) -> int:
        return math.prod(self.shape(value, batch=batch)) * DTYPES[value.dtype]

    def stash_bytes(self, segment_index: int, *, form: str, batch: int) -> int:
        """Bytes one microbatch in flight keeps for one segment (stash, inputs and masks)."""
        kind = self.kinds[self.segments[segment_index].kind]
        values = [*kind.forms[form].stash, *(port.value for port in kind.inputs)]
        values += [site.value for site in kind.masks]
        return sum(self.value_bytes(value, batch=batch) for value in values)

    def boundary(self, segment_index: int) -> tuple[Value, ...]:
        """The values that cross from segment `segment_index` to the next one."""
        kind = self.kinds[self.segments[segment_index].kind]
        return tuple(port.value for port in kind.outputs if port.role == "boundary")

    def boundary_bytes(self, segment_index: int, *, batch: int) -> int:
        """Bytes of one microbatch's activations after this segment (cotangents: the same)."""
        return sum(self.value_bytes(v, batch=batch) for v in self.boundary(segment_index))

    def _axis(self, axis: str, batch: int) -> int:
        if "*" in axis:
            return math.prod(self._axis(factor, batch) for factor in axis.split("*"))
        if axis == BATCH:
            return batch
        if axis.isdigit():
            return int(axis)
        size = self.symbols[axis].size
        if size is None:
            raise BundleError(f"symbol {axis!r} has no size")
        return size


def parse_manifest(content: bytes) -> Manifest:
    """Read and check `manifest.json`.

    Raises:
        BundleError: too large, not JSON, an unknown version, or inconsistent; the bundle is
            refused whole and nothing of it was used.
    """
    if len(content) > limits.MANIFEST_BYTES_MAX:
        raise BundleError(f"manifest.json has {len(content)} bytes, over the limit")
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"manifest.json is not JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise BundleError("manifest.json is not a p2ptrain bundle manifest")
    if document.get("version") != VERSION:
        raise BundleError(
            f"bundle version {document.get('version')!r} is unknown; this p2ptrain reads {VERSION}",
            hint="update p2ptrain, or export the model again with this version",
        )
    try:
        manifest = from_plain(Manifest, document)
    except RemoteProtocolError as error:
        raise BundleError(f"manifest.json: {error.message}") from error
    check_manifest(manifest)
    return manifest


def check_manifest(manifest: Manifest) -> None:
    """Refuse a manifest whose parts contradict each other.

    Raises:
        BundleError: names the first contradiction found.
    """
    problem = next(_problems(manifest), None)
    if problem is not None:
        raise BundleError(f"manifest.json: {problem}")


def _problems(manifest: Manifest) -> Any:  # Any: a generator of sentences
    if not 1 <= len(manifest.segments) <= limits.SEGMENTS_MAX:
        yield f"{len(manifest.segments)} segments"
    for digest, graph in manifest.graphs.items():
        if not is_digest(digest):
            yield f"graph {digest!r:.80} is not named by its sha256"
        if not 0 < graph.bytes <= limits.GRAPH_BYTES_MAX:
            yield f"graph {digest:.12} has {graph.bytes} bytes"
    yield from _reference_problems(manifest)
    yield from _tensor_problems(manifest)
    yield from _chain_problems(manifest)


def _reference_problems(manifest: Manifest) -> Any:  # Any: as above
    referred = [manifest.inference.graph, *(rule.graph for rule in manifest.updates.values())]
    for kind in manifest.kinds.values():
        for form, pair in kind.forms.items():
            if form not in FORMS:
                yield f"kind {kind.name!r} has an unknown form {form!r}"
            referred += [pair.forward, pair.backward]
        if "portable" not in kind.forms:
            yield f"kind {kind.name!r} has no portable form"
        yield from _value_problems(manifest, kind)
    for digest in referred:
        if digest not in manifest.graphs:
            yield f"graph {digest!r:.80} is referred to but not listed"
    if len(set(referred)) < len(manifest.graphs):
        yield "a listed graph is not referred to"


def _value_problems(manifest: Manifest, kind: SegmentKind) -> Any:  # Any: as above
    values = [port.value for port in (*kind.inputs, *kind.outputs)]
    values += [*kind.parameters, *(site.value for site in kind.masks)]
    values += [value for pair in kind.forms.values() for value in pair.stash]
    for value in values:
        if value.dtype not in DTYPES:
            yield f"{kind.name}.{value.name} has unknown dtype {value.dtype!r}"
        for axis in value.shape:
            for factor in axis.split("*"):
                if not factor.isdigit() and factor not in manifest.symbols:
                    yield f"{kind.name}.{value.name} has unknown axis {axis!r}"
    for port in (*kind.inputs, *kind.outputs):
        if port.role not in PORT_ROLES:
            yield f"{kind.name}.{port.value.name} has unknown role {port.role!r}"


def _tensor_problems(manifest: Manifest) -> Any:  # Any: as above
    names = [tensor.name for tensor in manifest.tensors]
    if len(set(names)) != len(names):
        yield "two tensors have the same name"
    for tensor in manifest.tensors:
        if tensor.binding not in ("trainable", "frozen"):
            yield f"tensor {tensor.name!r} has unknown binding {tensor.binding!r}"
        if tensor.initialiser.kind not in ("zeros", "ones", "normal", "uniform"):
            yield f"tensor {tensor.name!r} has unknown initialiser"
        if any(axis < 1 for axis in tensor.shape) or tensor.elements > limits.TENSOR_ELEMENTS_MAX:
            yield f"tensor {tensor.name!r} has shape {tensor.shape}"
    used = [name for segment in manifest.segments for name in segment.parameters.values()]
    if sorted(used) != sorted(names):
        yield "the segments' parameters are not exactly the listed tensors"


def _chain_problems(manifest: Manifest) -> Any:  # Any: as above
    index = manifest._tensor_index
    previous: tuple[Value, ...] = ()
    for segment in manifest.segments:
        kind = manifest.kinds.get(segment.kind)
        if kind is None:
            yield f"segment {segment.name!r} has unknown kind {segment.kind!r}"
            return
        if sorted(segment.parameters) != sorted(value.name for value in kind.parameters):
            yield f"segment {segment.name!r} does not name its kind's parameters"
            return
        for value in kind.parameters:
            tensor = index.get(segment.parameters[value.name])
            if tensor is None or manifest.shape(value, batch=1) != tensor.shape:
                yield f"segment {segment.name!r}: parameter {value.name!r} has another shape"
        entering = tuple(port.value for port in kind.inputs if port.role == "boundary")
        if [(v.shape, v.dtype) for v in entering] != [(v.shape, v.dtype) for v in previous]:
            yield f"segment {segment.name!r} does not fit onto the one before it"
        previous = tuple(port.value for port in kind.outputs if port.role == "boundary")
    last = manifest.kinds[manifest.segments[-1].kind]
    if [port.role for port in last.outputs] != ["loss"]:
        yield "the last segment does not end in the loss"
