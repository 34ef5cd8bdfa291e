"""A device with a low battery hands over once, and takes part again when it is charged."""

from __future__ import annotations

import trio
import trio.testing

from p2ptrain import limits
from p2ptrain.runtime.device.battery_watch import spare_battery


async def test_low_battery_hands_over_once_and_a_charged_one_stays(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    charges = iter([90, 12, 12, 22, 95, 95])
    told: list[str] = []

    def read() -> tuple[str, int | None]:
        return "battery", next(charges, 95)

    async def hand_over() -> None:
        told.append("hand over")
        await trio.lowlevel.checkpoint()

    async def watch() -> None:
        await spare_battery(
            read=read, reserve_percent=12, hand_over=hand_over, stay=lambda: told.append("stay")
        )

    assert 22 < 12 + limits.BATTERY_RETURN_ABOVE_PERCENT < 95
    nursery.start_soon(watch)
    await trio.sleep(7 * limits.BATTERY_LOOK_S)
    assert told == ["hand over", "stay"]
