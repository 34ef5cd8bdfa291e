"""What a person wants to know of a bundle, from its manifest alone; `--json` prints the same."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from p2ptrain.bundle.manifest import BINDINGS, Manifest, SegmentKind
from p2ptrain.bundle.sharding import Sharding
from p2ptrain.ids import Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class KindReport:
    """One distinct segment; sizes and operations are those of one sample."""

    name: str
    segments: tuple[str, ...]
    """Names of the segments of this kind, in order."""
    parameters: int
    """Elements of one segment."""
    forward_flops: int
    backward_flops: int
    stash_bytes: int
    """Of the portable form."""
    boundary_bytes: int
    """Activations handed to the next segment; cotangents come back in the same size."""
    forms: tuple[str, ...]
    sharding: dict[str, str]
    """By mode: how many units there are to divide among peers, or why it is computed whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleReport:
    """A bundle in short."""

    version: int
    """Of this report."""
    name: str
    digest: Digest
    description: str
    task: str
    loss: str
    data_kind: str
    tokenizer: str
    vocabulary: int
    classes: int
    inputs: tuple[str, ...]
    """`name dtype (axes)` of what the run feeds to the first segment."""
    parameters: dict[str, int]
    """Elements by binding: trainable, frozen, running."""
    tensors: int
    segments: int
    kinds: tuple[KindReport, ...]
    """In the order in which the model meets them."""
    graphs: int
    graph_bytes: int
    updates: tuple[str, ...]
    ties: tuple[str, ...]
    """`copy = owner`."""
    adapters: tuple[str, ...]
    """Tensors that carry one."""
    weights: bool
    """Whether it brings weights; otherwise every tensor is drawn."""
    checks: dict[str, float]
    """Worst errors of the exporter's own check against torch."""


def bundle_report(manifest: Manifest) -> BundleReport:
    """Sum up a checked manifest."""
    parameters = dict.fromkeys(BINDINGS, 0)
    for tensor in manifest.tensors:
        parameters[tensor.binding] += tensor.elements
    used = Counter(segment.kind for segment in manifest.segments)
    return BundleReport(
        version=1,
        name=manifest.name,
        digest=manifest.digest,
        description=manifest.description,
        task=manifest.task,
        loss=manifest.loss.kind,
        data_kind=manifest.data.kind,
        tokenizer=manifest.data.tokenizer,
        vocabulary=manifest.data.vocabulary,
        classes=manifest.data.classes,
        inputs=tuple(
            f"{port.value.name} {port.value.dtype} ({', '.join(port.value.shape)})"
            for port in manifest.data_ports
        ),
        parameters=parameters,
        tensors=len(manifest.tensors),
        segments=len(manifest.segments),
        kinds=tuple(_kind_report(manifest, manifest.kinds[name]) for name in used),
        graphs=len(manifest.graphs),
        graph_bytes=sum(file.bytes for file in manifest.graphs.values()),
        updates=tuple(sorted(manifest.updates)),
        ties=tuple(f"{t.name} = {t.tied_to}" for t in manifest.tensors if t.tied_to is not None),
        adapters=tuple(tensor.name for tensor in manifest.tensors if tensor.adapter is not None),
        weights=manifest.weights is not None,
        checks=manifest.checks,
    )


def _kind_report(manifest: Manifest, kind: SegmentKind) -> KindReport:
    indices = [i for i, each in enumerate(manifest.segments) if each.kind == kind.name]
    first = indices[0]
    return KindReport(
        name=kind.name,
        segments=tuple(manifest.segments[index].name for index in indices),
        parameters=sum(tensor.elements for tensor in manifest.segment_tensors(first)),
        forward_flops=kind.forward_flops,
        backward_flops=kind.backward_flops,
        stash_bytes=manifest.stash_bytes(first, form="portable", batch=1),
        boundary_bytes=manifest.boundary_bytes(first, batch=1),
        forms=tuple(sorted(kind.forms)),
        sharding={
            mode: _sharding_report(manifest, sharding, kind.name)
            for mode, sharding in sorted(manifest.sharding.items())
        },
    )


def _sharding_report(manifest: Manifest, sharding: Sharding, name: str) -> str:
    if name not in sharding.kinds:
        return f"whole: {sharding.whole[name]}"
    units = manifest.units(sharding.kinds[name])
    return " and ".join(f"{count} units" for count in units.values())
