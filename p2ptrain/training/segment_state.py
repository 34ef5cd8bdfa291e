"""One segment's parameters, optimizer state and running values: what is saved and hashed.

Checkpoints are per segment, never per stage, so that any number of peers can resume them. Frozen
tensors are in none: they come from the bundle's weights or are drawn again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.errors import CheckpointError
from p2ptrain.ids import Digest, Lineage, RunId, ViewNumber
from p2ptrain.training.boundaries import cotangent_values
from p2ptrain.training.contract import Contract
from p2ptrain.training.safetensors import (
    Array,
    decode_tensors,
    encode_head,
    encode_tensors,
    raw_bytes,
)
from p2ptrain.training.tensor_codec import ResidualKey

FORMAT: Final = "p2ptrain-segment"
VERSION: Final = 3
"""Version 1 knew no running values, 2 no residuals: they read as segments that have none."""
VERSIONS_READ: Final = ("1", "2", "3")
_PARAMETER: Final = "parameter/"
_STATE: Final = "state."
_RUNNING: Final = "running/"
_RESIDUAL: Final = "residual/"
_VALUE: Final = np.dtype("<f4")

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class StateHeader:
    """Where a segment's state comes from."""

    run: RunId
    lineage: Lineage
    view: ViewNumber
    plan: Digest
    step: int
    """Updates applied so far."""
    segment: int
    bundle: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentState:
    """Trainable parameters and running values by tensor name, optimizer vectors by state name and
    tensor name.

    All arrays are float32 of the tensors' shapes, in their kind's order. Each copy of a tied
    tensor is there, with the same values.
    """

    tensors: dict[str, FloatArray]
    state: dict[str, dict[str, FloatArray]]
    step: int
    """Updates applied so far."""
    running: dict[str, FloatArray] = field(default_factory=dict)
    residuals: dict[str, FloatArray] = field(default_factory=dict)
    """What int8 took from the cotangents that this segment sent, by `residual_name`; zero
    where it was not the first of a stage."""

    def digest(self) -> Digest:
        """sha256 over parameters, state vectors, running values, residuals, little-endian."""
        digest = hashlib.sha256()
        for chunk in self.values():
            digest.update(chunk)
        return Digest(digest.hexdigest())

    def values(self) -> Iterator[memoryview]:
        """The values of the file, in its order: what `digest` is of."""
        return map(raw_bytes, self._named().values())

    def to_chunks(self, header: StateHeader) -> list[bytes | memoryview]:
        """The checkpoint file of this segment, as chunks for an atomic write."""
        return encode_tensors(self._named(), metadata_of(header))

    def to_bytes(self, header: StateHeader) -> bytes:
        """The checkpoint file of this segment in one piece."""
        return b"".join(self.to_chunks(header))

    def _named(self) -> dict[str, Array]:
        named: dict[str, Array] = {_PARAMETER + n: tensor for n, tensor in self.tensors.items()}
        for state, vectors in self.state.items():
            named |= {f"{_STATE}{state}/{name}": vector for name, vector in vectors.items()}
        named |= {_RUNNING + name: value for name, value in self.running.items()}
        return named | {_RESIDUAL + name: value for name, value in self.residuals.items()}


