"""A machine's own journal and what others heard from it: names, lengths, and the wait for a vote.

A restarted device votes once every member that it can reach has said what it had heard from it,
and never on what a member asks that has not said so.
"""

from __future__ import annotations

import random
from collections.abc import Collection

from p2ptrain import limits
from p2ptrain.agreement.run_journal import IdentityRecord, RunJournalRecord, StartRecord
from p2ptrain.agreement.run_memory import Heard, Memory, OwnMemory
from p2ptrain.agreement.run_outbox import Outbox
from p2ptrain.agreement.run_rules import Rules
from p2ptrain.ids import DeviceId


class Recall:
    """What one machine remembers, and what it has heard of others' memories."""

    def __init__(
        self, out: Outbox, rng: random.Random, rules: Rules, *, volatile: bool = False
    ) -> None:
        """`volatile`: records of steps are in memory alone: the journal dies with the process."""
        self._out, self._rng, self._rules = out, rng, rules
        self._volatile, self._was_volatile = volatile, False
        self._own, self.heard = OwnMemory(rng), Heard()
        self._is_named = False
        self._told: set[DeviceId] = set()
        self._restarted = False
        self._due_s = 0.0
        self.waits = False
        """Whether this device may not vote yet, since others may remember more than it does."""
        self.deadline_s: float | None = None
        """When members that cannot be reached are waited for no longer."""
        self.heard.note(out.device, self.memory())

    @property
    def journal(self) -> int:
        """The name of this device's journal."""
        return self._own.journal

    def memory(self) -> Memory:
        """How far the journal is once what waits has been written."""
        return self._own.at(_counted(self._out.writes))

    def identity(self) -> IdentityRecord:
        """The line that names the journal, behind all that was counted so far."""
        return IdentityRecord(
            journal=self._own.journal, start=self._own.start, count=self.memory().count,
            past=self._own.past, volatile=self._volatile,
        )  # fmt: skip

    def drained(self, writes: list[RunJournalRecord]) -> list[RunJournalRecord]:
        """What is to be written, the journal's name before its first record."""
        if writes and not self._is_named:
            self._is_named = True
            writes.insert(0, self.identity())
        self._own.count += _counted(writes)
        return writes

    # A restart.

    def read(self, record: RunJournalRecord) -> None:
        """One record of the journal on disk, oldest first."""
        if isinstance(record, IdentityRecord):
            self._is_named, self._was_volatile = True, record.volatile
            self._own.read_name(record.journal, record.start, record.count, record.past)
        else:
            if isinstance(record, StartRecord):
                self._own.read_start(record.start)
            self._own.count += 1

    def restarted(self, now: float) -> bool:
        """All has been read; where there was a journal, others may have heard more of it.

        False: they certainly have, since it was never whole; another must be begun.
        """
        if not self._is_named or self._was_volatile:
            return not self._is_named
        self._own.read_start(self._own.start)
        if self._volatile:  # the journal says so before anything is told from this start
            self._out.writes.append(self.identity())
        self._out.writes.append(StartRecord(start=self._own.start))
        self.heard.note(self._out.device, self.memory())
        if not self._rules.trusts_disk():
            self._restarted = self.waits = True
            self._due_s = self.deadline_s = now + limits.RECALL_WAIT_S
        return True

    def renew(self) -> None:
        """The journal lacks what others heard from it: begin another."""
        self._own.renew(self._rng)
        self._is_named = True
        self._out.writes.append(self.identity())
        self.heard.note(self._out.device, self.memory())

    # What others say.

    def take(self, reminders: Collection[Memory], sender: DeviceId) -> bool:
        """What the sender has heard from this device; False: more than the journal has."""
        self._told.add(sender)
        return self._rules.trusts_disk() or all(map(self._own.remembers, reminders))

    def may_answer(self, proposer: DeviceId) -> bool:
        """Whether what this device may have promised a proposer before is known here."""
        known = {self._out.device, *self._told}
        return not self._restarted or proposer in known

    def judge(self, reachable: Collection[DeviceId], now: float) -> None:
        """Whether enough has been heard to vote; once it was, that stays so."""
        if self._out.view is None:
            return
        is_late = now >= self._due_s
        if is_late:
            self.deadline_s = None
        missing = set(self._out.view.members) - self._told - {self._out.device}
        if not missing or (is_late and missing.isdisjoint(reachable)):
            self.waits, self.deadline_s = False, None


def _counted(writes: Collection[RunJournalRecord]) -> int:
    return sum(not isinstance(each, IdentityRecord) for each in writes)
