"""Bytes that one peer sends in a step, by kind of parallelism: integers, rounded up.

Collectives are direct (PROTOCOL.md section 6.10): an all-reduce of G bytes among n peers has each
of them send G / n bytes to each other one twice, a part and a sum; a gather or a scatter once.
"""

from __future__ import annotations

from p2ptrain.units import NS_PER_S


def all_reduce_bytes(whole_bytes: int, peers: int) -> int:
    """What each peer sends to add up `whole_bytes` over all peers."""
    return -(-2 * (peers - 1) * whole_bytes // peers)


def gather_bytes(whole_bytes: int, peers: int) -> int:
    """What each peer sends so that all have `whole_bytes`, of which each had a part."""
    return -(-(peers - 1) * whole_bytes // peers)


def collective_ns(
    sent_bytes: int, *, hops: int, latency_ns: int, bytes_per_s: int, sharing: int
) -> int:
    """Time of one collective.

    Args:
        sent_bytes: By each peer, over its own line.
        hops: 2 where sums come back after the parts, else 1.
        sharing: How many peers send at once over the same medium; 1: each has its own line.
    """
    return hops * latency_ns - (-sent_bytes * sharing * NS_PER_S // bytes_per_s)
