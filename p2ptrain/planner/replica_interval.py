"""How many steps apart replica sets are: soon enough to recover quickly, seldom enough to be cheap.

Integers only (ns, bytes), so that every machine decides alike. DESIGN section 7, rules 3 and 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from p2ptrain import limits
from p2ptrain.units import NS_PER_S

LINK_SHARE: Final = 2
"""A set may take half of a link's time: the other half is left to the boundary tensors."""
SET_NS_PER_BYTE: Final = 8
"""Processor time of an owner and a keeper for a byte of state: hashing it four times, TLS, writing.
Measured 6 to 7 on x86-64 (tools/BENCHMARKS.md)."""
COMPUTE_SHARE: Final = 50
"""A set may take a fiftieth of the processor time of the steps between two sets."""
REPLICA_EVERY_MIN: Final = 10
"""More often gains nothing that a person would notice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCosts:
    """What one stage's replication and recovery cost."""

    state_bytes: int
    """Parameters, optimizer state and running values."""
    log_bytes: int
    """Logged by this stage's device in each step."""
    compute_ns: int
    """Of one step, alone."""
    bytes_per_s: int
    """Of the slowest link that its replica or its logs would take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaInterval:
    """Steps between sets, and what limited them, for people."""

    steps: int
    replay_ns: int
    """Predicted longest recovery of one stage, transfers included."""
    reason: str


def replica_interval(
    stages: Sequence[StageCosts],
    *,
    step_ns: int,
    recovery_ns_max: int = int(limits.RECOVERY_S_MAX * NS_PER_S),
    log_bytes_max: int = limits.STEP_LOG_BYTES_MAX,
) -> ReplicaInterval:
    """The fewest steps in which a set is sent and costs little, if the bounds allow so many.

    Logs are kept for up to two intervals, because the previous set stays until the next is whole.
    A set that comes before the one before it was sent would never be whole, nor would logs ever be
    released: no bound makes an interval shorter than that.
    """
    step_ns = max(step_ns, 1)
    sendable = max(_ceil(_transfer_ns(s) * LINK_SHARE, step_ns) for s in stages)
    cheap = max(_ceil(s.state_bytes * SET_NS_PER_BYTE * COMPUTE_SHARE, step_ns) for s in stages)
    wanted = max(sendable, cheap, REPLICA_EVERY_MIN)
    by_log = min(log_bytes_max // (2 * max(s.log_bytes, 1)) for s in stages)
    by_time = min(
        (recovery_ns_max - _transfer_ns(s)) // (2 * max(_step_cost_ns(s), 1)) for s in stages
    )
    bound = min(by_log, by_time, limits.REPLICA_EVERY_MAX)
    steps = max(1, sendable, min(wanted, bound))
    if steps == wanted:
        reason = "the fewest steps in which a replica set is sent and costs little"
    elif steps > bound:
        reason = "the fewest steps in which a link carries a replica set"
    elif by_log <= by_time:
        reason = "bounded by the memory for logs"
    else:
        reason = "bounded by the time that a recovery may take"
    replay_ns = max(_transfer_ns(s) + 2 * steps * _step_cost_ns(s) for s in stages)
    return ReplicaInterval(steps=steps, replay_ns=replay_ns, reason=reason)


def _transfer_ns(stage: StageCosts) -> int:
    return _ceil(stage.state_bytes * NS_PER_S, max(stage.bytes_per_s, 1))


def _step_cost_ns(stage: StageCosts) -> int:
    """Of replaying one step: fetch what had come in, compute."""
    return stage.compute_ns + _ceil(stage.log_bytes * NS_PER_S, max(stage.bytes_per_s, 1))


def _ceil(value: int, divisor: int) -> int:
    return -(-value // divisor)
