"""One ballot as its proposer sees it: promises, the plan, acceptances."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from p2ptrain import limits
from p2ptrain.agreement.ballot import Ballot
from p2ptrain.agreement.run_messages import ViewPromise
from p2ptrain.agreement.view import View
from p2ptrain.errors import RemoteProtocolError
from p2ptrain.ids import DeviceId


class Phase(Enum):
    """How far a ballot has come."""

    PREPARING = "a quorum of promises is missing"
    GATHERING = "a quorum promised, others have a moment more"
    PLANNING = "the shell plans"
    ACCEPTING = "a quorum of acceptances is missing"


@dataclass(slots=True, kw_only=True)
class Round:
    """The state of the one ballot a proposer has open."""

    ballot: Ballot
    base: View
    phase: Phase = Phase.PREPARING
    phase_due_s: float
    """When the phase ends by itself: gathering goes on to plan, any other gives up."""
    repeat_at_s: float
    gathers_since_s: float = 0.0
    """When there was a quorum of promises."""
    repeat_s: float = limits.RETRANSMIT_FIRST_S
    promises: dict[DeviceId, ViewPromise] = field(default_factory=dict)
    """Of members that have a vote."""
    voteless: dict[DeviceId, ViewPromise] = field(default_factory=dict)
    """What the others hold."""
    value: View | None = None
    accepted: set[DeviceId] = field(default_factory=set)

    @property
    def answers(self) -> dict[DeviceId, ViewPromise]:
        """Of all members that have answered."""
        return {**self.voteless, **self.promises}

    def enter(self, phase: Phase, due_s: float, now: float) -> None:
        """Go on to a phase; repetition starts anew."""
        self.phase, self.phase_due_s = phase, due_s
        planning = phase is Phase.PLANNING
        self.repeat_s = limits.PREPARE_REPEAT_S if planning else limits.RETRANSMIT_FIRST_S
        self.repeat_at_s = now + self.repeat_s

    def repeated(self, now: float) -> None:
        """Something was said again: wait longer next time, except while planning."""
        if self.phase is not Phase.PLANNING:
            self.repeat_s = min(limits.RETRANSMIT_MAX_S, 2.0 * self.repeat_s)
        self.repeat_at_s = now + self.repeat_s

    @property
    def deadline_s(self) -> float:
        """The earlier of repetition and end of phase."""
        return min(self.phase_due_s, self.repeat_at_s)

    def add_promise(self, promise: ViewPromise, sender: DeviceId) -> None:
        """Note a promise; a repeated one changes nothing.

        Raises:
            RemoteProtocolError: its record of a step is not the one another member holds.
        """
        for other in self.promises.values():
            known = {record.step: record for record in other.records}
            if any(known.get(record.step, record) != record for record in promise.records):
                raise RemoteProtocolError("a step is recorded differently by two members")
        (self.promises if promise.votes else self.voteless).setdefault(sender, promise)
