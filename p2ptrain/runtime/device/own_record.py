"""Keep what this peer says of itself true: power source, battery, addresses, suspensions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import trio

from p2ptrain import limits
from p2ptrain.ids import DeviceId
from p2ptrain.membership.machine import Membership
from p2ptrain.power.battery import battery_percent
from p2ptrain.power.host import power_source
from p2ptrain.runtime.device.suspension import SuspensionWatch
from p2ptrain.runtime.driver import Driver


class ClosableLinks(Protocol):
    """What is needed of `net.links.Links`."""

    def devices(self) -> tuple[DeviceId, ...]:
        """Peers that are up now."""

    def close(self, device: DeviceId, reason: str) -> None:
        """Close the links with a peer; whoever knows an address dials again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnState:
    """What changes about a device while its peer runs."""

    addresses: tuple[str, ...]
    power_source: str
    battery_percent: int | None


def read_own_state(addresses: tuple[str, ...]) -> OwnState:
    """The device as it is now; the battery in steps, so that it is not news every minute."""
    percent, step = battery_percent(), limits.BATTERY_STEP_PERCENT
    return OwnState(
        addresses=addresses,
        power_source=power_source(),
        battery_percent=None if percent is None else percent // step * step,
    )


async def keep_own_record(
    membership: Driver[Membership],
    links: ClosableLinks,
    *,
    read: Callable[[], OwnState],
    watch: SuspensionWatch,
) -> None:
    """Look at this device now and then until cancelled, and tell the group what changed.

    After a suspension that others cannot have taken for a pause all links are closed and dialled
    again: they may lead nowhere by now, and TCP would take minutes to notice.
    """
    looks = 0
    while True:
        await trio.sleep(limits.SUSPENSION_LOOK_S)
        suspended_s = watch.suspended_s()
        if suspended_s > 0.0:
            membership.call(Membership.away, suspended_s, membership.now())
        if suspended_s >= limits.SUSPENSION_REDIAL_S:
            for device in links.devices():
                links.close(device, "this machine was suspended")
        if suspended_s > 0.0 or looks % limits.OWN_RECORD_EVERY_LOOKS == 0:
            state = read()
            membership.machine.update_own(
                addresses=state.addresses,
                power_source=state.power_source,
                battery_percent=state.battery_percent,
            )
            membership.poke()
        looks += 1
