"""All shards of a segment chain in one process, with collectives by numpy in shard order.

This is the contract of `bundle.sharding` in its plainest form. As a script it compares the plans
of folders that a test has written with the whole chain, on the runtime that it is started with:
`python -m tests.sharded_runner FOLDER...` prints one JSON object.
"""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2ptrain.bundle.manifest import Manifest, Segment, SegmentKind
from p2ptrain.bundle.reading import parse_manifest
from p2ptrain.bundle.sharding import Collective, ShardedKind, Sharding, ShardSlice
from p2ptrain.graph.measured import gradient_error
from p2ptrain.graph.runner import Ran, Runner
from p2ptrain.ids import Digest

Array = NDArray[Any]
Arrays = dict[str, Array]
PLANS = (
    ("tensor", (1, 1)),
    ("tensor", (4, 3)),
    ("tensor", (2, 1, 1)),
    ("sequence", (1, 1)),
    ("sequence", (4, 3)),
    ("sequence", (2, 1, 1)),
)
"""Mode, and how much each shard may have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A bundle and one microbatch for it."""

    manifest: Manifest
    files: Mapping[Digest, bytes]
    parameters: Arrays
    inputs: Arrays
    masks: Sequence[Arrays]
    wanted: Ran
    """By the whole chain of segments, in float64, where a gradient of zero is one."""

    def write(self, folder: Path) -> None:
        """As `read` reads it."""
        wanted = (self.wanted.loss, self.wanted.gradients)
        plain = (self.files, self.parameters, self.inputs, self.masks, wanted)
        (folder / "manifest.json").write_bytes(self.manifest.to_bytes())
        (folder / "case").write_bytes(pickle.dumps(plain))

    @classmethod
    def read(cls, folder: Path) -> Case:
        plain = pickle.loads((folder / "case").read_bytes())
        files, parameters, inputs, masks, (loss, gradients) = plain
        return cls(
            manifest=parse_manifest((folder / "manifest.json").read_bytes()),
            files=files,
            parameters=parameters,
            inputs=inputs,
            masks=masks,
            wanted=Ran(loss=loss, gradients=gradients, running={}),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """How many units each shard has, of so many as there are."""

    weights: tuple[int, ...]

    def counts(self, units: int) -> list[int]:
        """Whole units in proportion, none without one; the first ones take what is left."""
        found = [max(1, units * weight // sum(self.weights)) for weight in self.weights]
        index = 0
        while sum(found) != units:
            found[index % len(found)] += 1 if sum(found) < units else -1
            index += 1
        return found


def cut_slice(whole: Array, slice_: ShardSlice, start: int, count: int, units: int) -> Array:
    """A shard's elements of a whole value."""
    pieces, begin = [], 0
    for block in slice_.blocks:
        first = begin + start * block
        index = [slice(None)] * whole.ndim
        index[slice_.axis] = slice(first, first + count * block)
        pieces.append(whole[tuple(index)])
        begin += units * block
    assert begin == whole.shape[slice_.axis]
    return np.ascontiguousarray(np.concatenate(pieces, slice_.axis))


def join_slices(parts: Sequence[Array], slice_: ShardSlice, counts: Sequence[int]) -> Array:
    """The whole of all shards' slices."""
    groups: list[list[Array]] = [[] for _ in slice_.blocks]
    for part, count in zip(parts, counts, strict=True):
        begin = 0
        for group, block in zip(groups, slice_.blocks, strict=True):
            index = [slice(None)] * part.ndim
            index[slice_.axis] = slice(begin, begin + count * block)
            group.append(part[tuple(index)])
            begin += count * block
    return np.concatenate([part for group in groups for part in group], slice_.axis)


@dataclass(slots=True, kw_only=True)
class ShardedRunner:
    """Runs a chain of segments by shards."""

    manifest: Manifest
    sharding: Sharding
    shares: Shares
    runner: Runner
    met_bytes: dict[str, int] = field(default_factory=dict)
    """By kind of collective: bytes of whole values that went through one."""

    def step(
        self, parameters: Arrays, inputs: Arrays, masks: Sequence[Arrays]
    ) -> tuple[float, Arrays]:
        """Loss and gradients, by whole tensors."""
        entering: list[list[Array]] = [[] for _ in self.shares.weights]
        kept = []
        for segment, mask in zip(self.manifest.segments, masks, strict=True):
            kind = self.manifest.kinds[segment.kind]
            local = {name: parameters[tensor] for name, tensor in segment.parameters.items()}
            ports = {
                port.value.name: inputs[port.value.name]
                for port in kind.inputs
                if port.role != "boundary"
            }
            feeds = self._split(kind, {**local, **mask, **ports})
            names = [p.value.name for p in kind.inputs if p.role == "boundary"]
            for feed, values in zip(feeds, entering, strict=True):
                feed.update(zip(names, values, strict=True))
            self._side(kind, segment, feeds, backward=False)
            kept.append(feeds)
            leaving = [p.value.name for p in kind.outputs if p.role == "boundary"]
            entering = [[feed[name] for name in leaving] for feed in feeds]
        losses = [feed["loss"] for feed in kept[-1]]
        assert all(np.array_equal(loss, losses[0]) for loss in losses)
        return float(losses[0]), self._backward(kept)

    def _backward(self, kept: Sequence[list[Arrays]]) -> Arrays:
        gradients: Arrays = {}
        one = np.array(1.0, np.float32)
        incoming: list[Arrays] = [{"cotangent.loss": one} for _ in self.shares.weights]
        for index in reversed(range(len(kept))):
            segment, feeds = self.manifest.segments[index], kept[index]
            kind = self.manifest.kinds[segment.kind]
            for feed, given in zip(feeds, incoming, strict=True):
                feed.update(given)
            if all(name in feeds[0] for name in _seeds(kind)):
                self._side(kind, segment, feeds, backward=True)
            gradients |= self._whole_gradients(kind, segment, feeds)
            if index:
                before = self.manifest.kinds[self.manifest.segments[index - 1].kind]
                incoming = [_cotangents(before, kind, feed) for feed in feeds]
        return gradients

    def _run(self, segment: Segment, graph: Digest, feeds: list[Arrays]) -> None:
        """One graph on every shard; its frozen parameters are constants of the shard."""
        for index, feed in enumerate(feeds):
            frozen = {
                local: feed[local]
                for local, tensor in segment.parameters.items()
                if self.manifest.tensor(tensor).binding == "frozen"
            }
            place = f"{segment.name} {index} {self.shares}"
            feed.update(self.runner.run(graph, feed, frozen=frozen, place=place))

    def _axes(self, kind: SegmentKind) -> ShardedKind | None:
        return self.sharding.kinds.get(kind.name)

    def _units(self, sharded: ShardedKind | None) -> dict[str, int]:
        return {} if sharded is None else self.manifest.units(sharded)

    def _split(self, kind: SegmentKind, whole: Arrays) -> list[Arrays]:
        sharded = self._axes(kind)
        feeds: list[Arrays] = []
        for index in range(len(self.shares.weights)):
            feed = dict(whole)
            for axis, units in self._units(sharded).items():
                counts = self.shares.counts(units)
                start = sum(counts[:index])
                for name, value in (("start", start), ("count", counts[index]), ("all", units)):
                    feed[f"shard.{name}.{axis}"] = np.array([value], np.int64)
            for name, slice_ in (sharded.slices if sharded else {}).items():
                if sharded is not None and name in whole:
                    units = self._units(sharded)[slice_.units_of]
                    counts = self.shares.counts(units)
                    start = sum(counts[:index])
                    feed[name] = cut_slice(whole[name], slice_, start, counts[index], units)
            feeds.append(feed)
        return feeds

    def _side(
        self, kind: SegmentKind, segment: Segment, feeds: list[Arrays], *, backward: bool
    ) -> None:
        sharded = self._axes(kind)
        if sharded is None:
            pair = kind.forms["portable"]
            self._run(segment, pair.backward if backward else pair.forward, feeds)
            return
        for part in sharded.backward if backward else sharded.forward:
            self._run(segment, part.graph, feeds)
            assert all(name in feed for feed in feeds for name in part.outputs)
            for collective in part.collectives:
                for feed, got in zip(feeds, self._meet(sharded, collective, feeds), strict=True):
                    feed[collective.got] = got

    def _meet(self, sharded: ShardedKind, what: Collective, feeds: Sequence[Arrays]) -> list[Array]:
        sent = [feed[what.sent] for feed in feeds]
        if what.kind == "gather":
            whole = np.concatenate(sent, what.axis)
        else:
            whole = sent[0].copy()
            for term in sent[1:]:
                whole = np.asarray(whole + term)
        counts = self.met_bytes
        counts[what.kind] = counts.get(what.kind, 0) + whole.nbytes
        if what.kind != "scatter":
            return [whole] * len(feeds)
        (units,) = self._units(sharded).values()
        ends = np.cumsum(self.shares.counts(units))[:-1]
        return [np.ascontiguousarray(part) for part in np.split(whole, ends, what.axis)]

    def _whole_gradients(
        self, kind: SegmentKind, segment: Segment, feeds: Sequence[Arrays]
    ) -> Arrays:
        sharded = self._axes(kind)
        found = {}
        for local, tensor in segment.parameters.items():
            terms = [feed[f"gradient.{local}"] for feed in feeds if f"gradient.{local}" in feed]
            if not terms:
                continue
            if sharded is not None and local in sharded.slices:
                slice_ = sharded.slices[local]
                counts = self.shares.counts(self._units(sharded)[slice_.units_of])
                found[tensor] = join_slices(terms, slice_, counts)
            elif sharded is not None and local in sharded.summed:
                found[tensor] = np.sum(terms, 0)
            else:
                assert all(np.array_equal(term, terms[0]) for term in terms), local
                found[tensor] = terms[0]
        return found


def _seeds(kind: SegmentKind) -> list[str]:
    """What its backward needs; nobody gives it before anything that is trained."""
    return [f"cotangent.{port.value.name}" for port in kind.outputs if port.differentiable] or [""]


def _cotangents(kind: SegmentKind, later: SegmentKind, feed: Arrays) -> Arrays:
    """What a segment's outputs get, from what the following one gives for its inputs."""
    ours = [port for port in kind.outputs if port.role == "boundary"]
    theirs = [port.value.name for port in later.inputs if port.role == "boundary"]
    return {
        f"cotangent.{port.value.name}": feed[f"cotangent.{their}"]
        for port, their in zip(ours, theirs, strict=True)
        if port.differentiable and f"cotangent.{their}" in feed
    }


def plans_of(manifest: Manifest) -> list[tuple[str, tuple[int, ...]]]:
    """The plans that a bundle has units enough for."""
    return [
        (mode, weights)
        for mode, weights in PLANS
        if manifest.sharding[mode].kinds
        and all(
            min(manifest.units(kind).values()) >= len(weights)
            for kind in manifest.sharding[mode].kinds.values()
        )
    ]


def sharded_runner(
    case: Case, runner: Runner, mode: str, weights: tuple[int, ...]
) -> ShardedRunner:
    """The case's chain of segments, by shards."""
    return ShardedRunner(
        manifest=case.manifest,
        sharding=case.manifest.sharding[mode],
        shares=Shares(weights=weights),
        runner=runner,
    )


def errors(case: Case, runner: Runner) -> dict[str, float]:
    """By plan: the worse of the loss' error and the worst gradient's, against the whole chain."""
    found = {}
    for mode, weights in plans_of(case.manifest):
        sharded = sharded_runner(case, runner, mode, weights)
        loss, gradients = sharded.step(case.parameters, case.inputs, case.masks)
        assert set(gradients) == set(case.wanted.gradients)
        error, _ = gradient_error(gradients, case.wanted.gradients)
        loss_error = abs(loss - case.wanted.loss) / abs(case.wanted.loss)
        found[f"{mode} {weights}"] = max(error, loss_error)
    return found


def main() -> None:
    import onnxruntime

    found = {}
    for folder in sys.argv[1:]:
        case = Case.read(Path(folder))
        found[folder] = errors(case, Runner(manifest=case.manifest, files=case.files))
    has_training = hasattr(onnxruntime, "training")
    print(json.dumps({"has_training": has_training, "errors": found}))


if __name__ == "__main__":
    main()
