"""What can be wrong with a manifest's sharding section although every field has its type.

It is read after everything else about kinds, so ports, parameters and symbols can be relied on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from p2ptrain import limits
from p2ptrain.bundle.manifest import DTYPES, Manifest, SegmentKind, Value
from p2ptrain.bundle.sharding import (
    COLLECTIVES,
    MODES,
    SIZES,
    Collective,
    ShardedKind,
    Sharding,
    ShardPart,
    ShardSlice,
)


def sharding_problems(manifest: Manifest) -> Iterator[str]:
    """Every contradiction of the section, as sentences."""
    for mode, sharding in manifest.sharding.items():
        if mode not in MODES:
            yield f"unknown sharding {mode!r:.40}"
        told = Counter([*sharding.kinds, *sharding.whole])
        if set(told) != set(manifest.kinds) or any(count > 1 for count in told.values()):
            yield f"{mode} sharding does not speak of every kind once"
            continue
        yield from _whole_problems(mode, sharding)
        yield from _chain_problems(manifest, mode, sharding)
        for name, sharded in sharding.kinds.items():
            for problem in _KindChecks(manifest, manifest.kinds[name], sharded).problems():
                yield f"{mode} sharding of kind {name!r:.80}: {problem}"


def _chain_problems(manifest: Manifest, mode: str, sharding: Sharding) -> Iterator[str]:
    """What one segment hands on in slices, the next one takes in the same slices."""
    before: list[tuple[int, str] | None] = []
    for segment in manifest.segments:
        kind, sharded = manifest.kinds[segment.kind], sharding.kinds.get(segment.kind)
        entering = [port.value.name for port in kind.inputs if port.role == "boundary"]
        leaving = [port.value.name for port in kind.outputs if port.role == "boundary"]
        taken = [_boundary_slice(sharded, name) for name in entering]
        if taken != before[: len(taken)]:
            yield f"{mode} sharding gives segment {segment.name!r:.80} other slices than it takes"
        before = [_boundary_slice(sharded, name) for name in leaving]
        for name in (*entering, *leaving):
            back = _boundary_slice(sharded, f"cotangent.{name}")
            if back is not None and back != _boundary_slice(sharded, name):
                yield f"{mode} sharding slices cotangents of {segment.name!r:.80} otherwise"


def _boundary_slice(sharded: ShardedKind | None, name: str) -> tuple[int, str] | None:
    """Axis and units of a port's slices; None where it is whole."""
    slice_ = None if sharded is None else sharded.slices.get(name)
    if sharded is None or slice_ is None:
        return None
    return slice_.axis, sharded.axes.get(slice_.units_of, "")


def _whole_problems(mode: str, sharding: Sharding) -> Iterator[str]:
    for name, reason in sharding.whole.items():
        if not reason.isprintable() or not 0 < len(reason) <= limits.SHARDING_REASON_LENGTH_MAX:
            yield f"{mode} sharding gives no readable reason for kind {name!r:.80}"


def local_values(kind: SegmentKind, sharded: ShardedKind) -> dict[str, Value]:
    """Every value that the parts' graphs may share, by name, with a shard's shape."""
    whole = _whole_values(kind)
    found = {
        name: _cut(value, sharded.slices.get(_sliced_as(name))) for name, value in whole.items()
    }
    for value in sharded.values:
        found[value.name] = Value(name=value.name, shape=value.shape, dtype=value.dtype)
    for axis in sharded.axes:
        for size in SIZES:
            name = f"shard.{size}.{axis}"
            found[name] = Value(name=name, shape=("1",), dtype="int64")
    return found


def _whole_values(kind: SegmentKind) -> dict[str, Value]:
    found = {}
    sites = [site.value for site in kind.masks]
    for value in (
        *kind.parameters,
        *sites,
        *(port.value for port in (*kind.inputs, *kind.outputs)),
    ):
        found[value.name] = value
    for port in (*kind.inputs, *kind.outputs):
        if port.differentiable:
            name = f"cotangent.{port.value.name}"
            found[name] = Value(name=name, shape=port.value.shape, dtype=port.value.dtype)
    for value in kind.parameters:
        name = f"gradient.{value.name}"
        found[name] = Value(name=name, shape=value.shape, dtype=value.dtype)
    return found


