"""Ask devices what they hold of a run, outside of any ballot: members for a view that is to be
forced, others where the members alone cannot restore a state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import trio

from p2ptrain import limits
from p2ptrain.agreement.ballot import Ballot
from p2ptrain.agreement.run_events import PromisedInventory, ProposalWanted
from p2ptrain.agreement.run_steps import merged_records
from p2ptrain.agreement.view import View
from p2ptrain.errors import PeerLost
from p2ptrain.ids import DeviceId, ViewNumber
from p2ptrain.recovery.inventory import Inventory
from p2ptrain.runtime.keeping.run_state import RunState
from p2ptrain.training.messages import HoldingsAsked, HoldingsTold, stamp_of
from p2ptrain.training.step_record import StepRecord


class Holdings:
    """Both sides of the question at one member."""

    def __init__(self, *, state: RunState, records: Callable[[], tuple[StepRecord, ...]]) -> None:
        """`records`: those that this device retains now."""
        self._state, self._services, self._records = state, state.services, records
        self._told: dict[DeviceId, HoldingsTold] = {}

    async def ask(self, base: View) -> ProposalWanted:
        """What promises would say, of those members that answer soon."""
        await self._collect(base, (self._services.device, *self._linked(base, members=True)))
        records = [told.records for told in self._told.values()]
        newest = max((r[-1].step for r in records if r), default=base.resume_step)
        return ProposalWanted(
            ballot=Ballot(round=1, device=self._services.device),
            number=ViewNumber(base.number + 1),
            base=base,
            promises=tuple(
                PromisedInventory(device=device, inventory=self._told[device].inventory)
                for device in sorted(self._told)
            ),
            records=merged_records(records, newest),
            resume_step=newest,
        )

    async def outside(self, base: View) -> tuple[PromisedInventory, ...]:
        """What devices that are no members keep: they left, or were left out while away."""
        await self._collect(base, self._linked(base, members=False))
        found = [(device, told.inventory) for device, told in sorted(self._told.items())]
        return tuple(PromisedInventory(device=d, inventory=i) for d, i in found if i.states)

    def _linked(self, base: View, *, members: bool) -> tuple[DeviceId, ...]:
        linked = self._services.directory.linked()
        return tuple(device for device in linked if (device in base.members) == members)

    async def _collect(self, base: View, devices: tuple[DeviceId, ...]) -> None:
        """Ask them, and wait for a while for their answers."""
        self._told = {}
        for device in devices:
            with contextlib.suppress(PeerLost):
                asked = HoldingsAsked(stamp=stamp_of(base.plan))
                self._services.outlet.send(device, asked)
        with trio.move_on_after(limits.HOLDINGS_TIMEOUT_S):
            await self._state.signal.wait_until(lambda: self._told.keys() >= set(devices))

    def receive(self, device: DeviceId, message: HoldingsAsked | HoldingsTold) -> None:
        """Answer the question, or take an answer."""
        if isinstance(message, HoldingsTold):
            self._told[device] = message
            self._state.signal.notify()
            return
        told = HoldingsTold(
            stamp=message.stamp, inventory=self._state.inventory(), records=self._records()
        )
        with contextlib.suppress(PeerLost):
            self._services.outlet.send(device, told)


def nothing_held(asked: HoldingsAsked) -> HoldingsTold:
    """The answer of a device that has nothing of the run."""
    nothing = Inventory(live=None, states=(), logs=(), has_data=False, linked=())
    return HoldingsTold(stamp=asked.stamp, inventory=nothing, records=())
