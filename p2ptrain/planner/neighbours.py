"""Pipelines that are one move away from another: of many devices not every order is tried."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from p2ptrain.planner.arrangement import Groups


def neighbours(groups: Groups, device_count: int) -> Iterator[Groups]:
    """One device less, two in each other's place, another instead of one, and one more; each once,
    in a fixed order.

    Args:
        groups: A pipeline, one device to a stage.
        device_count: Of all devices, which are named by their index.
    """
    count, others = len(groups), [i for i in range(device_count) if (i,) not in groups]
    if count > 2:
        yield from (groups[:place] + groups[place + 1 :] for place in range(count))
    for one, other in itertools.combinations(range(count), 2):
        order = list(groups)
        order[one], order[other] = order[other], order[one]
        yield tuple(order)
    for place, device in itertools.product(range(count), others):
        yield (*groups[:place], (device,), *groups[place + 1 :])
    for place, device in itertools.product(range(count + 1), others):
        yield (*groups[:place], (device,), *groups[place:])
