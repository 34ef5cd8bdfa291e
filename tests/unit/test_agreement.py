"""The agreement machine, input by input: two members and a home peer."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from p2ptrain import limits
from p2ptrain.agreement.events import (
    PlanDecided,
    ProposalFailed,
    ProposalReceived,
    ProposalWithdrawn,
)
from p2ptrain.agreement.journal import (
    AcceptedRecord,
    DecidedRecord,
    decode_record,
    encode_record,
)
from p2ptrain.agreement.machine import Agreement
from p2ptrain.agreement.messages import Accept, Decided, Propose, Refuse, Withdraw
from p2ptrain.agreement.states import TRANSITIONS, Input, Stand
from p2ptrain.errors import CheckpointError, LocalProtocolError, RemoteProtocolError
from p2ptrain.ids import Lineage, ViewNumber
from p2ptrain.planner.plan import Plan
from p2ptrain.wire.codec import decode, encode
from tests.sim.plans import RUN, device, make_contract, make_plan

HOME, MEMBER, THIRD = device(0), device(1), device(2)
CONTRACT = make_contract()
PLAN = make_plan(HOME, MEMBER, THIRD)
RIVAL = make_plan(HOME, MEMBER, THIRD, reason="another order")
NAMES = {"run": RUN, "lineage": Lineage(0), "view": ViewNumber(1), "plan": PLAN.digest}
ACCEPT = Accept(**NAMES)
DECIDED = Decided(**NAMES)
WITHDRAW = Withdraw(**NAMES, reason="changed my mind")
ACCEPTED_RECORD = AcceptedRecord(plan=PLAN, contract=CONTRACT, proposer=HOME)
DECIDED_RECORD = DecidedRecord(**NAMES)


def machine(of: str = MEMBER) -> Agreement:
    return Agreement(device=of, rng=random.Random(1))  # type: ignore[arg-type]  # a device id


def offered() -> Agreement:
    core = machine()
    core.receive(Propose(plan=PLAN, contract=CONTRACT), HOME, 0.0)
    core.events()
    return core


def accepted() -> Agreement:
    core = offered()
    core.accept(PLAN.digest, 0.0)
    core.writes(), core.outgoing()
    return core


def proposing() -> Agreement:
    """The home peer, which has proposed and accepted itself."""
    core = machine(HOME)
    core.propose(PLAN, CONTRACT, 0.0)
    core.accept(PLAN.digest, 0.0)
    core.writes(), core.outgoing(), core.events()
    return core


def sent(core: Agreement) -> list[tuple[str, object]]:
    return [(out.to, out.message) for out in core.outgoing()]


def test_offer_waits_for_the_shell_and_is_then_durable_and_answered() -> None:
    core = machine()
    core.receive(Propose(plan=PLAN, contract=CONTRACT), HOME, 0.0)
    assert core.events() == [ProposalReceived(plan=PLAN, contract=CONTRACT)]
    assert (core.writes(), sent(core)) == ([], [])
    core.accept(PLAN.digest, 0.1)
    assert core.writes() == [ACCEPTED_RECORD]
    assert sent(core) == [(HOME, ACCEPT)]


def test_decision_is_durable_and_told_once() -> None:
    core = accepted()
    core.receive(DECIDED, HOME, 1.0)
    core.receive(DECIDED, HOME, 1.1)
    assert core.writes() == [DECIDED_RECORD]
    assert core.events() == [PlanDecided(plan=PLAN, contract=CONTRACT)]
    assert core.chain(RUN, Lineage(0)) == (PLAN,)
    assert core.deadline() is None


def test_home_proposes_to_all_and_decides_when_all_accepted() -> None:
    core = machine(HOME)
    core.propose(PLAN, CONTRACT, 0.0)
    proposal = Propose(plan=PLAN, contract=CONTRACT)
    assert sent(core) == [(MEMBER, proposal), (THIRD, proposal)]
    assert core.events() == [ProposalReceived(plan=PLAN, contract=CONTRACT)]
    core.accept(PLAN.digest, 0.1)
    core.receive(ACCEPT, MEMBER, 0.2)
    core.receive(ACCEPT, MEMBER, 0.3)
    assert core.events() == []
    core.receive(ACCEPT, THIRD, 0.4)
    assert core.events() == [PlanDecided(plan=PLAN, contract=CONTRACT)]
    assert core.writes() == [ACCEPTED_RECORD, DECIDED_RECORD]
    assert sent(core) == [(MEMBER, DECIDED), (THIRD, DECIDED)]


def test_plan_of_one_member_is_decided_without_a_message() -> None:
    alone = make_plan(HOME)
    core = machine(HOME)
    core.propose(alone, CONTRACT, 0.0)
    core.accept(alone.digest, 0.0)
    assert [type(event) for event in core.events()] == [ProposalReceived, PlanDecided]
    assert sent(core) == []


def test_home_itself_may_refuse() -> None:
    core = machine(HOME)
    core.propose(PLAN, CONTRACT, 0.0)
    core.events()
    core.refuse(PLAN.digest, "no memory", 0.0)
    (failure,) = core.events()
    assert isinstance(failure, ProposalFailed)
    assert (failure.reason, failure.devices) == (f"{HOME[:8]} refused: no memory", (HOME,))


def test_refusal_fails_the_proposal_at_once_and_names_the_peer() -> None:
    core = proposing()
    core.receive(Refuse(**NAMES, reason="needs 3.2 GiB, 1.0 GiB free"), MEMBER, 0.5)
    failure, withdrawn = core.events()
    reason = f"{MEMBER[:8]} refused: needs 3.2 GiB, 1.0 GiB free"
    assert failure == ProposalFailed(plan=PLAN, reason=reason, devices=(MEMBER,))
    assert withdrawn == ProposalWithdrawn(plan=PLAN, reason=reason)
    assert sent(core) == [(d, Withdraw(**NAMES, reason=reason)) for d in (MEMBER, THIRD)]
    assert core.deadline() is None


def test_silence_fails_the_proposal_in_time_and_names_the_peers() -> None:
    core = proposing()
    core.receive(ACCEPT, MEMBER, 0.5)
    asked = 0
    while (due := core.deadline()) is not None and due < limits.PROPOSAL_TIMEOUT_S:
        core.tick(due)
        messages = sent(core)
        assert all(to == THIRD for to, _ in messages)
        asked += len(messages)
    assert 5 <= asked <= 12  # backed off, not hammered
    core.tick(limits.PROPOSAL_TIMEOUT_S)
    failure = core.events()[0]
    assert isinstance(failure, ProposalFailed)
    assert (failure.reason, failure.devices) == (
        f"no answer in time from {THIRD[:8]}",
        (THIRD,),
    )


def test_lost_member_fails_the_proposal_at_once() -> None:
    core = proposing()
    core.member_down(device(9), 0.5)
    assert core.events() == []
    core.member_down(THIRD, 0.6)
    failure = core.events()[0]
    assert isinstance(failure, ProposalFailed)
    assert (failure.reason, failure.devices) == (f"{THIRD[:8]} is gone", (THIRD,))


def test_late_acceptance_of_a_failed_proposal_is_told_so() -> None:
    core = proposing()
    core.withdraw(PLAN.digest, "stopped by its owner", 0.5)
    core.events(), core.outgoing()
    core.receive(ACCEPT, MEMBER, 0.6)
    core.receive(ACCEPT, THIRD, 0.6)
    reason = "the proposal is no longer open"
    assert sent(core) == [(d, Withdraw(**NAMES, reason=reason)) for d in (MEMBER, THIRD)]
    assert core.events() == []


def test_lost_decision_is_asked_for_by_repeating_the_acceptance() -> None:
    core = accepted()
    due = core.deadline()
    assert due == limits.RETRANSMIT_FIRST_S
    core.tick(due)
    assert sent(core) == [(HOME, ACCEPT)]
    home = proposing()
    home.receive(ACCEPT, MEMBER, 0.1)
    home.receive(ACCEPT, THIRD, 0.1)
    home.outgoing()
    home.receive(ACCEPT, THIRD, 0.6)
    assert sent(home) == [(THIRD, DECIDED)]


def test_repeated_proposal_is_answered_as_before() -> None:
    again = Propose(plan=PLAN, contract=CONTRACT)
    waiting, member, unwilling = offered(), accepted(), offered()
    unwilling.refuse(PLAN.digest, "no memory", 0.1)
    unwilling.outgoing()
    for core in (waiting, member, unwilling):
        core.receive(again, HOME, 1.0)
        assert (core.events(), core.writes()) == ([], [])
    assert sent(waiting) == []
    assert sent(member) == [(HOME, ACCEPT)]
    view_seen = ViewNumber(1)
    assert sent(unwilling) == [(HOME, Refuse(**NAMES, reason="no memory", view_seen=view_seen))]


@pytest.mark.parametrize(
    ("ready", "reason"),
    [
        (offered, "another plan is proposed for this view"),
        (accepted, "another plan was accepted for this view"),
    ],
)
def test_rival_plan_for_a_taken_view_is_refused(
    ready: Callable[[], Agreement], reason: str
) -> None:
    core = ready()
    core.receive(Propose(plan=RIVAL, contract=CONTRACT), HOME, 1.0)
    refusal = Refuse(**{**NAMES, "plan": RIVAL.digest}, reason=reason, view_seen=ViewNumber(1))
    assert sent(core) == [(HOME, refusal)]
    assert core.events() == []


def test_withdrawn_acceptance_still_binds() -> None:
    core = accepted()
    core.receive(WITHDRAW, HOME, 1.0)
    assert core.events() == [ProposalWithdrawn(plan=PLAN, reason="changed my mind")]
    assert core.deadline() is None
    core.receive(Propose(plan=RIVAL, contract=CONTRACT), HOME, 2.0)
    assert [type(message) for _, message in sent(core)] == [Refuse]


def test_withdrawn_offer_makes_room_for_another_plan() -> None:
    core = offered()
    core.receive(WITHDRAW, HOME, 1.0)
    core.events()
    core.receive(Propose(plan=RIVAL, contract=CONTRACT), HOME, 2.0)
    assert core.events() == [ProposalReceived(plan=RIVAL, contract=CONTRACT)]
    core.accept(PLAN.digest, 2.1)
    core.refuse(PLAN.digest, "too late", 2.1)
    assert (core.writes(), sent(core)) == ([], [])


def test_earlier_view_than_the_decided_one_is_refused() -> None:
    core = machine()
    later = make_plan(HOME, MEMBER, view=3)
    core.receive(Propose(plan=later, contract=CONTRACT), HOME, 0.0)
    core.accept(later.digest, 0.0)
    core.receive(Decided(**{**NAMES, "view": ViewNumber(3), "plan": later.digest}), HOME, 0.1)
    core.outgoing()
    core.receive(Propose(plan=PLAN, contract=CONTRACT), HOME, 1.0)
    ((_, refusal),) = sent(core)
    assert isinstance(refusal, Refuse)
    assert (refusal.reason, refusal.view_seen) == ("view 3 is already decided", 3)
    assert core.next_view(RUN, Lineage(0)) == 4
    assert core.next_view(RUN, Lineage(1)) == 1


@pytest.mark.parametrize(
    ("plan", "sender", "phrase"),
    [
        (PLAN, THIRD, "only the home peer"),
        (make_plan(HOME, THIRD), HOME, "not a member"),
        (make_plan(HOME, MEMBER, contract=make_contract(5)), HOME, "contract"),
        (make_plan(HOME, MEMBER, view=0), HOME, "count from 1"),
        (make_plan(HOME, MEMBER, view=limits.VIEW_MAX), HOME, "count from 1"),
        (make_plan(HOME, MEMBER, lineage=-1), HOME, "count from 1"),
    ],
)
def test_bad_proposal_is_refused_and_not_offered(plan: Plan, sender: str, phrase: str) -> None:
    core = machine()
    core.receive(Propose(plan=plan, contract=CONTRACT), sender, 0.0)  # type: ignore[arg-type]
    ((to, refusal),) = sent(core)
    assert isinstance(refusal, Refuse)
    assert (to, core.events()) == (sender, [])
    assert phrase in refusal.reason


def test_number_of_waiting_offers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PROPOSALS_OPEN_MAX", 1)
    core = offered()
    another = make_plan(HOME, MEMBER, view=2)
    core.receive(Propose(plan=another, contract=CONTRACT), HOME, 0.0)
    ((_, refusal),) = sent(core)
    assert isinstance(refusal, Refuse)
    assert "too many" in refusal.reason


def test_refused_offers_are_forgotten_and_acceptances_never(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "PROPOSALS_OPEN_MAX", 2)
    core = accepted()
    plans = [make_plan(HOME, MEMBER, view=view) for view in range(2, 9)]
    for plan in plans:
        core.receive(Propose(plan=plan, contract=CONTRACT), HOME, 0.0)
        core.refuse(plan.digest, "no memory", 0.0)
    core.events()
    core.receive(Propose(plan=plans[0], contract=CONTRACT), HOME, 1.0)
    core.receive(Propose(plan=plans[-1], contract=CONTRACT), HOME, 1.0)
    assert core.events() == [ProposalReceived(plan=plans[0], contract=CONTRACT)]
    statistics = core.statistics()
    assert (statistics.accepted_count, statistics.offered_count) == (1, 1)
    core.receive(DECIDED, HOME, 2.0)
    assert core.statistics().decided_count == 1


def test_refusal_tells_the_proposer_which_view_is_free() -> None:
    core = proposing()
    core.receive(Refuse(**NAMES, reason="taken", view_seen=ViewNumber(6)), MEMBER, 0.5)
    assert core.next_view(RUN, Lineage(0)) == 7


def test_impossible_messages_break_the_protocol() -> None:
    stranger = device(7)
    with pytest.raises(RemoteProtocolError, match="never accepted"):
        machine().receive(DECIDED, HOME, 0.0)
    with pytest.raises(RemoteProtocolError, match="never accepted"):
        accepted().receive(DECIDED, THIRD, 0.0)
    with pytest.raises(RemoteProtocolError, match="offered"):
        offered().receive(DECIDED, HOME, 0.0)
    with pytest.raises(RemoteProtocolError, match="not its member"):
        proposing().receive(ACCEPT, stranger, 0.0)
    decided = accepted()
    decided.receive(DECIDED, HOME, 0.0)
    with pytest.raises(RemoteProtocolError, match="withdraws"):
        decided.receive(WITHDRAW, HOME, 0.0)


def test_withdrawal_of_something_else_changes_nothing() -> None:
    core = accepted()
    core.receive(replace(WITHDRAW, plan=RIVAL.digest), HOME, 0.0)
    core.receive(WITHDRAW, THIRD, 0.0)
    core.receive(replace(WITHDRAW, view=ViewNumber(8)), HOME, 0.0)
    core.receive(DECIDED, HOME, 0.1)
    assert [type(event) for event in core.events()] == [PlanDecided]


def test_own_mistakes_are_told_to_the_caller() -> None:
    with pytest.raises(LocalProtocolError, match="no agreement message"):
        machine().receive("hello", HOME, 0.0)
    with pytest.raises(LocalProtocolError, match="only the home peer"):
        machine().propose(PLAN, CONTRACT, 0.0)
    with pytest.raises(LocalProtocolError, match="contract"):
        machine(HOME).propose(PLAN, make_contract(5), 0.0)
    with pytest.raises(LocalProtocolError, match="taken"):
        proposing().propose(RIVAL, CONTRACT, 0.0)
    with pytest.raises(LocalProtocolError, match="accepted"):
        accepted().refuse(PLAN.digest, "no", 0.0)


def test_restart_keeps_the_acceptance_and_asks_again() -> None:
    core = machine()
    core.restore([ACCEPTED_RECORD], 100.0)
    core.receive(Propose(plan=RIVAL, contract=CONTRACT), HOME, 100.0)
    assert [type(message) for _, message in sent(core)] == [Refuse]
    assert core.next_view(RUN, Lineage(0)) == 2
    due = core.deadline()
    assert due is not None
    core.tick(due)
    assert sent(core) == [(HOME, ACCEPT)]
    core.receive(DECIDED, HOME, 101.0)
    assert [type(event) for event in core.events()] == [PlanDecided]


def test_restarted_home_answers_from_its_chain_or_withdraws() -> None:
    knows, forgot = machine(HOME), machine(HOME)
    knows.restore([ACCEPTED_RECORD, DECIDED_RECORD], 0.0)
    for core in (knows, forgot):
        core.receive(ACCEPT, MEMBER, 1.0)
        assert core.events() == []
    assert sent(knows) == [(MEMBER, DECIDED)]
    assert [type(message) for _, message in sent(forgot)] == [Withdraw]
    assert knows.chain(RUN, Lineage(0)) == (PLAN,)


def test_contradictory_journal_stops_the_peer() -> None:
    rival = AcceptedRecord(plan=RIVAL, contract=CONTRACT, proposer=HOME)
    with pytest.raises(CheckpointError, match="two plans"):
        machine().restore([ACCEPTED_RECORD, rival], 0.0)
    with pytest.raises(CheckpointError, match="never accepted"):
        machine().restore([DECIDED_RECORD], 0.0)


def test_table_names_every_pair_a_correct_peer_can_cause() -> None:
    impossible = {(s, i) for s in Stand for i in Input} - set(TRANSITIONS)
    assert impossible == {
        (Stand.OFFERED, Input.DECIDE),
        (Stand.REFUSED, Input.DECIDE),
        (Stand.REFUSED, Input.ACCEPT),
        (Stand.WITHDRAWN, Input.DECIDE),
        (Stand.ACCEPTED, Input.REFUSE),
        (Stand.DECIDED, Input.REFUSE),
        (Stand.DECIDED, Input.WITHDRAW),
    }


@pytest.mark.parametrize("record", [ACCEPTED_RECORD, DECIDED_RECORD])
def test_journal_lines_survive_the_disk(record: AcceptedRecord | DecidedRecord) -> None:
    line = encode_record(record)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert decode_record(line) == record


@pytest.mark.parametrize(
    "line",
    [
        b"",
        encode_record(ACCEPTED_RECORD)[:-40],
        b"[1, 2]",
        b'{"version": 9, "kind": "accepted", "record": {}}',
        b'{"version": 1, "kind": "promised", "record": {}}',
        b'{"version": 1, "kind": "decided", "record": {"run": 3}}',
    ],
)
def test_damaged_journal_line_is_refused(line: bytes) -> None:
    with pytest.raises(CheckpointError, match="journal"):
        decode_record(line)


@pytest.mark.parametrize(
    "message",
    [
        Propose(plan=PLAN, contract=CONTRACT),
        ACCEPT,
        Refuse(**NAMES, reason="no", view_seen=ViewNumber(2)),
        DECIDED,
        WITHDRAW,
    ],
)
def test_messages_survive_the_wire(message: object) -> None:
    assert decode(encode(message)) == message


@pytest.mark.parametrize("view", [-1, limits.VIEW_MAX + 1])
def test_view_seen_is_bounded(view: int) -> None:
    with pytest.raises(ValueError, match="out of range"):
        Refuse(**NAMES, reason="no", view_seen=ViewNumber(view))


@pytest.mark.parametrize("kind", [Refuse, Withdraw])
def test_reasons_are_bounded(kind: type) -> None:
    with pytest.raises(ValueError, match="too long"):
        kind(**NAMES, reason="x" * (limits.REASON_CHARACTERS_MAX + 1))
