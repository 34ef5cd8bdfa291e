"""Ask members what they hold of a run, outside of any ballot: for a view that is to be forced."""

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
from p2ptrain.runtime.run_state import RunState
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
        self._told = {}
        linked = set(self._services.directory.linked()) & set(base.members)
        for device in (self._services.device, *sorted(linked)):
            with contextlib.suppress(PeerLost):
                asked = HoldingsAsked(stamp=stamp_of(base.plan))
                self._services.outlet.send(device, asked)
        with trio.move_on_after(limits.HOLDINGS_TIMEOUT_S):
            await self._state.signal.wait_until(lambda: len(self._told) > len(linked))
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