def _sliced_as(name: str) -> str:
    """A gradient is sliced as its parameter."""
    return name.removeprefix("gradient.")


def _cut(value: Value, slice_: ShardSlice | None) -> Value:
    if slice_ is None or not 0 <= slice_.axis < len(value.shape):
        return value
    axis = f"{sum(slice_.blocks)}*{slice_.units_of}"
    shape = (*value.shape[: slice_.axis], axis, *value.shape[slice_.axis + 1 :])
    return Value(name=value.name, shape=shape, dtype=value.dtype)


@dataclass(frozen=True, slots=True)
class _KindChecks:
    """One kind in one mode."""

    manifest: Manifest
    kind: SegmentKind
    sharded: ShardedKind

    def problems(self) -> Iterator[str]:
        found = False
        for group in (self._axis_problems, self._slice_problems, self._value_problems):
            for problem in group():
                found = True
                yield problem
            if found:
                return
        yield from self._part_problems()

    def _axis_problems(self) -> Iterator[str]:
        if not 1 <= len(self.sharded.axes) <= limits.SHARDED_AXES_MAX:
            yield f"{len(self.sharded.axes)} sliced axes"
        for name, told in self.sharded.axes.items():
            if not name.isascii() or not name.isidentifier() or name in self.manifest.symbols:
                yield f"{name!r:.80} is no name for a sliced axis"
            units = self._units(name)
            if units is None or not 1 <= units <= limits.TENSOR_ELEMENTS_MAX:
                yield f"axis {name:.80} has {told:.40} units"

    def _slice_problems(self) -> Iterator[str]:
        whole = _whole_values(self.kind)
        for name, slice_ in self.sharded.slices.items():
            value = whole.get(name)
            if value is None or name.startswith("gradient."):
                yield f"it slices {name!r:.80}, which it does not have"
                continue
            units = self._units(slice_.units_of)
            if units is None or not 0 <= slice_.axis < len(value.shape):
                yield f"{name:.80} is sliced along an axis that is not there"
                continue
            few = 1 <= len(slice_.blocks) <= limits.SHARD_GROUPS_MAX
            size = self._size(value.shape[slice_.axis])
            if not few or min(slice_.blocks) < 1 or sum(slice_.blocks) * units != size:
                yield f"the slices of {name:.80} do not make up its axis"
        parameters = {value.name for value in self.kind.parameters}
        for name in self.sharded.summed:
            if name not in parameters or name in self.sharded.slices:
                yield f"it sums gradients of {name!r:.80}"

    def _value_problems(self) -> Iterator[str]:
        names = Counter(value.name for value in self.sharded.values)
        if len(self.sharded.values) > limits.GRAPH_VALUES_MAX:
            yield f"{len(self.sharded.values)} values"
        taken = _whole_values(self.kind)
        for value in self.sharded.values:
            if names[value.name] > 1 or value.name in taken or "." in value.name:
                yield f"{value.name!r:.80} is no name for a value of its own"
            if value.dtype not in DTYPES or len(value.shape) > limits.RANK_MAX:
                yield f"{value.name:.80} has no known type"
            elif self._elements(value.shape) is None:
                yield f"{value.name:.80} has an unknown axis, or too many elements"
        for name in self.sharded.stash:
            if name not in names:
                yield f"it keeps {name!r:.80}, which it does not make"

    def _part_problems(self) -> Iterator[str]:
        values = local_values(self.kind, self.sharded)
        for what in (self.sharded.forward, self.sharded.backward):
            if not 0 <= len(what) <= limits.SHARD_PARTS_MAX:
                yield f"{len(what)} parts"
        if not self.sharded.forward:
            yield "it has no forward"
        made: set[str] = set()
        for part in self.sharded.parts:
            yield from self._made_problems(part, values, made)
            for collective in part.collectives:
                yield from self._collective_problems(collective, values, made)
                made.add(collective.got)
        missing = self._wanted() - made
        if missing:
            yield f"nothing makes {min(missing)!r:.80}"

    def _wanted(self) -> set[str]:
        """What forward and backward have to make."""
        kinds = [each for each in self.manifest.segments if each.kind == self.kind.name]
        trained = {
            local
            for segment in kinds
            for local, name in segment.parameters.items()
            if self.manifest.tensor(name).binding == "trainable"
        }
        cotangents = {p.value.name for p in self.kind.inputs if p.differentiable}
        return {
            *(port.value.name for port in self.kind.outputs),
            *(f"gradient.{name}" for name in trained),
            *(f"cotangent.{name}" for name in cotangents),
        }

    def _made_problems(
        self, part: ShardPart, values: Mapping[str, Value], made: set[str]
    ) -> Iterator[str]:
        for name in part.outputs:
            if name not in values or name in made or name.startswith("shard."):
                yield f"a part makes {name!r:.80}, which is none of its values or is made twice"
            made.add(name)

    def _collective_problems(
        self, collective: Collective, values: Mapping[str, Value], made: set[str]
    ) -> Iterator[str]:
        kind, shape = collective.kind, collective.shape
        known = kind in COLLECTIVES and collective.dtype in DTYPES
        if not known or self._elements(shape) is None or len(shape) > limits.RANK_MAX:
            yield f"unknown collective {kind!r:.40} of {collective.sent!r:.80}"
            return
        if collective.sent not in made or collective.got in made or collective.got not in values:
            yield f"a {kind} makes {collective.got!r:.80} of {collective.sent!r:.80}"
            return
        local = shape
        if kind != "reduce":
            axis = collective.axis
            one = len(self.sharded.axes) == 1 and 0 <= axis < len(shape)
            name, *_ = self.sharded.axes
            if not one or self._size(shape[axis]) != self._units(name):
                yield f"a {kind} of {collective.sent!r:.80} has no axis of the units"
                return
            local = (*shape[:axis], name, *shape[axis + 1 :])
        sent = local if kind == "gather" else shape
        got = local if kind == "scatter" else shape
        for name, wanted in ((collective.sent, sent), (collective.got, got)):
            value = values[name]
            if not self._alike(value.shape, wanted) or value.dtype != collective.dtype:
                yield f"a {kind} takes {name!r:.80} for another value than it is"

    def _alike(self, one: tuple[str, ...], other: tuple[str, ...]) -> bool:
        return len(one) == len(other) and all(
            sorted(a.removeprefix("1*").split("*")) == sorted(b.removeprefix("1*").split("*"))
            for a, b in zip(one, other, strict=True)
        )

    def _elements(self, shape: tuple[str, ...]) -> int | None:
        sizes = [self._size(axis) for axis in shape]
        known = [size for size in sizes if size is not None]
        total = math.prod(known)
        return total if len(known) == len(sizes) and total <= limits.TENSOR_ELEMENTS_MAX else None

    def _size(self, axis: str) -> int | None:
        """The size of an axis for one sample and all units; None when there is no such thing."""
        factors = axis.split("*", limits.AXIS_FACTORS_MAX)
        if len(factors) > limits.AXIS_FACTORS_MAX:
            return None
        sizes = [self._factor(factor) for factor in factors]
        return None if None in sizes else math.prod(size for size in sizes if size is not None)

    def _factor(self, factor: str) -> int | None:
        if factor in self.sharded.axes:
            return self._units(factor)
        if factor in self.manifest.symbols:
            size = self.manifest.symbols[factor].size
            return 1 if size is None else size
        return _number(factor)

    def _units(self, name: str) -> int | None:
        """A sliced axis' units; None when there is no such axis, or nothing says how many."""
        told = self.sharded.axes.get(name, "")
        symbol = self.manifest.symbols.get(told)
        return _number(told) if symbol is None else symbol.size


def _number(text: str) -> int | None:
    """A decimal integer; None when it is none, or endless."""
    number = text.isascii() and text.isdecimal() and len(text) <= limits.AXIS_DIGITS_MAX
    return int(text) if number else None
