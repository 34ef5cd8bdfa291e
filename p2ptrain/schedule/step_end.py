"""From the last backwards of a step to the first forwards of the next: norms, commit, updates.

A peer whose gradients are whole tells all members its square sums. Who has heard everybody records
the step and says so, and with the records of a quorum a peer applies its update. The stages of a
pipeline begin a step one after the other, so what a later one still does hides behind the fill.
Integer nanoseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from p2ptrain.errors import InvariantBroken
from p2ptrain.schedule.quorum import is_enough


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerEnd:
    """How a step ends at one peer that computes; times since the step began."""

    device: int
    begins_ns: int
    """When its first action begins."""
    whole_ns: int
    """When its gradients are whole."""
    norm_ns: int
    """What their square sums take."""
    update_ns: int

    def joined(self, other: PeerEnd) -> PeerEnd:
        """Both ends of one device that has two stages, which it does one after the other."""
        return PeerEnd(
            device=self.device,
            begins_ns=min(self.begins_ns, other.begins_ns),
            whole_ns=max(self.whole_ns, other.whole_ns),
            norm_ns=self.norm_ns + other.norm_ns,
            update_ns=self.update_ns + other.update_ns,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """Who records steps."""

    record_ns: Mapping[int, int]
    """By device: until a record is durable there."""
    tie_breaker: int | None
    """The device with which half of them are a quorum; None: there is none among them."""
    latency_ns: Sequence[Sequence[int]]
    """By device and device, one way; 0 to itself."""


def period_ns(ends: Sequence[PeerEnd], members: Members) -> int:
    """Time from one step's beginning to the next one's, where every step is as this one.

    Args:
        ends: Of every peer that computes, all of them members; one of them begins at 0.
        members: Who records the step.
    """
    ends = _by_device(ends)
    done = [(end.device, end.whole_ns + end.norm_ns) for end in ends]
    recorded = [
        (max(at_ns + members.latency_ns[i][member] for i, at_ns in done) + record_ns, member)
        for member, record_ns in members.record_ns.items()
    ]
    return max(
        _agreed_ns(recorded, end.device, members) + end.update_ns - end.begins_ns for end in ends
    )


def _by_device(ends: Sequence[PeerEnd]) -> list[PeerEnd]:
    found: dict[int, PeerEnd] = {}
    for end in ends:
        known = found.get(end.device)
        found[end.device] = end if known is None else known.joined(end)
    return list(found.values())


def _agreed_ns(recorded: Sequence[tuple[int, int]], device: int, members: Members) -> int:
    """When a device has heard of the records of a quorum."""
    heard = sorted((at_ns + members.latency_ns[i][device], i) for at_ns, i in recorded)
    with_tie_breaker = False
    for count, (at_ns, member) in enumerate(heard, 1):
        with_tie_breaker |= member == members.tie_breaker
        if is_enough(count, len(heard), with_tie_breaker=with_tie_breaker):
            return at_ns
    raise InvariantBroken("all members are a quorum")
