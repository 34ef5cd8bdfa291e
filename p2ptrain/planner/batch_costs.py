"""What a segment costs for any microbatch size, from the sizes that were measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from p2ptrain.planner.profile import KindCost

SPAN = 2
"""How many times above the largest, or below the smallest measured size a line is still drawn."""


def second_size(batch: int) -> int:
    """The size that is measured beside the one that is asked for: less memory, half the time."""
    return batch // 2 if batch > 1 else 2


def cost_for(sizes: Mapping[int, KindCost], batch: int, *, in_parts: bool) -> KindCost | None:
    """The cost of a microbatch of `batch` samples, measured or on the line through two sizes.

    Args:
        sizes: Measured costs by samples of a microbatch.
        batch: At least 1.
        in_parts: Backwards must have been measured in parts as well.

    Returns:
        A fixed part and one for each sample, neither below zero; None: it must be measured.
    """
    usable = {n: c for n, c in sizes.items() if not in_parts or c.cotangents_ns is not None}
    if batch in usable:
        return usable[batch]
    if len(usable) < 2 or not min(usable) <= SPAN * batch or batch > SPAN * max(usable):
        return None
    low, high = sorted(sorted(usable, key=lambda size: (abs(size - batch), size))[:2])

    def at(field: Callable[[KindCost], int]) -> int:
        first, second = field(usable[low]), field(usable[high])
        each = max(0, second - first)  # over high - low samples
        fixed = max(0, first * (high - low) - each * low)
        return (fixed + each * batch) // (high - low)

    parted = all(usable[size].cotangents_ns is not None for size in (low, high))
    return KindCost(
        forward_ns=at(lambda cost: cost.forward_ns),
        backward_ns=at(lambda cost: cost.backward_ns),
        cotangents_ns=at(lambda cost: cost.first_ns) if parted else None,
        gradients_ns=at(lambda cost: cost.gradients_ns) if parted else 0,
        norm_ns=usable[low].norm_ns,
        update_ns=usable[low].update_ns,
    )
