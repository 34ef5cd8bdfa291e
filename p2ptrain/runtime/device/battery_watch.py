"""Take a device out of its runs while its battery is low, without costing anybody a step."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from p2ptrain import limits
from p2ptrain.membership.battery import leaves_for_battery


async def spare_battery(
    *,
    read: Callable[[], tuple[str, int | None]],
    reserve_percent: int,
    hand_over: Callable[[], Awaitable[object]],
    stay: Callable[[], None],
) -> None:
    """Look at this device's battery now and then until cancelled.

    Args:
        read: Its power source, and its charge in percent, as `leaves_for_battery` takes them.
        reserve_percent: At which it leaves.
        hand_over: Say that this device leaves, and give its part of a run to others.
        stay: Take that back: it may be given a part again.
    """
    leaving = False
    while True:
        source, percent = read()
        low = leaves_for_battery(
            leaving=leaving, power_source=source, percent=percent, reserve_percent=reserve_percent
        )
        if low and not leaving:
            leaving = True
            await hand_over()
        elif leaving and not low:
            leaving = False
            stay()
        await trio.sleep(limits.BATTERY_LOOK_S)
