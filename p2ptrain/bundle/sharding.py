"""How a bundle's segments are computed by several peers together: the manifest's `sharding` part.

One peer's share is a *shard*. In the mode `tensor` a shard has some units of every divided
parameter (heads, columns); in the mode `sequence` some positions of every sample. Shares may be
uneven; one set of graphs serves every degree. A segment's forward and backward are lists of parts:
a graph, then the collectives that its values go through before the next part.

Names in the parts' graphs are those of `bundle.manifest`; beside them:

- `values` of a kind: what one part makes for a later one, or for a collective, or gets from it;
- `shard.start.<axis>`, `shard.count.<axis>`, `shard.all.<axis>`: int64 of shape (1,), told by the
  run: the shard's first unit, how many it has, how many there are.

Shapes of `values` may name a sliced axis: its size is the shard's count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from p2ptrain.ids import Digest

MODES: Final = ("tensor", "sequence")
COLLECTIVES: Final = ("reduce", "gather", "scatter")
SIZES: Final = ("start", "count", "all")

Mode = Literal["tensor", "sequence"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardValue:
    """A value between parts: its name, shape in symbols and sliced axes, dtype."""

    name: str
    shape: tuple[str, ...]
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSlice:
    """Which elements of a port or parameter a shard has, along one axis.

    The axis is made of consecutive groups; group i has `blocks[i]` elements for each unit. A fused
    query, key and value has three groups.
    """

    units_of: str
    """The sliced axis' name."""
    axis: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """What shards do together with one value of each.

    reduce: all get the sum. gather: all get the slices side by side. scatter: each gets its slice
    of the sum. Terms are added in shard order.
    """

    kind: str
    sent: str
    got: str
    axis: int
    """Along which slices lie; 0 for reduce."""
    shape: tuple[str, ...]
    """Of the whole value, in symbols."""
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPart:
    """One graph, and the collectives after it, in order."""

    graph: Digest
    outputs: tuple[str, ...]
    """What the graph makes."""
    collectives: tuple[Collective, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardedKind:
    """How one kind of segment is computed by shards."""

    axes: dict[str, str]
    """Sliced axes: how many units, a decimal integer as text or a symbol: positions are as many as
    the sequence is long, whatever its size is for a run. `Manifest.units` gives numbers."""
    slices: dict[str, ShardSlice]
    """Ports, masks, parameters and cotangents by name; all others are whole. A gradient is sliced
    as its parameter."""
    summed: tuple[str, ...]
    """Parameters of whose gradients a shard has a term: added up over shards once per step."""
    values: tuple[ShardValue, ...]
    stash: tuple[str, ...]
    """Those of `values` that the forward keeps for the backward."""
    forward: tuple[ShardPart, ...]
    backward: tuple[ShardPart, ...]

    @property
    def parts(self) -> tuple[ShardPart, ...]:
        """Forward, then backward."""
        return (*self.forward, *self.backward)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """One mode: the kinds that it divides, and why it does not divide the others."""

    kinds: dict[str, ShardedKind]
    whole: dict[str, str]
    """Kind -> why every shard computes all of it, with the kind's ordinary graphs."""

    @property
    def graphs(self) -> tuple[Digest, ...]:
        """Every graph of its parts."""
        return tuple(part.graph for kind in self.kinds.values() for part in kind.parts)
