"""The membership machine, input by input."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from p2ptrain import limits
from p2ptrain.errors import LocalProtocolError, RemoteProtocolError
from p2ptrain.membership.accusation import Accusation
from p2ptrain.membership.events import (
    AddressLearned,
    MemberDown,
    MemberSuspected,
    MemberUp,
    RecordChanged,
    SuspicionCleared,
)
from p2ptrain.membership.machine import Membership
from p2ptrain.membership.messages import Ack, AskFor, Held, Holdings, Linked, News, Ping, Vouch
from p2ptrain.membership.states import TRANSITIONS, Sign, State
from p2ptrain.wire.codec import decode, encode
from tests.sim.plans import device, make_record

ME, PEER, THIRD = device(0), device(1), device(2)
ACCUSATION = Accusation(
    device=PEER, incarnation=1, refutations=0, verdict="suspect", kind="silent", accuser=THIRD
)


def machine() -> Membership:
    return Membership(own=make_record(ME), rng=random.Random(1))


def joined(now: float = 0.0) -> Membership:
    """A machine whose one peer is alive at `now`."""
    core = machine()
    core.link_up(PEER, now)
    core.receive(News(records=(make_record(PEER),)), PEER, now)
    core.outgoing()
    core.events()
    return core


def state_of(core: Membership, now: float = 0.0) -> State:
    return core.members(now)[0].state


def run_until(core: Membership, end: float) -> list[object]:
    """Tick at each deadline up to `end`; gives the events."""
    seen: list[object] = []
    while (due := core.deadline()) is not None and due <= end:
        core.tick(due)
        seen += core.events()
    return seen


def test_transitions_name_every_state_and_sign() -> None:
    assert set(TRANSITIONS) == set(itertools.product(State, Sign))


def test_link_up_sends_records_and_a_probe() -> None:
    core = machine()
    core.link_up(PEER, 0.0)
    messages = [out.message for out in core.outgoing()]
    assert messages == [News(records=(make_record(ME),)), Ping(sequence=1)]
    assert core.events() == []
    assert state_of(core) is State.HEARD_OF


def test_first_record_of_a_linked_peer_brings_it_up() -> None:
    core = machine()
    core.link_up(PEER, 0.0)
    core.receive(News(records=(make_record(PEER),)), PEER, 0.1)
    assert core.events() == [MemberUp(record=make_record(PEER))]
    assert core.alive() == (PEER,)


def test_lost_first_records_are_made_good_by_the_ack() -> None:
    core = machine()
    core.link_up(PEER, 0.0)
    core.receive(Ack(sequence=1, record=make_record(PEER)), PEER, 0.1)
    assert core.events() == [MemberUp(record=make_record(PEER))]


def test_ping_is_answered_with_the_own_record_only_when_it_is_news() -> None:
    core = joined()
    core.receive(Ping(sequence=7), PEER, 0.2)
    core.receive(Ping(sequence=8, incarnation=1, version=0), PEER, 0.3)
    assert [out.message for out in core.outgoing()] == [
        Ack(sequence=7, record=make_record(ME)),
        Ack(sequence=8),
    ]


def test_silent_peer_is_suspected_then_dead_within_bounds() -> None:
    core = joined()
    events = run_until(core, 8.0)
    assert events == [
        MemberSuspected(device=PEER, reason="silent for 2.5 s"),
        MemberDown(device=PEER, reason="silent for 5.5 s", kind="silent"),
    ]
    view = core.members(8.0)[0]
    assert (view.state, view.reason, view.last_heard_s) == (State.DEAD, "silent for 5.5 s", 8.0)
    assert (view.state_s, view.linked, view.round_trip_s) == (2.5, True, None)


def test_answer_clears_suspicion() -> None:
    core = joined()
    run_until(core, 3.0)
    assert state_of(core) is State.SUSPECT
    assert core.alive() == (PEER,)
    core.receive(Ping(sequence=1), PEER, 3.0)
    assert core.events() == [SuspicionCleared(device=PEER)]


def test_any_traffic_counts_as_an_answer() -> None:
    core = joined()
    for second in range(1, 12):
        assert run_until(core, float(second)) == []
        core.heard(PEER, float(second))
    assert state_of(core) is State.ALIVE


def test_refused_redial_is_death_at_once() -> None:
    core = joined()
    core.link_down(PEER, False, 1.0)
    assert core.events() == [MemberSuspected(device=PEER, reason="its link broke")]
    core.link_down(PEER, True, 1.1)
    (down,) = core.events()
    assert isinstance(down, MemberDown)
    assert down.kind == "refused"
    assert core.alive() == ()


def test_broken_link_without_refusal_dies_of_silence() -> None:
    core = joined()
    core.link_down(PEER, False, 1.0)
    core.events()
    assert run_until(core, 5.49) == []
    (down,) = run_until(core, 5.51)
    assert isinstance(down, MemberDown)
    assert down.kind == "silent"


def test_dead_peer_that_answers_again_is_up_again() -> None:
    core = joined()
    run_until(core, 6.0)
    core.receive(Ping(sequence=9), PEER, 30.0)
    assert core.events() == [MemberUp(record=make_record(PEER))]


def test_dead_peer_with_a_link_is_still_asked_now_and_then() -> None:
    core = joined()
    run_until(core, 6.0)
    core.outgoing()
    run_until(core, 26.0)
    pings = [out for out in core.outgoing() if isinstance(out.message, Ping)]
    assert 3 <= len(pings) <= 5


def test_late_message_of_a_closed_link_is_dropped() -> None:
    core = joined()
    core.link_down(PEER, True, 1.0)
    core.events()
    core.receive(Ping(sequence=1), PEER, 1.1)
    assert core.events() == []
    assert core.outgoing() == []


def test_own_lag_is_not_held_against_others() -> None:
    core = joined()
    due = core.deadline()
    assert due is not None
    core.lag(30.0 - due, 30.0)
    core.tick(30.0)
    assert core.events() == []
    assert state_of(core) is State.ALIVE


def test_peer_that_is_always_a_little_late_still_ends_its_waits() -> None:
    core = joined()
    for tenth in range(1, 101):
        now = tenth / 10
        core.lag(0.1, now)
        core.tick(now)
    assert state_of(core) is State.DEAD
    assert core.statistics().timeout_scale == pytest.approx(1.1)


def test_lag_stretches_the_timeouts_and_wears_off() -> None:
    core = joined()
    core.lag(1.0, 0.0)
    assert [type(e) for e in run_until(core, 8.8)] == [MemberSuspected]
    assert [type(e) for e in run_until(core, 9.0)] == [MemberDown]
    rested = joined()
    rested.lag(1.0, 0.0)
    for second in range(1, 61):
        run_until(rested, float(second))
        rested.heard(PEER, float(second))
    assert [type(e) for e in run_until(rested, 65.7)] == [MemberSuspected, MemberDown]


def test_statistics_count_probes_and_deaths() -> None:
    core = joined()
    core.lag(0.5, 0.0)
    busy = core.statistics()
    assert (busy.alive_count, busy.probe_count, busy.timeout_scale) == (1, 1, 1.5)
    run_until(core, 60.0)
    core.lag(0.01, 60.0)  # too little to notice
    dead = core.statistics()
    assert (dead.alive_count, dead.dead_count, dead.death_count) == (0, 1, 1)
    assert dead.timeout_scale == 1.0
    assert dead.probe_count > 5


def test_restart_of_a_peer_is_a_down_and_an_up() -> None:
    core = joined()
    again = make_record(PEER, incarnation=2)
    core.receive(News(records=(again,)), PEER, 1.0)
    assert core.events() == [
        MemberDown(device=PEER, reason="it restarted", kind="restarted"),
        MemberUp(record=again),
    ]


def test_changed_record_is_told_and_an_old_one_ignored() -> None:
    core = joined()
    newer = make_record(PEER, version=3, activity="training")
    core.receive(News(records=(newer, make_record(PEER, version=2))), PEER, 1.0)
    assert core.events() == [RecordChanged(record=newer)]
    assert core.record_of(PEER) == newer


def test_record_of_a_stranger_is_an_address_to_dial() -> None:
    core = joined()
    stranger = make_record(THIRD, addresses=("10.0.0.3:4711",))
    core.receive(News(records=(stranger,)), PEER, 1.0)
    core.receive(News(records=(stranger,)), PEER, 2.0)
    assert core.events() == [AddressLearned(device=THIRD, addresses=("10.0.0.3:4711",))]
    view = core.members(2.0)[1]
    assert (view.state, view.reason) == (State.ALIVE, "through others, no link")
    assert core.alive() == (PEER,)


def test_update_own_raises_the_version_and_tells_linked_peers() -> None:
    core = joined()
    changed = core.update_own(activity="stage 1 of 3")
    assert (changed.version, core.own) == (1, changed)
    assert [out.message for out in core.outgoing()] == [News(records=(changed,))]
    assert core.update_own(activity="stage 1 of 3") is changed
    assert core.outgoing() == []


def test_update_own_refuses_what_others_would_refuse() -> None:
    core = machine()
    with pytest.raises(LocalProtocolError, match="larger than"):
        core.update_own(addresses=tuple("a" * 250 + str(i) for i in range(16)))
    assert core.own.version == 0


def test_peer_restarted_with_a_slow_clock_is_shown_its_old_record() -> None:
    core = joined()
    core.link_down(PEER, False, 1.0)
    core.link_up(PEER, 2.0)
    (shown,) = [out.message for out in core.outgoing() if isinstance(out.message, Holdings)]
    assert [line.device for line in shown.held] == [ME, PEER]
    again = Membership(own=make_record(PEER, incarnation=0), rng=random.Random(2))
    again.link_up(ME, 2.0)
    again.receive(shown, ME, 2.1)
    assert again.own.incarnation == 2


def test_rumour_from_an_earlier_life_is_outrun() -> None:
    core = joined()
    rumour = make_record(ME, incarnation=50, version=9, activity="ghost")
    core.receive(News(records=(rumour,)), PEER, 1.0)
    assert core.own == replace(make_record(ME), incarnation=51, version=0)
    assert [out.message for out in core.outgoing()] == [News(records=(core.own,))]


@pytest.mark.parametrize(
    "record",
    [
        replace(make_record(PEER, version=1), device="../../etc/passwd"),
        make_record(PEER, incarnation=-1 + limits.INCARNATION_MAX * 2),
        make_record(PEER, version=1, addresses=tuple("a" * 250 for _ in range(16))),
        make_record(ME, incarnation=limits.INCARNATION_MAX),
    ],
)
def test_malformed_records_break_the_protocol(record: object) -> None:
    core = joined()
    with pytest.raises(RemoteProtocolError):
        core.receive(News(records=(record,)), PEER, 1.0)  # type: ignore[arg-type]
    assert core.own == make_record(ME)
    assert core.record_of(PEER) == make_record(PEER)


def test_ack_with_another_devices_record_breaks_the_protocol() -> None:
    core = joined()
    with pytest.raises(RemoteProtocolError, match="another device"):
        core.receive(Ack(sequence=1, record=make_record(THIRD)), PEER, 1.0)


def test_foreign_message_is_our_own_mistake() -> None:
    with pytest.raises(LocalProtocolError, match="no membership message"):
        joined().receive("hello", PEER, 1.0)


def test_number_of_known_devices_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MEMBERS_KNOWN_MAX", 2)
    core = joined()
    core.receive(News(records=tuple(make_record(device(i)) for i in range(2, 9))), PEER, 1.0)
    assert len(core.members(1.0)) == 2


def test_slow_link_gets_a_longer_probe_timeout() -> None:
    core = machine()
    core.link_up(PEER, 0.0)
    core.receive(Ack(sequence=1, record=make_record(PEER)), PEER, 0.6)
    core.events()
    # Asked at 1 s; four round trips would be 2.4 s, the longest is 2 s, directly and indirectly.
    assert run_until(core, 4.99) == []
    assert [type(e) for e in run_until(core, 5.01)] == [MemberSuspected]


def test_idle_machine_without_links_has_no_deadline() -> None:
    core = machine()
    assert core.deadline() is None
    core.tick(1.0)
    core.link_down(PEER, True, 2.0)
    assert (core.outgoing(), core.events(), core.writes()) == ([], [], ())


def test_machine_refuses_a_link_to_itself() -> None:
    with pytest.raises(LocalProtocolError, match="itself"):
        machine().link_up(ME, 0.0)


@pytest.mark.parametrize(
    "message",
    [
        Ping(sequence=3, incarnation=4, version=5),
        Ack(sequence=3, record=make_record(PEER)),
        News(records=(make_record(ME), make_record(PEER)), accusations=(ACCUSATION,)),
        AskFor(sequence=3, target=PEER),
        Vouch(sequence=3, target=PEER),
        Linked(devices=(ME, PEER)),
        Holdings(
            held=(
                Held(device=PEER, incarnation=1, version=2, content=3, dead=4),
                Held(device=ME, incarnation=1, version=2, content=3),
            ),
            reply_wanted=True,
        ),
    ],
)
def test_messages_survive_the_wire(message: object) -> None:
    assert decode(encode(message)) == message


def test_messages_are_bounded() -> None:
    with pytest.raises(ValueError, match="too many records"):
        News(records=(make_record(ME),) * (limits.RECORDS_PER_MESSAGE_MAX + 1))
    with pytest.raises(ValueError, match="too many accusations"):
        News(accusations=(ACCUSATION,) * (limits.ACCUSATIONS_PER_MESSAGE_MAX + 1))
    with pytest.raises(ValueError, match="too many links"):
        Linked(devices=(ME,) * (limits.LINK_PEERS_MAX + 1))
    line = Held(device=ME, incarnation=1, version=2, content=3)
    with pytest.raises(ValueError, match="too many members"):
        Holdings(held=(line,) * (limits.MEMBERS_KNOWN_MAX + 2))


def test_whole_holdings_fit_into_a_message() -> None:
    line = Held(device=PEER, incarnation=1 << 40, version=1 << 20, content=1 << 31, dead=9)
    body = encode(Holdings(held=(line,) * (limits.MEMBERS_KNOWN_MAX + 1)))
    assert len(body) <= limits.CONTROL_BODY_BYTES_MAX
