"""What the parts of a run's machine share: the present view, and what waits to go out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from p2ptrain.agreement.run_events import RunEvent
from p2ptrain.agreement.run_journal import RunJournalRecord
from p2ptrain.agreement.run_messages import RunMessage
from p2ptrain.agreement.view import View
from p2ptrain.errors import InvariantBroken
from p2ptrain.ids import DeviceId, Digest, Lineage, RunId, ViewNumber
from p2ptrain.wire.machine import Outgoing


class Place(TypedDict):
    """The view a message goes by, as the fields that every message begins with."""

    run: RunId
    lineage: Lineage
    view: ViewNumber
    plan: Digest


class Outbox:
    """Collects writes, messages and events in the order they are made."""

    def __init__(
        self, device: DeviceId, *, loopback: Callable[[RunMessage, DeviceId, float], None]
    ) -> None:
        self.device = device
        self._view: View | None = None
        self._place: Place | None = None
        self.writes: list[RunJournalRecord] = []
        self.outgoing: list[Outgoing] = []
        self.events: list[RunEvent] = []
        self._loopback = loopback

    @property
    def view(self) -> View | None:
        """The newest decided view of the newest lineage known here."""
        return self._view

    @view.setter
    def view(self, view: View) -> None:
        # A plan's digest hashes the whole plan: once per view, not once per message.
        self._view, self._place = view, _place(view)

    @property
    def present(self) -> View:
        """The view, where there must be one."""
        if self.view is None:
            raise InvariantBroken("a run's machine acts before it knows a view")
        return self.view

    @property
    def position(self) -> tuple[int, int]:
        """Lineage and number of the view; views are newer the greater this is."""
        return (0, 0) if self.view is None else (self.view.lineage, self.view.number)

    def place(self) -> Place:
        """The fields that name the present view."""
        if self._place is None:
            raise InvariantBroken("a run's machine speaks before it knows a view")
        return self._place

    def send(self, to: DeviceId, message: RunMessage, now: float) -> None:
        """To others over the wire; to ourselves at once."""
        if to == self.device:
            self._loopback(message, to, now)
        else:
            self.outgoing.append(Outgoing(to=to, message=message))

    def tell_members(self, message: RunMessage, now: float) -> None:
        """To every other member of the view."""
        for member in self.present.members:
            if member != self.device:
                self.send(member, message, now)


def _place(view: View) -> Place:
    return Place(run=view.run, lineage=view.lineage, view=view.number, plan=view.plan.digest)
