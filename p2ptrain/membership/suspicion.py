"""How long a suspected peer has to answer before it counts as dead.

The time begins long and shrinks to its least as others confirm independently, so that one peer
with a bad link condemns nobody quickly. Source: Lifeguard (Dadgar, Phillips, Currey 2017,
section IV.B), whose formula this is; the constants are ours, see limits.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from p2ptrain import limits
from p2ptrain.ids import DeviceId


@dataclass(slots=True, kw_only=True)
class Suspicion:
    """Of one peer: since when, in which standing of its record, and who confirms it."""

    began_at_s: float
    standing: tuple[int, int]
    accusers: set[DeviceId] = field(default_factory=set)

    def due_s(self, *, members: int, confirmers: int, scale: float) -> float:
        """When the suspected peer is dead.

        Args:
            members: Live members, the suspected one and ourselves included.
            confirmers: Others that could confirm: alive and not suspected themselves.
            scale: Multiplies the timeout; above 1 while this peer is slow itself.
        """
        timeout_s = suspicion_timeout_s(
            confirmations=max(0, len(self.accusers) - 1),
            expected=min(limits.CONFIRMATIONS_WANTED, confirmers),
            members=members,
        )
        return self.began_at_s + timeout_s * scale


def suspicion_timeout_s(*, confirmations: int, expected: int, members: int) -> float:
    """max - ln(k + 1) / ln(K + 1) * (max - min) after k of K confirmations; min when K is 0.

    The least grows with the logarithm of the group: a refutation needs that many rounds of
    gossip to reach everybody.
    """
    rounds = math.log(max(members, 1)) / math.log(limits.PROBE_ALL_MAX)
    least_s = limits.SUSPECT_MIN_S * max(1.0, rounds)
    if expected < 1:
        return least_s
    most_s = least_s * limits.SUSPECT_MAX_MULTIPLE
    share = min(1.0, math.log(confirmations + 1) / math.log(expected + 1))
    return most_s - share * (most_s - least_s)
