"""Questions asked directly and through others, and how long a suspicion lasts."""

from __future__ import annotations

import random

import pytest

from p2ptrain import limits
from p2ptrain.ids import DeviceId
from p2ptrain.membership.events import MemberDown, MemberSuspected, MemberUp, SuspicionCleared
from p2ptrain.membership.machine import Membership
from p2ptrain.membership.messages import Ack, AskFor, Linked, News, Ping, Vouch
from p2ptrain.membership.probing import ProbeOrder, Question, Questions, choose_relays
from p2ptrain.membership.standings import THROUGH_OTHERS
from p2ptrain.membership.states import State
from p2ptrain.membership.suspicion import suspicion_timeout_s
from tests.sim.plans import device, make_record

ME, PEER, THIRD, FAR = (device(i) for i in range(4))


def joined(*peers: DeviceId) -> Membership:
    """A machine whose peers are all linked and alive at 0 s."""
    core = Membership(own=make_record(ME), rng=random.Random(1))
    for peer in peers:
        core.link_up(peer, 0.0)
        core.receive(News(records=(make_record(peer),)), peer, 0.0)
    drain(core)
    return core


def drain(core: Membership) -> list[tuple[DeviceId, object]]:
    core.events()
    return [(out.to, out.message) for out in core.outgoing()]


def run_until(core: Membership, end: float, *, hearing: tuple[DeviceId, ...] = ()) -> list[object]:
    """Tick at each deadline up to `end` while `hearing` answer; gives the events."""
    seen: list[object] = []
    while (due := core.deadline()) is not None and due <= end:
        core.tick(due)
        for peer in hearing:
            core.heard(peer, due)
        seen += core.events()
    return seen


def asked_for(core: Membership) -> list[tuple[DeviceId, AskFor]]:
    sent = [(out.to, out.message) for out in core.outgoing()]
    return [(to, message) for to, message in sent if isinstance(message, AskFor)]


def test_unanswered_probe_goes_through_others_but_not_the_target() -> None:
    core = joined(PEER, THIRD)
    events = run_until(core, 2.0, hearing=(THIRD,))
    questions = asked_for(core)
    assert questions
    assert {(to, ask.target) for to, ask in questions} == {(THIRD, PEER)}
    assert events == []


def test_vouch_of_another_keeps_a_silent_peer_alive() -> None:
    core = joined(PEER, THIRD)
    for tenth in range(1, 200):
        now = tenth / 10
        assert run_until(core, now, hearing=(THIRD,)) == []
        for _, ask in asked_for(core):
            core.receive(Vouch(sequence=ask.sequence, target=PEER), THIRD, now)
    assert core.members(20.0)[0].state is State.ALIVE


def test_vouch_clears_a_suspicion() -> None:
    core = joined(PEER, THIRD)
    core.link_down(PEER, False, 1.0)
    (question,) = asked_for(core)
    assert core.events() == [MemberSuspected(device=PEER, reason="its link broke")]
    core.receive(Vouch(sequence=question[1].sequence, target=PEER), THIRD, 1.1)
    assert core.events() == [SuspicionCleared(device=PEER)]
    view = core.members(1.1)[0]
    assert (view.state, view.reason, view.linked) == (State.ALIVE, THROUGH_OTHERS, False)
    assert core.alive() == (PEER, THIRD)


def test_peer_that_only_others_reach_is_cut_off_and_comes_back_with_a_link() -> None:
    core = joined(PEER, THIRD)
    core.link_down(PEER, False, 1.0)
    downs = []
    for tenth in range(11, 80):
        now = tenth / 10
        for _, ask in asked_for(core):
            core.receive(Vouch(sequence=ask.sequence, target=PEER), THIRD, now)
        events = run_until(core, now, hearing=(THIRD,))
        downs += [(now, event) for event in events if isinstance(event, MemberDown)]
    ((at, down),) = downs
    assert (down.device, down.kind) == (PEER, "cut off")
    assert at == pytest.approx(1.0 + limits.CUT_OFF_AFTER_S, abs=0.11)
    assert core.alive() == (THIRD,)
    assert core.members(8.0)[0].state is State.ALIVE
    core.link_up(PEER, 8.0)
    core.receive(Ping(sequence=1), PEER, 8.1)
    assert MemberUp(record=make_record(PEER)) in core.events()


@pytest.mark.parametrize(
    ("sender", "target", "sequence"), [(PEER, PEER, 0), (THIRD, FAR, 0), (THIRD, PEER, 99)]
)
def test_vouch_that_answers_no_open_question_means_nothing(
    sender: DeviceId, target: DeviceId, sequence: int
) -> None:
    core = joined(PEER, THIRD)
    core.link_down(PEER, False, 1.0)
    (question,) = asked_for(core)
    core.events()
    right = question[1].sequence
    core.link_up(PEER, 1.0)
    core.events()
    core.receive(Vouch(sequence=right + sequence, target=target), sender, 1.1)
    assert core.members(1.1)[0].linked
    cleared = core.events() != []
    assert cleared == (sender == PEER)  # its own message is a sign of life, the vouch is not


