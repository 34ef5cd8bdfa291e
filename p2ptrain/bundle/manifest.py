"""What a bundle says about itself: segments, graphs, tensors, costs, data.

A bundle is a directory: `manifest.json`, `graphs/<sha256>.onnx`, optionally
`weights.safetensors`. This module is pure: frozen objects, and their bytes. `bundle.reading` turns
bytes into checked objects, `store.bundles` reads the files.

Names inside the graphs are the contract between exporter and engine:

- forward graph: inputs are the segment's ports, trainable parameters, running values and masks
  by their local names; outputs are the output ports, then `new.<running>` for every running
  value, then the stash.
- backward graph: inputs are any of the forward's inputs, its stash, and `cotangent.<output>` for
  differentiable outputs; outputs are `cotangent.<input>` for every differentiable input port and
  `gradient.<parameter>` for every trainable parameter.
- the backward in two parts, where a form has them: the first gives every `cotangent.<input>` and
  `kept`, values that the second reads beside what the backward reads; the second gives every
  `gradient.<parameter>`. Both together give the bits of the whole backward.
- evaluation graph, where a kind has one: the forward's inputs without masks; outputs are the
  output ports.
- frozen parameters are read by their local names in any of these graphs and declared in none: the
  engine binds them as constants, which the runtime may prepack.
- update graph: `parameter`, `gradient`, `state.<name>` of shape (n,), scalars by name; outputs
  `new.parameter`, `new.state.<name>`.

How segments are computed by several peers together is in `bundle.sharding`.

Shapes are tuples of integers and symbol names; a symbol's size is in `symbols`, except `batch`,
which the run chooses (the microbatch size).
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from p2ptrain.bundle.sharding import ShardedKind, Sharding
from p2ptrain.errors import BundleError
from p2ptrain.ids import Digest
from p2ptrain.wire.codec import to_plain

FORMAT: Final = "p2ptrain-bundle"
VERSION: Final = 5
WITH_UNITS_AS_NUMBERS: Final = 4
"""What a bundle whose sliced axes all have a number of units is written as, so that its digest
stays."""
_WITHOUT_SHARDING: Final = 3
"""What a bundle that cannot be sharded is written as, so that its digest stays."""
_WITHOUT_PARTS: Final = 2
"""What a bundle without backwards in two parts is written as, so that its digest stays."""
BATCH: Final = "batch"
FORMS: Final = ("portable", "training")
DTYPES: Final = {"float32": 4, "int64": 8, "int32": 4, "uint8": 1, "bool": 1}

Form = Literal["portable", "training"]
PORT_ROLES: Final = ("boundary", "data", "labels", "loss_weight", "loss")
BINDINGS: Final = ("trainable", "frozen", "running")
TASKS: Final = (
    "language-modelling",
    "masked-language-modelling",
    "sequence-classification",
    "token-classification",
    "image-classification",
    "regression",
)
LOSSES: Final = ("cross-entropy", "mse", "bce", "l1")
DATA_KINDS: Final = ("windows", "masked-windows", "texts", "words", "images", "arrays")


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
    """boundary: from or to the neighbouring segment; data (first segment only), labels and
    loss_weight (last segment only): fed by the run; loss: the scalar result."""
    differentiable: bool
    """False for what travels with the boundary without a cotangent: attention masks, positions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskSite:
    """A dropout site: the graph multiplies by this float32 mask input (0 or 1 / (1 - p))."""

    value: Value
    probability: float
    """The model's own dropout probability; a run may override it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardParts:
    """A backward in two graphs: what upstream waits for, and what only the update waits for.

    Source: Qi et al. 2024, "Zero Bubble Pipeline Parallelism", section 2 (their B and W).
    """

    cotangents: Digest
    gradients: Digest
    kept: tuple[Value, ...]
    """What the first makes for the second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphPair:
    """Forward and backward graph of one form, and what the forward keeps for the backward."""

    forward: Digest
    backward: Digest
    stash: tuple[Value, ...]
    parts: BackwardParts | None = None
    """None where the backward gives cotangents or gradients only, or was exported whole."""

    @property
    def graphs(self) -> tuple[Digest, ...]:
        """Every graph of the form."""
        parts = () if self.parts is None else (self.parts.cotangents, self.parts.gradients)
        return (self.forward, self.backward, *parts)


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
    running: tuple[Value, ...] = ()
    """What every training forward replaces, microbatch after microbatch: running statistics."""
    evaluation: Digest | None = None
    """Graph of an evaluation where it is another function than the forward; None: the forward
    graph with masks of ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One position in the model: a kind with the global names of its parameters."""

    name: str
    kind: str
    parameters: dict[str, str]
    """Local parameter name -> tensor name; the order is the kind's, JSON keeps none."""
    running: dict[str, str] = field(default_factory=dict)
    """Local running value -> tensor name."""


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
class Adapter:
    """Low-rank adapters of a frozen matrix W: the graphs compute with W + scale * up @ down, where
    `down` (r, in) and `up` (out, r) are trainable tensors.

    Source: LoRA, Hu et al. 2021, section 4.1.
    """

    down: str
    up: str
    scale: float
    transposed: bool
    """W is stored (in, out): what is added to it is scale * (up @ down) transposed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """A parameter or running value of the whole model, in manifest order."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    binding: str
    """trainable; frozen: never changes; running: replaced by every training forward."""
    initialiser: Initialiser
    decay: bool
    """Whether weight decay applies (matrices yes; biases and norms no)."""
    shard: ShardGroup | None = None
    tied_to: str | None = None
    """An earlier tensor of which this is a copy in another segment: drawn as that one, with the
    sum of both gradients, in segment order, updating both."""
    adapter: Adapter | None = None
    digest: Digest | None = None
    """sha256 of its raw little-endian bytes in `weights.safetensors`; None: it is drawn."""

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
    """The whole model without weights, adapters merged: data in, logits or predictions out."""

    graph: Digest
    inputs: tuple[Value, ...]
    output: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """The scalar that the last segment ends in: a sum over labels times `loss_weight`."""

    kind: str
    """One of LOSSES."""
    ignore_index: int = -100
    """Integer labels of this value do not count."""
    label_smoothing: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSection:
    """What the model eats, and in which order; shapes and dtypes are those of the data ports."""

    kind: str
    """windows: text, labels shifted by one; masked-windows: text, some tokens hidden; texts: one
    label per text; words: one label per token; images: one label per image; arrays: as they are."""
    sampling: str
    """Version of the sampling order: `philox-1`."""
    tokenizer: str = ""
    """`bytes`, or `tokenizer.json` for that file of the bundle; empty where there is no text."""
    tokenizer_digest: Digest | None = None
    """sha256 of `tokenizer.json`."""
    vocabulary: int = 0
    """Token ids; 0 where there is no text."""
    context: int = 0
    """Tokens of one sample; 0 where there is no text."""
    classes: int = 0
    """Of a classification; 0 for other tasks."""
    class_names: tuple[str, ...] = ()
    """By label; empty: labels are numbers."""
    special_tokens: dict[str, int] = field(default_factory=dict)
    """Ids of pad, mask, cls, sep and unknown, where the tokenizer has them."""
    mask_probability: float = 0.0
    """Of a token to be predicted, in masked-windows."""
    image_mean: tuple[float, ...] = ()
    """Per channel, of pixels scaled to 0 to 1; empty: not normalised."""
    image_std: tuple[float, ...] = ()


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
    loss: Loss
    golden_parameters: Digest
    """sha256 over all drawn tensors with seed 0, little-endian, manifest order."""
    checks: dict[str, float] = field(default_factory=dict)
    """Worst errors of the exporter's own check against torch."""
    weights: Digest | None = None
    """sha256 of `weights.safetensors`; None: every tensor is drawn."""
    sharding: dict[str, Sharding] = field(default_factory=dict)
    """By mode; empty: exported without, and no segment can be shared by several peers."""

    @property
    def digest(self) -> Digest:
        return Digest(hashlib.sha256(self.to_bytes()).hexdigest())

    def to_bytes(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces after the indent, a final newline."""
        document = {"format": FORMAT, "version": VERSION, **to_plain(self)}
        if self.sharding:
            _number_units(document)
        else:
            document["version"] = _WITHOUT_SHARDING
            del document["sharding"]
            if not any(pair.parts for kind in self.kinds.values() for pair in kind.forms.values()):
                document["version"] = _WITHOUT_PARTS
                for kind in document["kinds"].values():
                    for pair in kind["forms"].values():
                        del pair["parts"]
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

    def segment_running(self, segment_index: int) -> tuple[Tensor, ...]:
        """The running values of one segment, in its kind's order."""
        index = self._tensor_index
        segment = self.segments[segment_index]
        values = self.kinds[segment.kind].running
        return tuple(index[segment.running[value.name]] for value in values)

    @property
    def data_ports(self) -> tuple[Port, ...]:
        """What the run feeds to the first segment, in order."""
        inputs = self.kinds[self.segments[0].kind].inputs
        return tuple(port for port in inputs if port.role == "data")

    @property
    def labels_port(self) -> Port:
        """What the run feeds to the last segment beside `loss_weight`."""
        inputs = self.kinds[self.segments[-1].kind].inputs
        return next(port for port in inputs if port.role == "labels")

    @property
    def parameter_count(self) -> int:
        return sum(tensor.elements for tensor in self.tensors)

    def shape(self, value: Value, *, batch: int) -> tuple[int, ...]:
        """The concrete shape of a graph value for a microbatch of `batch` samples."""
        return tuple(self.axis_size(axis, batch=batch) for axis in value.shape)

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

    def units(self, sharded: ShardedKind) -> dict[str, int]:
        """How many units each sliced axis of a kind has: so many shards there can be at most."""
        return {name: self.axis_size(axis, batch=1) for name, axis in sharded.axes.items()}

    def axis_size(self, axis: str, *, batch: int) -> int:
        """The size of an axis for a microbatch of `batch` samples."""
        if "*" in axis:
            return math.prod(self.axis_size(part, batch=batch) for part in axis.split("*"))
        if axis == BATCH:
            return batch
        if axis.isdigit():
            return int(axis)
        size = self.symbols[axis].size
        if size is None:
            raise BundleError(f"symbol {axis!r} has no size")
        return size


def _number_units(document: dict[str, Any]) -> None:  # Any: JSON, ours
    """Write what version 4 could say as it would have."""
    kinds = [kind for mode in document["sharding"].values() for kind in mode["kinds"].values()]
    if all(axis.isdecimal() for kind in kinds for axis in kind["axes"].values()):
        document["version"] = WITH_UNITS_AS_NUMBERS
        for kind in kinds:
            kind["axes"] = {name: int(axis) for name, axis in kind["axes"].items()}
