"""How a step is committed: its record durable at a quorum that has not promised the next view."""

from __future__ import annotations

import random
from collections.abc import Callable

from p2ptrain import limits
from p2ptrain.agreement.run_events import StepCommitted
from p2ptrain.agreement.run_journal import StepsRecord
from p2ptrain.agreement.run_memory import Memory
from p2ptrain.agreement.run_messages import StepRecorded
from p2ptrain.agreement.run_outbox import Outbox
from p2ptrain.agreement.run_rules import Rules
from p2ptrain.agreement.run_steps import StepLedger
from p2ptrain.agreement.view import View
from p2ptrain.errors import RemoteProtocolError
from p2ptrain.ids import DeviceId
from p2ptrain.training.step_record import StepRecord


class Commits:
    """One member's part.

    Args:
        may_record: Whether this peer has a say in the present view and is not fenced.
        memory: How far this peer's journal is, with what waits to be written.
    """

    def __init__(
        self,
        out: Outbox,
        rng: random.Random,
        rules: Rules,
        *,
        may_record: Callable[[], bool],
        memory: Callable[[], Memory],
    ) -> None:
        self.ledger = StepLedger(out.device)
        self._out = out
        self._rng = rng
        self._may_record, self._memory = may_record, memory
        self._rules = rules
        self._repeat_s = limits.RETRANSMIT_FIRST_S
        self._told_step: int | None = None
        self.deadline_s: float | None = None
        """When what is missing is asked for again."""

    def begin(self, view: View) -> None:
        """A view counts from now."""
        self.ledger.begin(view)
        self._told_step = self.deadline_s = None

    def told(self, step: int) -> None:
        """This device's own stage has given its result of every step up to this one, no other."""
        self._told_step = step

    def fence(self) -> None:
        """The next view is promised: nothing is recorded and nobody asked any more."""
        self.deadline_s = None

    def complete(self, record: StepRecord, now: float) -> None:
        """Hold the record durably, tell all members, commit what a quorum holds."""
        if self._may_record() and self.ledger.hold(record):
            self._tell(record, now)
        self._advance(now)

    def receive(self, message: StepRecorded, sender: DeviceId, now: float) -> None:
        """Another member of the present view holds records, and may ask for ours.

        Raises:
            RemoteProtocolError: one differs from ours, or is of a step that our own stage has not
                given its result of: nobody can have every stage's.
        """
        if not self._may_record():
            return
        self._check_possible(message.records)
        self.ledger.skip_to(message.since)
        self.ledger.acknowledged(sender, message.records)
        self._join(message.records, now)
        if message.after is not None:
            self._out.send(sender, self._recorded(message.after, ask=False), now)
        self._advance(now)

    def ask(self, device: DeviceId, now: float) -> None:
        """Ask a member that stands further on for what it holds."""
        if self._may_record():
            self._out.send(device, self._recorded(self.ledger.committed, ask=True), now)

    def tick(self, now: float) -> None:
        """Ask everybody again for what is missing."""
        if self.deadline_s is not None and now >= self.deadline_s:
            self._repeat_s = min(limits.RETRANSMIT_MAX_S, 2.0 * self._repeat_s)
            self.deadline_s = now + self._repeat_s * self._rng.uniform(0.8, 1.2)
            self._out.tell_members(self._recorded(self.ledger.committed, ask=True), now)

    def journal_record(self, records: tuple[StepRecord, ...]) -> StepsRecord:
        """These records as a line of the journal, under the present view."""
        view = self._out.present
        return StepsRecord(lineage=view.lineage, view=view.number, records=records)

    def _join(self, records: tuple[StepRecord, ...], now: float) -> None:
        """Hold what another member holds: it had every stage's `done`, of which one was lost here.

        Else a record that less than a quorum could make would wait for ever.
        """
        for record in records:
            if self.ledger.hold(record):
                self._tell(record, now)

    def _check_possible(self, records: tuple[StepRecord, ...]) -> None:
        """What our stage has told is not known where this device was restarted in this view."""
        if self._told_step is not None and records and records[-1].step > self._told_step:
            step = self._told_step + 1
            raise RemoteProtocolError(f"step {step} was recorded without our stage's result")

    def _tell(self, record: StepRecord, now: float) -> None:
        self._out.writes.append(self.journal_record((record,)))
        self._out.tell_members(self._recorded(record.step - 1, ask=False), now)

    def _advance(self, now: float) -> None:
        """Commit, in order, every step whose record a quorum holds."""
        while self._may_record() and (found := self.ledger.next_acknowledged()) is not None:
            record, devices = found
            if not self._rules.is_quorum(self._out.present, devices):
                break
            if self.ledger.hold(record):
                self._tell(record, now)
            self.ledger.commit(record)
            self.deadline_s = None
            self._out.events.append(StepCommitted(record=record))
        if not (self._may_record() and self.ledger.awaits()):
            self.deadline_s = None
        elif self.deadline_s is None:
            self._repeat_s = limits.RETRANSMIT_FIRST_S
            self.deadline_s = now + self._repeat_s

    def _recorded(self, after: int, *, ask: bool) -> StepRecorded:
        records = self.ledger.after(after)[: limits.STEP_RECORDS_MAX]
        return StepRecorded(
            **self._out.place(), records=records, since=self.ledger.since,
            after=self.ledger.committed if ask else None, memory=self._memory(),
        )  # fmt: skip
