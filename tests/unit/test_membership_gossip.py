"""Accusations and their contradictions, leaves, suspended machines, and how news spreads."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from p2ptrain import limits
from p2ptrain.errors import RemoteProtocolError
from p2ptrain.ids import DeviceId
from p2ptrain.membership.accusation import Accusation
from p2ptrain.membership.events import (
    AddressLearned,
    MemberDown,
    MemberSuspected,
    MemberUp,
    MemberWasAway,
    RecordChanged,
    SuspicionCleared,
)
from p2ptrain.membership.gossip import Rumours
from p2ptrain.membership.machine import Membership
from p2ptrain.membership.merge import content_of
from p2ptrain.membership.messages import Held, Holdings, News, Ping
from p2ptrain.membership.record import MemberRecord
from p2ptrain.membership.states import State
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
    seen: list[object] = []
    while (due := core.deadline()) is not None and due <= end:
        core.tick(due)
        for peer in hearing:
            core.heard(peer, due)
        seen += core.events()
    return seen


def accuse(
    subject: DeviceId, verdict: str = "suspect", *, by: DeviceId = THIRD, refutations: int = 0,
    incarnation: int = 1, kind: str = "silent",
) -> Accusation:  # fmt: skip
    return Accusation(
        device=subject, incarnation=incarnation, refutations=refutations, verdict=verdict,
        kind=kind, accuser=by,
    )  # fmt: skip


def far_known(core: Membership) -> Membership:
    """FAR is alive through others, without a link."""
    core.receive(News(records=(make_record(FAR),)), PEER, 0.0)
    drain(core)
    return core


def state_of(core: Membership, subject: DeviceId) -> State:
    return next(view.state for view in core.members(0.0) if view.device == subject)


# Accusations against others.


def test_accused_that_was_just_heard_is_told_and_not_suspected() -> None:
    core = joined(PEER, THIRD)
    said = accuse(PEER)
    core.receive(News(accusations=(said, said)), THIRD, 1.0)
    assert core.events() == []
    assert [(o.to, o.message) for o in core.outgoing()] == [(PEER, News(accusations=(said,)))]


def test_death_of_a_linked_peer_is_not_believed_on_hearsay() -> None:
    core = joined(PEER, THIRD)
    core.receive(News(accusations=(accuse(PEER, "dead"),)), THIRD, 2.6)  # not heard lately
    assert core.events() == [MemberSuspected(device=PEER, reason=f"no answer to {THIRD[:4]}")]
    sent = [out.message for out in core.outgoing() if out.to == PEER]
    assert any(isinstance(message, Ping) for message in sent)
    core.receive(Ping(sequence=1), PEER, 2.7)
    assert core.events() == [SuspicionCleared(device=PEER)]


def test_suspected_peer_is_dead_when_another_says_so() -> None:
    core = joined(PEER, THIRD)
    assert any(isinstance(e, MemberSuspected) for e in run_until(core, 3.0, hearing=(THIRD,)))
    core.receive(News(accusations=(accuse(PEER, "dead"),)), THIRD, 3.0)
    (down,) = core.events()
    reason = f"{THIRD[:4]} found it dead"
    assert down == MemberDown(device=PEER, reason=reason, kind="silent")


def test_sure_death_is_passed_on_as_sure() -> None:
    core = joined(PEER, THIRD)
    core.link_down(PEER, False, 1.0)
    core.events()
    core.receive(News(accusations=(accuse(PEER, "dead", kind="refused"),)), THIRD, 1.1)
    (down,) = core.events()
    assert isinstance(down, MemberDown)
    assert down.kind == "refused"


def test_far_peer_is_suspected_confirmed_and_buried_by_gossip() -> None:
    core = far_known(joined(PEER, THIRD))
    core.receive(News(accusations=(accuse(FAR, by=THIRD),)), THIRD, 0.0)
    assert state_of(core, FAR) is State.SUSPECT
    others = (PEER, THIRD)
    run_until(core, 4.2, hearing=others)
    assert state_of(core, FAR) is State.SUSPECT  # one accuser: 6 s
    core.receive(News(accusations=(accuse(FAR, by=PEER),)), PEER, 4.2)
    assert state_of(core, FAR) is State.DEAD  # one confirmation of two: 4.1 s, which are over
    run_until(core, 5.0, hearing=others)
    told = [o.message for o in core.outgoing() if isinstance(o.message, News)]
    verdicts = {a.verdict for news in told for a in news.accusations}
    assert verdicts == {"suspect", "dead"}


def test_confirmations_of_one_accuser_count_once() -> None:
    core = far_known(joined(PEER, THIRD))
    for tenth in range(40):
        core.receive(News(accusations=(accuse(FAR, by=THIRD),)), THIRD, tenth / 10)
        core.heard(PEER, tenth / 10)
        run_until(core, tenth / 10)
    assert state_of(core, FAR) is State.SUSPECT


def test_refuted_accusation_is_answered_with_the_record_that_refutes_it() -> None:
    core = joined(PEER, THIRD)
    newer = replace(make_record(PEER, version=1), refutations=1)
    core.receive(News(records=(newer,)), PEER, 0.1)
    drain(core)
    core.receive(News(accusations=(accuse(PEER, "dead"),)), THIRD, 0.2)
    assert core.events() == []
    assert [o.message for o in core.outgoing()] == [News(records=(newer,))]


@pytest.mark.parametrize("verdict", ["suspect", "dead"])
def test_only_a_higher_standing_revives(verdict: str) -> None:
    core = far_known(joined(PEER))
    core.receive(News(accusations=(accuse(FAR, verdict),)), PEER, 0.1)
    held = state_of(core, FAR)
    assert held.value == verdict
    old_words = make_record(FAR, version=3, activity="training")
    core.receive(News(records=(old_words,)), PEER, 0.2)
    assert state_of(core, FAR) is held
    core.receive(News(records=(replace(old_words, version=4, refutations=1),)), PEER, 0.3)
    assert state_of(core, FAR) is State.ALIVE


def test_accusation_against_a_stranger_is_ignored() -> None:
    core = joined(PEER)
    core.receive(News(accusations=(accuse(FAR, "dead"),)), PEER, 0.1)
    assert [view.device for view in core.members(0.1)] == [PEER]


def test_newcomer_learns_of_the_dead_as_dead() -> None:
    core = joined(PEER)
    dead = News(records=(make_record(FAR, addresses=("a:1",)),), accusations=(accuse(FAR, "dead"),))
    core.receive(dead, PEER, 0.1)
    assert state_of(core, FAR) is State.DEAD
    assert core.events() == []  # nobody to dial, nobody who went


# Accusations against us.


def test_accusation_against_us_is_contradicted_to_everybody() -> None:
    core = joined(PEER, THIRD)
    core.receive(News(accusations=(accuse(ME, "dead", refutations=4),)), THIRD, 0.1)
    assert (core.own.refutations, core.own.version) == (5, 1)
    assert drain(core) == [(to, News(records=(core.own,))) for to in (PEER, THIRD)]
    core.receive(News(accusations=(accuse(ME, "dead", refutations=4),)), THIRD, 0.2)
    assert core.own.refutations == 5
    assert drain(core) == [(THIRD, News(records=(core.own,)))]


def test_accusation_against_an_earlier_life_is_outrun() -> None:
    core = joined(PEER)
    core.receive(News(accusations=(accuse(ME, incarnation=60),)), PEER, 0.1)
    assert core.own.incarnation == 61


@pytest.mark.parametrize(
    "message",
    [
        News(accusations=(accuse(ME, incarnation=limits.INCARNATION_MAX),)),
        Ping(sequence=1, incarnation=limits.INCARNATION_MAX, version=1),
        Holdings(held=(Held(device=ME, incarnation=limits.INCARNATION_MAX, version=0, content=1),)),
    ],
)
def test_nobody_makes_us_use_up_the_incarnations(message: object) -> None:
    core = joined(PEER)
    with pytest.raises(RemoteProtocolError, match="incarnations"):
        core.receive(message, PEER, 0.1)


def test_peer_that_was_held_dead_is_told_when_it_is_heard() -> None:
    core = joined(PEER, THIRD)
    run_until(core, 9.0, hearing=(THIRD,))
    assert state_of(core, PEER) is State.DEAD
    drain(core)
    core.receive(Ping(sequence=1), PEER, 20.0)
    told = [o.message for o in core.outgoing() if o.to == PEER and isinstance(o.message, News)]
    assert [a.verdict for news in told for a in news.accusations] == ["dead"]
    assert core.events() == [MemberUp(record=make_record(PEER))]


# Leaves and suspended machines.


def left_record(refutations: int = 0) -> MemberRecord:
    return replace(make_record(PEER, version=1), leaving=True, refutations=refutations)


def test_leaving_peer_counts_until_it_is_gone_and_then_has_left() -> None:
    core = joined(PEER)
    core.receive(News(records=(left_record(),)), PEER, 0.1)
    assert core.events() == [RecordChanged(record=left_record())]
    assert core.alive() == (PEER,)
    core.link_down(PEER, False, 0.2)
    assert core.events() == [MemberDown(device=PEER, reason="left", kind="left")]
    view = core.members(0.3)[0]
    assert (view.state, view.reason) == (State.LEFT, "left")


def test_leave_is_known_as_one_where_only_gossip_comes() -> None:
    core = far_known(joined(PEER))
    leaving = replace(make_record(FAR, version=1), leaving=True)
    news = News(records=(leaving,), accusations=(accuse(FAR, "dead", kind="refused"),))
    core.receive(news, PEER, 0.1)
    assert state_of(core, FAR) is State.LEFT


def test_silent_end_of_a_leaving_peer_is_a_leave() -> None:
    core = joined(PEER)
    core.receive(News(records=(left_record(),)), PEER, 0.1)
    downs = [e for e in run_until(core, 8.0) if isinstance(e, MemberDown)]
    assert [down.kind for down in downs] == ["left"]


def test_leave_that_is_taken_back_counts_as_a_contradiction() -> None:
    core = joined(PEER)
    core.update_own(leaving=True)
    assert (core.own.leaving, core.own.refutations) == (True, 0)
    core.update_own(leaving=False)
    assert (core.own.leaving, core.own.refutations, core.own.version) == (False, 1, 2)
    other = far_known(joined(PEER))
    gone = replace(make_record(FAR, version=1), leaving=True)
    other.receive(News(records=(gone,), accusations=(accuse(FAR, "dead"),)), PEER, 0.1)
    back = replace(gone, leaving=False, version=2, refutations=1)
    other.receive(News(records=(back,)), PEER, 0.2)
    assert state_of(other, FAR) is State.ALIVE


def test_peer_that_left_and_starts_again_is_back() -> None:
    core = joined(PEER)
    core.receive(News(records=(left_record(),)), PEER, 0.1)
    core.link_down(PEER, True, 0.2)
    core.events()
    core.link_up(PEER, 9.0)
    again = make_record(PEER, incarnation=9)
    core.receive(News(records=(again,)), PEER, 9.1)
    assert MemberUp(record=again) in core.events()


def test_suspended_machine_says_so_and_blames_nobody() -> None:
    core = joined(PEER, THIRD)
    run_until(core, 4.0, hearing=(THIRD,))
    assert state_of(core, PEER) is State.SUSPECT
    drain(core)
    core.away(600.0, 4.0)
    own = core.own
    assert (own.away_count, own.away_s, own.refutations, own.version) == (1, 600.0, 1, 1)
    assert (PEER, News(records=(own,))) in drain(core)
    assert run_until(core, 5.9, hearing=(THIRD,)) == []


def test_others_learn_that_it_was_a_suspension_and_not_a_crash() -> None:
    core = joined(PEER)
    run_until(core, 9.0)
    assert state_of(core, PEER) is State.DEAD
    drain(core)
    back = replace(make_record(PEER, version=1), refutations=1, away_count=1, away_s=600.0)
    core.receive(News(records=(back,)), PEER, 600.0)
    events = core.events()
    assert MemberWasAway(device=PEER, away_s=600.0) in events
    assert core.members(600.0)[0].last_down == "suspended for 600 s"
    assert MemberUp(record=back) in events


# Holdings.


def line_of(record: MemberRecord, **changes: object) -> Held:
    line = Held(
        device=record.device, incarnation=record.incarnation, version=record.version,
        content=content_of(record),
    )  # fmt: skip
    return replace(line, **changes)  # type: ignore[arg-type]  # fields by name


def test_equal_holdings_cause_no_message() -> None:
    core = joined(PEER)
    held = (line_of(core.own), line_of(make_record(PEER)))
    core.receive(Holdings(held=held, reply_wanted=True), PEER, 0.1)
    assert drain(core) == []


def test_what_is_newer_here_is_sent_and_what_is_newer_there_is_asked_for() -> None:
    core = far_known(joined(PEER))
    held = (line_of(make_record(PEER, version=2)), line_of(make_record(THIRD)))
    core.receive(Holdings(held=held, reply_wanted=True), PEER, 0.1)
    (_, news), (_, asked) = drain(core)
    assert news == News(records=(core.own, make_record(FAR)))
    assert isinstance(asked, Holdings)
    assert not asked.reply_wanted


def test_two_lives_of_one_second_are_told_apart() -> None:
    core = joined(PEER)
    other_life = make_record(ME, activity="another life")
    core.receive(Holdings(held=(line_of(other_life),)), PEER, 0.1)
    assert core.own.incarnation == 2


def test_holdings_tell_who_is_dead() -> None:
    core = far_known(joined(PEER))
    held = (line_of(core.own), line_of(make_record(PEER)), line_of(make_record(FAR), dead=0))
    core.receive(Holdings(held=held), PEER, 0.1)
    assert state_of(core, FAR) is State.DEAD
    drain(core)
    held = (line_of(core.own), line_of(make_record(PEER)), line_of(make_record(FAR)))
    core.receive(Holdings(held=held), PEER, 0.2)
    ((to, news),) = drain(core)
    assert to == PEER
    assert isinstance(news, News)
    assert [(a.device, a.verdict) for a in news.accusations] == [(FAR, "dead")]


def test_own_death_in_holdings_is_contradicted() -> None:
    core = joined(PEER)
    core.receive(Holdings(held=(line_of(core.own, dead=2),)), PEER, 0.1)
    assert core.own.refutations == 3


# Gossip.


def test_news_is_passed_on_a_few_times_and_then_forgotten() -> None:
    core = joined(PEER, THIRD)
    core.receive(News(records=(make_record(FAR),)), PEER, 0.1)
    run_until(core, 9.0, hearing=(PEER, THIRD))
    told = [o for o in core.outgoing() if isinstance(o.message, News) and o.message.records]
    assert len(told) == limits.GOSSIP_REPEATS
    assert {o.to for o in told} == {PEER, THIRD}


def test_small_talk_is_not_passed_on_where_everybody_is_linked() -> None:
    core = joined(PEER, THIRD)
    run_until(core, 2.0, hearing=(PEER, THIRD))
    drain(core)
    core.receive(News(records=(make_record(PEER, version=1, activity="x"),)), PEER, 2.0)
    run_until(core, 4.0, hearing=(PEER, THIRD))
    assert [o for o in core.outgoing() if isinstance(o.message, News)] == []


def test_rumours_of_death_replace_suspicions_and_contradictions_replace_both() -> None:
    rumours = Rumours()
    for by in (PEER, THIRD):
        rumours.add_accusation(accuse(FAR, by=by))
    rumours.add_accusation(accuse(FAR, "dead"))
    assert rumours.take(listeners=1, members=9).accusations == (accuse(FAR, "dead"),)
    back = replace(make_record(FAR, version=1), refutations=1)
    rumours.add_record(back)
    assert rumours.take(listeners=4, members=9) == News(records=(back,))
    assert not rumours


def test_rumours_fill_bounded_messages_least_told_first() -> None:
    rumours = Rumours()
    for count in range(limits.RECORDS_PER_MESSAGE_MAX + 5):
        rumours.add_record(make_record(DeviceId(f"{count:026d}")))
    for count in range(limits.ACCUSATIONS_PER_MESSAGE_MAX + 5):
        rumours.add_accusation(accuse(DeviceId(f"{count:026d}")))
    first, second = (rumours.take(listeners=1, members=9) for _ in range(2))
    assert len(first.records) == len(first.accusations) == 64
    fresh = set(second.records) - set(first.records)
    assert len(fresh) == 5


# Links wanted.


def test_addresses_are_named_while_more_links_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LINK_PEERS_WANTED", 2)
    core = joined(PEER)
    far = make_record(FAR, addresses=("a:1",))
    core.receive(News(records=(far,)), PEER, 0.1)
    learned = AddressLearned(device=FAR, addresses=("a:1",))
    assert core.events() == [learned]
    again = run_until(core, 30.0, hearing=(PEER,))
    assert again.count(learned) == 3
    core.link_up(THIRD, 30.0)
    core.receive(News(records=(make_record(THIRD),)), THIRD, 30.0)
    core.events()
    assert learned not in run_until(core, 60.0, hearing=(PEER, THIRD))


def test_whoever_is_gone_for_longest_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MEMBERS_KNOWN_MAX", 3)
    core = joined(PEER, THIRD)
    dead = News(records=(make_record(FAR),), accusations=(accuse(FAR, "dead"),))
    core.receive(dead, PEER, 0.1)
    core.receive(News(records=(make_record(device(4)),)), PEER, 0.2)
    core.receive(News(records=(make_record(device(5)),)), PEER, 0.3)
    assert [view.device for view in core.members(0.3)] == [PEER, THIRD, device(4)]


def test_link_that_ends_before_its_peer_said_who_it_is_leaves_nothing() -> None:
    core = joined(PEER)
    core.link_up(THIRD, 0.1)
    core.link_down(THIRD, True, 0.2)
    assert [view.device for view in core.members(0.2)] == [PEER]
    assert core.events() == []