def test_late_vouch_does_not_revive_the_dead() -> None:
    core = joined(PEER, THIRD)
    core.link_down(PEER, False, 1.0)
    (question,) = asked_for(core)
    core.link_down(PEER, True, 1.1)
    drain(core)
    core.receive(Vouch(sequence=question[1].sequence, target=PEER), THIRD, 1.2)
    assert core.members(1.2)[0].state is State.DEAD


def test_relay_asks_for_another_and_passes_the_answer_back() -> None:
    core = joined(PEER, THIRD)
    core.receive(AskFor(sequence=7, target=THIRD), PEER, 0.1)
    ((to, ping),) = drain(core)
    assert to == THIRD
    assert isinstance(ping, Ping)
    core.receive(Ack(sequence=ping.sequence), THIRD, 0.2)
    assert drain(core) == [(PEER, Vouch(sequence=7, target=THIRD))]
    core.receive(Ack(sequence=ping.sequence), THIRD, 0.3)
    assert drain(core) == []


def test_relay_answers_for_itself_and_is_silent_about_strangers() -> None:
    core = joined(PEER)
    core.receive(AskFor(sequence=1, target=ME), PEER, 0.1)
    core.receive(AskFor(sequence=2, target=FAR), PEER, 0.2)
    assert drain(core) == [(PEER, Vouch(sequence=1, target=ME))]


def test_far_peer_is_asked_through_the_neighbour_that_has_a_link() -> None:
    core = joined(PEER, THIRD)
    core.receive(News(records=(make_record(FAR),)), PEER, 0.1)
    assert core.members(0.1)[2].reason == THROUGH_OTHERS
    run_until(core, 1.2, hearing=(PEER, THIRD))
    sent = [(out.to, out.message) for out in core.outgoing()]
    assert (PEER, Linked(devices=(PEER, THIRD))) in sent  # so that others can ask through us
    assert not any(isinstance(message, AskFor) for _, message in sent)  # nobody is near it yet
    core.receive(Linked(devices=(ME, FAR)), THIRD, 1.3)
    run_until(core, 2.2, hearing=(PEER, THIRD))
    assert {(to, ask.target) for to, ask in asked_for(core)} == {(THIRD, FAR)}


def test_links_are_told_again_only_when_they_change() -> None:
    core = joined(PEER, THIRD)
    core.receive(News(records=(make_record(FAR),)), PEER, 0.1)
    run_until(core, 5.0, hearing=(PEER, THIRD))
    told = [out for out in core.outgoing() if isinstance(out.message, Linked)]
    assert len(told) == 2
    core.link_up(FAR, 5.0)
    core.receive(Linked(devices=(ME,)), PEER, 5.0)
    run_until(core, 7.0, hearing=(PEER, THIRD, FAR))
    told = [out for out in core.outgoing() if isinstance(out.message, Linked)]
    assert [out.to for out in told] == [PEER]  # the others did not ask, and we lack nobody


def test_large_group_is_probed_one_by_one() -> None:
    others = tuple(device(i) for i in range(1, 25))
    core = joined(*others)
    run_until(core, 24.9, hearing=others)
    pinged = [out.to for out in core.outgoing() if isinstance(out.message, Ping)]
    assert len(pinged) in range(22, 28)
    assert len(set(pinged)) >= 20


def test_order_names_everybody_once_per_round() -> None:
    order = ProbeOrder(random.Random(1))
    everybody = {device(i) for i in range(9)}
    assert {order.next(everybody) for _ in range(9)} == everybody
    order.add(device(9))
    assert order.next({device(9)}) == device(9)
    assert [order.next({PEER}) for _ in range(2)] == [PEER, PEER]


def test_relays_with_a_link_go_first() -> None:
    linked = {device(i): frozenset({FAR} if i == 5 else ()) for i in range(4, 9)}
    chosen = choose_relays(FAR, linked, count=3, rng=random.Random(1))
    assert chosen[0] == device(5)
    assert len(set(chosen)) == 3
    assert choose_relays(FAR, {}, count=3, rng=random.Random(1)) == ()


def test_open_questions_are_bounded_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "QUESTIONS_OPEN_MAX", 2)
    questions = Questions()
    first, second, third = (
        questions.add(Question(to=PEER, target=PEER, sent_at_s=float(i))) for i in range(3)
    )
    assert questions.answered(first, by=PEER, target=PEER) is None
    assert questions.answered(third, by=THIRD, target=PEER) is None
    questions.forget(2.0)
    assert questions.answered(second, by=PEER, target=PEER) is None
    assert questions.answered(third, by=PEER, target=PEER) is not None
    questions.forget(9.0)
    assert questions.count == 3


@pytest.mark.parametrize(
    ("confirmations", "expected", "members", "seconds"),
    [
        (0, 0, 2, 3.0),
        (0, 1, 3, 6.0),
        (1, 1, 3, 3.0),
        (0, 3, 16, 6.0),
        (1, 3, 16, 4.5),
        (3, 3, 16, 3.0),
        (9, 3, 16, 3.0),
        (3, 3, 256, 6.0),
    ],
)
def test_suspicion_shrinks_with_confirmations_and_grows_with_the_group(
    confirmations: int, expected: int, members: int, seconds: float
) -> None:
    found = suspicion_timeout_s(confirmations=confirmations, expected=expected, members=members)
    assert found == pytest.approx(seconds)
