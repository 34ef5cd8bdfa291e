"""Devices in their places, before the model is cut: stages in order, each with its replicas."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from p2ptrain.planner.input import LinkEstimate
from p2ptrain.planner.kinds import Kind
from p2ptrain.schedule.actions import Action, Held
from p2ptrain.schedule.replicated import Owners

Groups = tuple[tuple[int, ...], ...]
"""By stage: indices of its devices, by rank."""
Cuts = tuple[int, ...]
"""By stage: the end (exclusive) of its segments; the last is the number of segments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One device in its stage, with its share of the microbatches."""

    device: int
    forward_ns: tuple[int, ...]
    """Prefix sums over segments of one microbatch's time."""
    backward_ns: tuple[int, ...]
    """In one piece."""
    cotangents_ns: tuple[int, ...]
    gradients_ns: tuple[int, ...]
    trip_ns: tuple[int, ...]
    """The same of a forward and what a backward takes until its cotangents leave."""
    whole_ns: tuple[int, ...]
    """The same of all forwards and backwards of a step."""
    norm_ns: tuple[int, ...]
    """The same of the square sums at its end, and of the update."""
    update_ns: tuple[int, ...]
    microbatches: int
    holds: Held
    ranks: int
    """How many devices share the stage, this one included."""

    def busy_ns(self, first: int, end: int) -> int:
        """Its compute of one step, for segments first..end-1."""
        return self.whole_ns[end] - self.whole_ns[first]

    def norms_ns(self, first: int, end: int) -> int:
        """Its square sums of one step, for segments first..end-1."""
        return self.norm_ns[end] - self.norm_ns[first]

    def updates_ns(self, first: int, end: int) -> int:
        """Its update of one step, for segments first..end-1."""
        return self.update_ns[end] - self.update_ns[first]

    def longest(self, first: int, within_ns: int) -> int:
        """The last end for which its step's compute is within a time."""
        return bisect_right(self.whole_ns, self.whole_ns[first] + within_ns) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """The boundary between two stages: the quickest way across, for lower bounds."""

    latency_ns: int
    bytes_per_s: int
    links: tuple[tuple[tuple[int, int], LinkEstimate], ...]
    """By (replica before, after)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrangement:
    """Groups with everything about them that no cut changes."""

    groups: Groups
    schedule: str
    stages: tuple[tuple[Replica, ...], ...]
    weights: tuple[tuple[int, ...], ...]
    """By stage and rank: parts of a step's microbatches."""
    owners: tuple[Owners, ...]
    actions: tuple[tuple[tuple[Action, ...], ...], ...]
    hops: tuple[Hop, ...]

    @property
    def kind(self) -> Kind:
        return kind_of(self.groups)

    @property
    def is_folded(self) -> bool:
        """Whether one device has the first and the last stage."""
        return len(self.groups) > 1 and self.groups[0] == self.groups[-1]

    @property
    def devices(self) -> tuple[int, ...]:
        """All devices, stage by stage."""
        return tuple(device for group in self.groups for device in group)

    @property
    def action_count(self) -> int:
        """What simulating it costs."""
        return sum(len(listed) for own in self.actions for listed in own)


def kind_of(groups: Groups) -> Kind:
    """What people call a plan of these groups."""
    if len(groups) == 1:
        return "one device" if len(groups[0]) == 1 else "data"
    return "pipeline" if all(len(group) == 1 for group in groups) else "hybrid"