def metadata_of(header: StateHeader) -> dict[str, str]:
    """What a segment's file says about itself."""
    return {
        "format": FORMAT,
        "version": str(VERSION),
        "run": header.run,
        "lineage": str(header.lineage),
        "view": str(header.view),
        "plan": header.plan,
        "step": str(header.step),
        "segment": str(header.segment),
        "bundle": header.bundle,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSegment:
    """A segment's state as read back, and where it came from."""

    header: StateHeader
    state: SegmentState


def state_digest(segment_digests: Iterable[Digest]) -> Digest:
    """sha256 over the segments' digests in model order: peers hash apart, one combines."""
    digest = hashlib.sha256()
    for segment_digest in segment_digests:
        digest.update(bytes.fromhex(segment_digest))
    return Digest(digest.hexdigest())


def read_segment_state(
    content: bytes | memoryview, manifest: Manifest, *, bundle: Digest, state_names: tuple[str, ...]
) -> StoredSegment:
    """Read one segment's checkpoint; arrays are read-only views into `content`.

    Args:
        content: The whole file.
        manifest: Of the model it must belong to.
        bundle: The manifest's digest.
        state_names: The optimizer's state vectors, in the update rule's order.

    Raises:
        CheckpointError: damaged, an unknown version, or of another model or optimizer.
    """
    file = decode_tensors(content)
    header = _header(file.metadata)
    if header.bundle != bundle or not 0 <= header.segment < len(manifest.segments):
        raise CheckpointError(
            f"the checkpoint belongs to another model (bundle {header.bundle:.12})"
        )
    expected = saved_shapes(manifest, header.segment, state_names)
    found = {name: tensor.shape for name, tensor in file.tensors.items()}
    residuals = {n: found.pop(n) for n in list(found) if n.startswith(_RESIDUAL)}
    if list(found.items()) != list(expected.items()):
        raise CheckpointError(
            f"the checkpoint of segment {header.segment} holds other tensors than the model",
            hint="resume with the optimizer that the run was started with",
        )
    if any(tensor.dtype != _VALUE for tensor in file.tensors.values()):
        raise CheckpointError("a checkpoint holds float32 tensors only")
    if header.segment == 0 and residuals:
        raise CheckpointError("the first segment sends no cotangents, so it has no residuals")
    state = state_view(file.tensors, step=header.step, state_names=state_names)
    return StoredSegment(header=header, state=state)


def residual_name(key: ResidualKey) -> str:
    """How a residual is called in the state of the segment that sent the cotangent."""
    return f"{key.microbatch}/{key.index}"


def residual_shapes(
    manifest: Manifest, contract: Contract, segment_index: int
) -> dict[ResidualKey, tuple[int, ...]]:
    """The residuals in a segment's state; none but under int8.

    Every segment has them, whatever the cuts, so that sizes follow from manifest and contract;
    where none was sent they are zero.
    """
    if contract.codec != "int8" or segment_index == 0:
        return {}
    before, batch = segment_index - 1, contract.microbatch_size
    shapes = [manifest.shape(v, batch=batch) for v in cotangent_values(manifest, before)]
    return {
        ResidualKey(segment=before, index=index, microbatch=microbatch): shape
        for microbatch in range(contract.microbatches)
        for index, shape in enumerate(shapes)
    }


def saved_shapes(
    manifest: Manifest,
    segment_index: int,
    state_names: tuple[str, ...],
    contract: Contract | None = None,
    slices: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a segment's file, in its order; all float32.

    Without a contract there are no residuals among them. `slices` are the shapes of tensors, by
    name, of which the file holds a shard's slice.
    """
    tensors = manifest.segment_tensors(segment_index)
    trainable = {t.name: t.shape for t in tensors if t.binding == "trainable"}
    trainable |= {n: shape for n, shape in (slices or {}).items() if n in trainable}
    shapes = {_PARAMETER + name: shape for name, shape in trainable.items()}
    for state in state_names:
        shapes |= {f"{_STATE}{state}/{name}": shape for name, shape in trainable.items()}
    running = manifest.segment_running(segment_index)
    shapes |= {_RUNNING + tensor.name: tensor.shape for tensor in running}
    if contract is not None:
        residuals = residual_shapes(manifest, contract, segment_index)
        shapes |= {_RESIDUAL + residual_name(key): shape for key, shape in residuals.items()}
    return shapes


def values_bytes(
    manifest: Manifest,
    segment_index: int,
    state_names: tuple[str, ...],
    contract: Contract | None = None,
    slices: Mapping[str, tuple[int, ...]] | None = None,
) -> int:
    """Size of a segment's values, which follow the head in its file; the sha256 of their bytes is
    the state's digest."""
    shapes = saved_shapes(manifest, segment_index, state_names, contract, slices)
    return _VALUE.itemsize * sum(math.prod(shape) for shape in shapes.values())


def segment_head(
    manifest: Manifest,
    header: StateHeader,
    state_names: tuple[str, ...],
    contract: Contract | None = None,
    slices: Mapping[str, tuple[int, ...]] | None = None,
) -> bytes:
    """What a segment's file begins with; the values come after it."""
    shapes = saved_shapes(manifest, header.segment, state_names, contract, slices)
    described = {name: (_VALUE, shape) for name, shape in shapes.items()}
    return encode_head(described, metadata_of(header))


def state_view(
    tensors: dict[str, Array], *, step: int, state_names: tuple[str, ...]
) -> SegmentState:
    """A state over arrays that are named as in a segment's file."""

    def under(prefix: str) -> dict[str, FloatArray]:
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    return SegmentState(
        tensors=under(_PARAMETER),
        state={name: under(f"{_STATE}{name}/") for name in state_names},
        step=step,
        running=under(_RUNNING),
        residuals=under(_RESIDUAL),
    )


def _header(metadata: dict[str, str]) -> StateHeader:
    if metadata.get("format") != FORMAT:
        raise CheckpointError("the file is not a checkpoint of p2ptrain")
    if metadata.get("version") not in VERSIONS_READ:
        raise CheckpointError(
            f"checkpoint version {metadata.get('version')!r} is unknown; this p2ptrain reads up to "
            f"{VERSION}",
            hint="update p2ptrain",
        )
    try:
        return StateHeader(
            run=RunId(metadata["run"]),
            lineage=Lineage(int(metadata["lineage"])),
            view=ViewNumber(int(metadata["view"])),
            plan=Digest(metadata["plan"]),
            step=int(metadata["step"]),
            segment=int(metadata["segment"]),
            bundle=Digest(metadata["bundle"]),
        )
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's header is damaged: {error}") from error
