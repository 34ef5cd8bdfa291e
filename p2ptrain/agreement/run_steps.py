"""The records of a run's steps as one member holds them, and who else is known to hold which."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from p2ptrain import limits
from p2ptrain.agreement.view import View
from p2ptrain.errors import InvariantBroken, RemoteProtocolError
from p2ptrain.ids import DeviceId
from p2ptrain.training.step_record import StepRecord


class StepLedger:
    """Held records, consecutive, newest last; acknowledgements of those not yet committed."""

    def __init__(self, device: DeviceId) -> None:
        self._device = device
        self._records: list[StepRecord] = []
        self._acks: dict[int, dict[DeviceId, StepRecord]] = {}
        self._resumed = self._lineage = self._number = self._begun = 0
        self._newest_elsewhere = 0
        self.committed = 0
        """The newest step that a quorum is known to hold, in this life of the process."""

    @property
    def records(self) -> tuple[StepRecord, ...]:
        """What is held, consecutive."""
        return tuple(self._records)

    @property
    def newest(self) -> int:
        """The newest step held; the view's own step when no record is."""
        return self._records[-1].step if self._records else self._resumed

    @property
    def since(self) -> int:
        """The oldest step whose record is held; the next step's when none is."""
        return self._records[0].step if self._records else self._resumed + 1

    @property
    def replicated(self) -> int:
        """The newest step that is held here and known to be held by another member, too."""
        return min(self.newest, self._newest_elsewhere)

    def begin(self, view: View) -> None:
        """A view counts from now: what it gives comes first, what it leaves out never happened.

        Of another lineage only what the view gives is kept: histories may have parted before. So
        they may have since the view known here, if this one is not the next: somebody else may
        have made those steps again.
        """
        own = self._records if view.lineage == self._lineage else []
        if view.number != self._number + 1:
            own = [record for record in own if record.step <= self._begun]
        self._records = _succeed(own, view)
        self._lineage, self._number = view.lineage, view.number
        self._begun = view.resume_step
        self._acks.clear()
        self._newest_elsewhere = 0
        self._resumed = self.committed = view.resume_step

    def restore(self, records: Iterable[StepRecord]) -> None:
        """Records read from the journal, told once or twice; committed counts on from them."""
        held = [self._records, tuple(records)]
        newest = max((record.step for each in held for record in each), default=self.newest)
        self._records = list(merged_records(held, newest))
        self.committed = max(self.committed, self.newest)

    def hold(self, record: StepRecord) -> bool:
        """Add the next record and this peer's own acknowledgement; False: held or too early.

        Raises:
            InvariantBroken: another record of that step is held. Going on would train two models.
        """
        if record.step <= self.newest:
            held = self.held(record.step)
            if held is not None and held != record:
                raise InvariantBroken(
                    f"step {record.step} comes out differently here than a member recorded it: "
                    "one of the devices computes wrongly, and training on would hide that"
                )
            return False
        if record.step > self.newest + 1:
            return False
        self._records.append(record)
        self._acks.setdefault(record.step, {})[self._device] = record
        return True

    def acknowledged(self, device: DeviceId, records: Iterable[StepRecord]) -> None:
        """Another member holds these.

        Raises:
            RemoteProtocolError: one differs from what this peer or another member holds.
        """
        for record in records:
            held = self.held(record.step)
            acks = self._acks.get(record.step, {})
            known = [*acks.values(), *([] if held is None else [held])]
            if any(other != record for other in known):
                raise RemoteProtocolError(f"step {record.step} is recorded differently here")
            if held is not None:
                self._newest_elsewhere = max(self._newest_elsewhere, record.step)
            if self.committed < record.step <= self.committed + limits.STEP_RECORDS_MAX:
                self._acks.setdefault(record.step, {})[device] = record

    def next_acknowledged(self) -> tuple[StepRecord, frozenset[DeviceId]] | None:
        """The record of the step after the last committed one, and who is known to hold it."""
        acks = self._acks.get(self.committed + 1)
        if not acks:
            return None
        return next(iter(acks.values())), frozenset(acks)

    def commit(self, record: StepRecord) -> None:
        """A quorum holds it: InvariantBroken unless it is the next one and held here too."""
        if record.step != self.committed + 1 or record.step > self.newest:
            raise InvariantBroken(f"step {record.step} is committed out of order")
        self.committed = record.step
        if self._acks.pop(record.step, {}).keys() - {self._device}:
            self._newest_elsewhere = max(self._newest_elsewhere, record.step)

    def skip_to(self, since: int) -> bool:
        """Others forgot everything before `since`, so it is replicated; whether that is news."""
        if since <= self.committed + 1 or since <= self.newest + 1:
            return False
        self._records.clear()
        self._resumed = self.committed = since - 1
        self._acks = {step: acks for step, acks in self._acks.items() if step >= since}
        return True

    def awaits(self) -> bool:
        """Whether acknowledgements or records are missing that somebody should be asked for."""
        return self.newest > self.committed or any(s > self.committed for s in self._acks)

    def after(self, step: int) -> tuple[StepRecord, ...]:
        """Held records of later steps."""
        return tuple(self._records[max(0, step + 1 - self.since) :])

    def held(self, step: int) -> StepRecord | None:
        """The record of one step, if it is held."""
        index = step - self.since
        return self._records[index] if 0 <= index < len(self._records) else None

    def forget_before(self, step: int) -> None:
        """Drop older records; the newest stays, since promises must tell it."""
        kept = [record for record in self._records if record.step >= step]
        self._records = kept or self._records[-1:]


def merged_records(
    held: Iterable[Sequence[StepRecord]], resume_step: int
) -> tuple[StepRecord, ...]:
    """Everything that several members hold, consecutive up to `resume_step`, bounded."""
    by_step = {record.step: record for records in held for record in records}
    found: list[StepRecord] = []
    step = resume_step
    while step in by_step and len(found) < limits.STEP_RECORDS_MAX:
        found.append(by_step[step])
        step -= 1
    return tuple(reversed(found))


def _succeed(own: Sequence[StepRecord], view: View) -> list[StepRecord]:
    given = list(view.records)
    begins = given[0].step if given else view.resume_step + 1
    kept = [record for record in own if record.step < begins]
    if kept and kept[-1].step != begins - 1:
        kept = []
    return kept + given
