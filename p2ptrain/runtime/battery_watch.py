"""Take a device out of its runs while its battery is low, without costing anybody a step."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from p2ptrain import limits
from p2ptrain.membership.battery import leaves_for_battery
from p2ptrain.membership.record import MemberRecord


async def spare_battery(
    *,
    own: Callable[[], MemberRecord],
    hand_over: Callable[[], Awaitable[object]],
    stay: Callable[[], None],
) -> None:
    """Look at this device's own record now and then until cancelled.

    Args:
        own: Its record, with power source and charge.
        hand_over: Say that this device leaves, and give its part of a run to others.
        stay: Take that back: it may be given a part again.
    """
    leaving = False
    while True:
        record = own()
        low = leaves_for_battery(
            leaving=leaving, power_source=record.power_source, percent=record.battery_percent
        )
        if low and not leaving:
            leaving = True
            await hand_over()
        elif leaving and not low:
            leaving = False
            stay()
        await trio.sleep(limits.BATTERY_LOOK_S)
