"""Bytes that one peer sends in a step, by kind of parallelism: integers, rounded up.

Collectives are rings: an all-reduce of G bytes among n peers has each of them send G / n bytes
2 (n - 1) times, a gather or a scatter n - 1 times.
"""

from __future__ import annotations

from p2ptrain.units import NS_PER_S


def all_reduce_bytes(whole_bytes: int, peers: int) -> int:
    """What each peer sends to add up `whole_bytes` over all peers."""
    return -(-2 * (peers - 1) * whole_bytes // peers)


def gather_bytes(whole_bytes: int, peers: int) -> int:
    """What each peer sends so that all have `whole_bytes`, of which each had a part."""
    return -(-(peers - 1) * whole_bytes // peers)


def rounds_ns(
    part_bytes: int, rounds: int, *, latency_ns: int, bytes_per_s: int, sharing: int
) -> int:
    """Time of a ring's rounds, in each of which every peer sends a part.

    Args:
        part_bytes: Of one peer in one round.
        sharing: How many peers send at once over the same medium; 1: each has its own line.
    """
    return rounds * (latency_ns - (-part_bytes * sharing * NS_PER_S // bytes_per_s))
