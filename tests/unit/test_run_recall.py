"""What a journal remembers of itself, and when a restarted device may vote."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from p2ptrain import limits
from p2ptrain.agreement.run_events import Stance
from p2ptrain.agreement.run_journal import (
    IdentityRecord,
    RunJournalRecord,
    StartRecord,
    ViewRecord,
    decode_run_record,
    encode_run_record,
)
from p2ptrain.agreement.run_memory import Heard, Memory
from p2ptrain.agreement.run_outbox import Outbox
from p2ptrain.agreement.run_recall import Recall
from p2ptrain.agreement.run_rules import Rules
from p2ptrain.agreement.run_steps import StepLedger
from tests.sim.plans import device
from tests.sim.run_views import first_view, followed, make_step
from tests.unit.test_run_machine import three

A, B, C = (device(index) for index in range(3))
VIEW = ViewRecord(view=first_view(A, B, C), abstains=False)


def recall(
    seed: int, disk: list[RunJournalRecord] | None = None, *, volatile: bool = False
) -> Recall:
    """A process of A that begins with this journal at 10 s."""
    out = Outbox(A, loopback=lambda message, sender, now: None)
    made = Recall(out, random.Random(seed), Rules(), volatile=volatile)
    for record in disk or []:
        made.read(decode_run_record(encode_run_record(record)))
    made.restarted(10.0)
    out.view = VIEW.view
    return made


def says(made: Recall, disk: list[RunJournalRecord], *records: RunJournalRecord) -> Memory:
    """It writes these, and says something that hangs on them."""
    made._out.writes += records
    memory = made.memory()
    writes, made._out.writes = made._out.writes, []
    disk += made.drained(writes)
    assert made.memory() == memory
    return memory


def test_journal_remembers_all_that_was_said_from_it_in_every_start() -> None:
    disk: list[RunJournalRecord] = []
    first = says(recall(1), disk, VIEW)
    second = says(recall(2, disk), disk, VIEW, VIEW)
    third = recall(3, disk)
    assert third.take((first, second), B)
    assert third.journal == first.journal == second.journal
    assert first.count < second.count


def test_older_image_lacks_what_was_said_since() -> None:
    disk: list[RunJournalRecord] = []
    begun = recall(1)
    before = says(begun, disk, VIEW)
    image = list(disk)
    after = says(begun, disk, VIEW)
    later = says(recall(2, disk), disk, VIEW)
    assert recall(3, disk).take((before, after, later), B)
    returned = recall(3, image)
    assert returned.take((before,), B)
    assert not returned.take((after,), C)
    assert not recall(4, image).take((later,), B)


def test_older_image_that_has_written_on_still_lacks_it() -> None:
    disk: list[RunJournalRecord] = []
    begun = recall(1)
    says(begun, disk, VIEW)
    image = list(disk)
    forgotten = says(begun, disk, VIEW)
    says(recall(2, image), image, VIEW, VIEW, VIEW, VIEW)
    assert not recall(3, image).take((forgotten,), B)


def test_journal_that_is_begun_anew_owes_nothing() -> None:
    disk: list[RunJournalRecord] = []
    begun = recall(1)
    said = says(begun, disk, VIEW)
    begun.renew()
    assert begun.journal != said.journal
    again = says(begun, disk, VIEW)
    assert recall(2, disk).journal == begun.journal
    assert recall(2, disk).take((said, again), B)
    assert not recall(2, disk[:2] + disk[2:3]).take((again,), B)


def test_compacted_journal_remembers_as_much_and_no_more() -> None:
    disk: list[RunJournalRecord] = []
    begun = recall(1)
    said = says(begun, disk, *[VIEW] * 9)
    short = [VIEW, begun.identity()]
    more = says(begun, disk, VIEW)
    assert recall(2, short).take((said,), B)
    assert not recall(2, short).take((more,), B)


def test_volatile_journal_is_never_voted_from_again() -> None:
    made = Recall(
        Outbox(A, loopback=lambda message, sender, now: None), random.Random(1), Rules(),
        volatile=True,
    )  # fmt: skip
    disk: list[RunJournalRecord] = []
    said = says(made, disk, VIEW)
    again = Recall(Outbox(A, loopback=lambda message, sender, now: None), random.Random(2), Rules())
    for record in disk:
        again.read(decode_run_record(encode_run_record(record)))
    assert not again.restarted(10.0)
    again.renew()
    assert again.journal != said.journal
    assert again.take((said,), B)
    assert not again.waits  # a journal that is begun anew has promised nothing


def test_journal_of_the_disk_is_marked_by_a_start_that_keeps_steps_in_memory() -> None:
    disk: list[RunJournalRecord] = []
    first = says(recall(1), disk, VIEW)
    slow = recall(2, disk, volatile=True)
    assert slow.take((first,), B)  # what was on the disk is remembered
    second = says(slow, disk)
    assert second.journal == first.journal
    marks = [record.volatile for record in disk if isinstance(record, IdentityRecord)]
    assert marks == [False, True]
    again = Recall(Outbox(A, loopback=lambda message, sender, now: None), random.Random(3), Rules())
    for record in disk:
        again.read(decode_run_record(encode_run_record(record)))
    assert again.memory() == Memory(journal=first.journal, start=again.memory().start, count=2)
    assert not again.restarted(10.0)


def test_device_that_went_from_disk_to_memory_has_no_vote_after_a_crash() -> None:
    """Nor where all others lost what they heard from it: of a power cut only its mark tells."""
    net = three()
    net.complete(1, A, B, C)
    net.slow = {B}
    net.start(B)
    net.see()
    net.see(A, B, C)
    assert net.machines[B].standing.stance is Stance.MEMBER
    net.complete(2, A, B, C)
    assert net.committed(B)[-1] == 2
    for each in (A, B, C):
        net.start(each)
    net.see()
    net.see(A, B, C)
    assert net.machines[A].standing.stance is Stance.MEMBER
    assert net.machines[B].standing.stance is Stance.ABSTAINING


def test_journal_of_version_1_is_read() -> None:
    line = encode_run_record(IdentityRecord(journal=5)).replace(b'"version":2', b'"version":1')
    old = [decode_run_record(line), VIEW]
    assert recall(1, old).journal == 5
    assert isinstance(encode_run_record(StartRecord(start=3)), bytes)


def test_restarted_device_waits_for_all_it_can_reach() -> None:
    disk: list[RunJournalRecord] = []
    begun = recall(1)
    assert not begun.waits
    says(begun, disk, VIEW)
    again = recall(2, disk)
    again.judge((B, C), 10.1)
    assert again.waits
    assert not again.may_answer(B)
    assert again.take((), B)
    again.judge((B, C), 10.0 + limits.RECALL_WAIT_S)
    assert again.waits  # C is there and has not said
    assert again.may_answer(B)
    assert not again.may_answer(C)
    again.judge((B,), 10.1 + limits.RECALL_WAIT_S)
    assert not again.waits
    assert again.deadline_s is None
    again.judge((B, C), 11.0 + limits.RECALL_WAIT_S)
    assert not again.waits
    assert not again.may_answer(C)


def test_restarted_device_waits_no_longer_than_it_has_to() -> None:
    disk: list[RunJournalRecord] = []
    says(recall(1), disk, VIEW)
    again = recall(2, disk)
    again.take((), B)
    again.take((), C)
    again.judge((B, C), 10.1)
    assert not again.waits


def test_what_was_heard_is_bounded_and_the_oldest_start_goes() -> None:
    heard = Heard()
    assert heard.journal_of(B) == 0
    assert not heard.note(B, Memory(journal=1, start=0, count=1))
    assert not heard.note(B, Memory(journal=1, start=0, count=2))
    assert heard.note(B, Memory(journal=1, start=1, count=2))
    for start in range(limits.HEARD_STARTS_MAX + 2):
        heard.note(B, Memory(journal=1, start=start, count=2))
        heard.note(B, Memory(journal=1, start=start, count=1))
    held = heard.from_device(B)
    assert [each.start for each in held] == list(range(2, limits.HEARD_STARTS_MAX + 2))
    assert {each.count for each in held} == {2}
    assert heard.from_device(C) == ()
    heard.note(B, Memory(journal=9, start=1, count=1))
    assert heard.journal_of(B) == 9


def test_count_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="no records or more"):
        Memory(journal=1, start=1, count=-1)


def test_older_disk_image_has_no_vote_until_the_next_view() -> None:
    net = three()
    net.complete(1, A, B, C)
    image = list(net.disk[B])
    net.complete(2, A, B, C)
    net.disk[B] = image
    net.start(B)
    net.see()
    net.see(A, B, C)
    assert net.machines[B].standing.stance is Stance.ABSTAINING
    net.wait(limits.MEMORY_LOST_WAIT_S + 1.0)
    net.propose(A, A, B, C)
    assert net.machines[B].standing.stance is Stance.MEMBER
    assert net.machines[B].records[-1] == make_step(2)
    net.start(B)
    net.see()
    net.see(A, B, C)
    assert net.machines[B].standing.stance is Stance.MEMBER


def test_restarted_member_votes_once_it_was_reminded_or_nobody_is_there() -> None:
    net = three()
    net.start(B)
    net.complete(1, A, B, C)
    assert net.machines[B].statistics().newest_step == 0
    net.see()
    net.see(A, B, C)
    net.wait(limits.HEAD_INTERVAL_S * 2)
    assert net.machines[B].records == (make_step(1),)
    net.start(B)
    net.see(B)
    net.complete(2, B)
    net.wait(limits.RECALL_WAIT_S)
    net.complete(2, B)
    assert net.machines[B].records[-1] == make_step(2)


def test_restarted_member_is_reminded_as_soon_as_it_speaks() -> None:
    """The others may have seen it come before it could hear them."""
    net = three()
    net.start(B)
    net.machines[B].reachable(frozenset({A, C}), net.now)
    net.settle()
    net.complete(1, B)
    assert net.machines[B].records == (make_step(1),)


def test_member_that_missed_a_view_keeps_no_record_of_a_step_that_was_made_again() -> None:
    """B has a record of step 2 that nobody else had; views 2 and 3 were decided without it."""
    ledger = StepLedger(B)
    first = first_view(A, B, C)
    ledger.begin(first)
    for step in (1, 2):
        ledger.hold(make_step(step, loss=7.0))
    second = replace(
        followed(first, (A, 1), (C, 1), resume_step=1), records=(make_step(1, loss=7.0),)
    )
    third = replace(
        followed(second, (A, 1), (B, 1), (C, 1), resume_step=4),
        records=(make_step(3), make_step(4)),
    )
    ledger.begin(third)
    assert ledger.records == (make_step(3), make_step(4))


def test_member_of_the_view_before_keeps_its_records() -> None:
    ledger = StepLedger(B)
    first = first_view(A, B, C)
    ledger.begin(first)
    for step in (1, 2):
        ledger.hold(make_step(step))
    view = followed(first, (A, 1), (B, 1), resume_step=3)
    ledger.begin(replace(view, records=(make_step(3),)))
    assert ledger.records == tuple(map(make_step, (1, 2, 3)))
