"""Deeper models out of a bundle: its repeated block, again and again, with the same graphs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from p2ptrain.bundle.manifest import Manifest, Segment, Tensor
from p2ptrain.errors import ConfigError
from p2ptrain.ids import Digest
from p2ptrain.store.bundles import Bundle, bundle_from_parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Repetition:
    """The longest run of equal consecutive groups of segment kinds."""

    start: int
    period: int
    """Segments of one block."""
    count: int


def find_repetition(kinds: tuple[str, ...]) -> Repetition | None:
    """Where blocks repeat, the shortest block first; None where nothing does."""
    best: Repetition | None = None
    for period in range(1, len(kinds) // 2 + 1):
        for start in range(len(kinds) - 2 * period + 1):
            count = 1
            block = kinds[start : start + period]
            while kinds[start + count * period : start + (count + 1) * period] == block:
                count += 1
            covered = 0 if best is None else best.period * best.count
            if count > 1 and count * period > covered:
                best = Repetition(start=start, period=period, count=count)
    return best


def deeper_bundle(bundle: Bundle, blocks: int) -> Bundle:
    """The same model with `blocks` blocks, for measuring only: its inference graph stays behind.

    Raises:
        ConfigError: the model repeats nothing, has more blocks than that, or ties its last one.
    """
    manifest = bundle.manifest
    found = find_repetition(tuple(segment.kind for segment in manifest.segments))
    if found is None or blocks < found.count:
        raise ConfigError(f"{manifest.name} repeats no block, or more than {blocks}")
    end = found.start + found.period * found.count
    block = manifest.segments[end - found.period : end]
    if any(_tied(manifest, segment) for segment in block):
        raise ConfigError(f"{manifest.name} ties a tensor of its block")
    more = range(found.count, blocks)
    segments = (
        *manifest.segments[:end],
        *(_copy(s, i) for i in more for s in block),
        *manifest.segments[end:],
    )
    changed = dataclasses.replace(
        manifest, segments=segments, tensors=_tensors(manifest, block, more)
    )
    graphs = {Digest(digest): bundle.graph(Digest(digest)) for digest in manifest.graphs}
    return bundle_from_parts(changed.to_bytes(), graphs)


def _copy(segment: Segment, number: int) -> Segment:
    return dataclasses.replace(
        segment,
        name=f"{segment.name}.copy{number}",
        parameters={n: f"{t}.copy{number}" for n, t in segment.parameters.items()},
        running={n: f"{t}.copy{number}" for n, t in segment.running.items()},
    )


def _tensors(manifest: Manifest, block: tuple[Segment, ...], more: range) -> tuple[Tensor, ...]:
    """The model's tensors in their order, then those of the new blocks."""
    names = [name for s in block for name in (*s.parameters.values(), *s.running.values())]
    kept = list(manifest.tensors)
    for number in more:
        for name in names:
            copied = dataclasses.replace(manifest.tensor(name), name=f"{name}.copy{number}")
            kept.append(copied)
    return tuple(kept)


def _tied(manifest: Manifest, segment: Segment) -> bool:
    owners = {tensor.tied_to for tensor in manifest.tensors}
    names = segment.parameters.values()
    return any(manifest.tensor(name).tied_to or name in owners for name in names)
