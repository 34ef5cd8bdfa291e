"""The machine of one run, input by input and among a few others over a plain network."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

import pytest

from p2ptrain import limits
from p2ptrain.agreement.ballot import Ballot
from p2ptrain.agreement.run_events import (
    Fenced,
    Paused,
    ProposalWanted,
    RunEvent,
    Stance,
    StepCommitted,
    Unpaused,
    ViewDecided,
)
from p2ptrain.agreement.run_journal import (
    AcceptanceRecord,
    StepsRecord,
    decode_run_record,
    encode_run_record,
)
from p2ptrain.agreement.run_machine import RunMachine
from p2ptrain.agreement.run_memory import Memory
from p2ptrain.agreement.run_messages import (
    DecidedView,
    StepRecorded,
    ViewAccept,
    ViewHead,
    ViewPrepare,
    run_of,
)
from p2ptrain.agreement.view import View
from p2ptrain.errors import LocalProtocolError, RemoteProtocolError
from p2ptrain.ids import DeviceId
from p2ptrain.wire.codec import decode, encode
from tests.sim.plans import RUN, device
from tests.sim.run_views import NOTHING, first_view, make_step, next_view

A, B, C, D = (device(index) for index in range(4))
SOME = Memory(journal=1, start=1, count=0)


class Net:
    """A few machines, perfect links between whoever is connected, and each one's journal."""

    def __init__(self, *devices: DeviceId, view: View | None = None) -> None:
        self.now, self.lives = 0.0, 0
        self.machines: dict[DeviceId, RunMachine] = {}
        self.disk: dict[DeviceId, list[bytes]] = {each: [] for each in devices}
        self.told: dict[DeviceId, list[RunEvent]] = {each: [] for each in devices}
        self.wire: deque[tuple[DeviceId, DeviceId, object]] = deque()
        self.cut: set[DeviceId] = set()
        self.slow: set[DeviceId] = set()  # keep steps in memory from their next start on
        for each in devices:
            self.start(each)
        if view is not None:
            for member in view.members:
                self.machines[member].found(view, 0.0)
            self.settle()

    def start(self, owner: DeviceId) -> RunMachine:
        self.lives += 1
        rng = random.Random(f"{owner} {self.lives}")
        slow = owner in self.slow
        core = RunMachine(device=owner, rng=rng, inventory=lambda: NOTHING, volatile=slow)
        core.restore(map(decode_run_record, self.disk[owner]), self.now)
        self.machines[owner] = core
        return core

    def settle(self) -> None:
        """Drive everybody until nobody has anything more to say."""
        busy = True
        while busy:
            busy = sum(self._drain(each) for each in self.machines) > 0
            while self.wire:
                sender, to, message = self.wire.popleft()
                if sender not in self.cut and to not in self.cut and to in self.machines:
                    self.machines[to].receive(decode(encode(message)), sender, self.now)
                busy = True

    def _drain(self, owner: DeviceId) -> bool:
        core = self.machines[owner]
        writes, sends, events = core.writes(), core.outgoing(), core.events()
        kept = [w for w in writes if not (owner in self.slow and isinstance(w, StepsRecord))]
        self.disk[owner] += map(encode_run_record, kept)
        self.wire += [(owner, out.to, out.message) for out in sends]
        self.told[owner] += events
        return bool(writes or sends or events)

    def see(self, *devices: DeviceId) -> None:
        """Exactly these can talk to each other from now on."""
        self.cut = set(self.machines) - set(devices)
        for each in self.machines:
            others = set(devices) if each in devices else set()
            self.machines[each].reachable(frozenset(others), self.now)
        self.settle()

    def wait(self, seconds: float) -> None:
        end = self.now + seconds
        while (at := self._next()) is not None and at <= end:
            self.now = max(self.now, at)
            for core in self.machines.values():
                core.tick(self.now)
                due = core.deadline()
                assert due is None or due > self.now, "a machine did not move its deadline"
            self.settle()
        self.now = end

    def _next(self) -> float | None:
        times = [core.deadline() for core in self.machines.values()]
        return min((at for at in times if at is not None), default=None)

    def last(self, owner: DeviceId, kind: type) -> RunEvent | None:
        return next((e for e in reversed(self.told[owner]) if isinstance(e, kind)), None)

    def wanted(self, owner: DeviceId) -> ProposalWanted:
        event = self.last(owner, ProposalWanted)
        assert isinstance(event, ProposalWanted), f"{owner[0]} is not asked to plan"
        return event

    def propose(self, owner: DeviceId, *members: DeviceId, reason: str = "") -> View:
        wanted = self.wanted(owner)
        view = next_view(wanted, *members, reason=reason)
        self.machines[owner].propose(view, self.now, ballot=wanted.ballot)
        self.settle()
        return view

    def present(self, owner: DeviceId) -> View:
        view = self.machines[owner].view
        assert view is not None
        return view

    def complete(self, step: int, *devices: DeviceId) -> None:
        for each in devices:
            plan = self.present(each).plan.digest
            self.machines[each].complete(make_step(step), self.now, plan=plan)
        self.settle()

    def committed(self, owner: DeviceId) -> list[int]:
        return [e.record.step for e in self.told[owner] if isinstance(e, StepCommitted)]

    def views(self) -> list[int]:
        return [core.view.number if core.view else 0 for core in self.machines.values()]


def three(home: DeviceId = A) -> Net:
    net = Net(A, B, C, view=first_view(A, B, C, home=home))
    net.see(A, B, C)
    return net


def lose(net: Net, gone: DeviceId) -> None:
    """One device is gone for sure, and everybody else wants a new view."""
    left = [each for each in net.machines if each != gone]
    net.see(*left)
    for each in left:
        net.machines[each].want(f"{gone[0]} is gone", net.now, after_s=0.3)


def test_view_change_takes_the_home_peer_then_a_quorum_and_reaches_everybody() -> None:
    net = three()
    lose(net, C)
    net.wait(0.5)
    wanted = net.wanted(A)
    assert [each.device for each in wanted.promises] == [A, B]
    assert (wanted.number, wanted.resume_step) == (2, 0)
    assert net.last(B, ProposalWanted) is None  # home went first
    view = net.propose(A, A, B)
    assert net.views() == [2, 2, 1]
    decided = net.machines[A].view
    assert decided is not None
    assert decided.plan == view.plan
    assert net.last(B, ViewDecided) == ViewDecided(view=decided)
    assert all(decided.journals)
    net.see(A, B, C)  # whoever was away adopts the chain
    assert net.views() == [2, 2, 2]
    assert net.machines[C].standing.stance is Stance.OUTSIDER


def test_next_in_rank_proposes_when_home_is_gone() -> None:
    net = three(home=A)
    lose(net, A)
    net.wait(2.0)
    net.propose(B, B, C)
    assert net.views() == [1, 2, 2]


def test_promise_fences_steps_and_tells_the_newest_record() -> None:
    net = three()
    net.complete(1, A, B, C)
    net.cut = {A, C}
    made_in = net.present(B).plan.digest
    net.machines[B].complete(make_step(2), 0.0, plan=made_in)  # durable at B, heard by nobody
    net.settle()
    lose(net, C)
    net.wait(0.5)
    assert net.wanted(A).resume_step == 2
    assert net.wanted(A).records == (make_step(1), make_step(2))
    assert net.machines[A].promised
    assert isinstance(net.last(A, Fenced), Fenced)
    net.complete(2, A)
    assert net.committed(A) == [1]
    view = net.propose(A, A, B)
    assert (view.resume_step, net.machines[A].records[-1]) == (2, make_step(2))
    net.complete(3, A, B)
    assert net.committed(A) == [1, 3]  # step 2 came with the view


def test_step_of_the_view_before_is_not_recorded_when_the_next_has_begun() -> None:
    """Its last `done` may come when the shell has not yet left the old view's work."""
    net = three()
    net.complete(1, A, B, C)
    made_in = net.present(A).plan.digest
    lose(net, C)
    net.wait(0.5)
    net.propose(A, A, B)
    for owner in (A, B):
        net.machines[owner].complete(make_step(2), net.now, plan=made_in)
    net.settle()
    assert net.machines[A].records == (make_step(1),)
    assert net.committed(A) == [1]


def test_record_that_no_quorum_saw_is_forgotten_by_a_view_that_leaves_it_out() -> None:
    net = three()
    net.complete(1, A, B, C)
    net.cut = {A, B}
    made_in = net.present(C).plan.digest
    net.machines[C].complete(make_step(2, loss=9.0), 0.0, plan=made_in)
    lose(net, C)
    net.wait(0.5)
    net.propose(A, A, B, C)
    net.see(A, B, C)
    assert net.machines[C].records == (make_step(1),)
    net.complete(2, A, B, C)
    assert net.machines[C].records[-1] == make_step(2)
    assert net.start(C).records[-1] == make_step(2)  # and so says its journal


def test_accepted_value_of_a_dead_proposer_is_adopted() -> None:
    net = three()
    lose(net, C)
    net.wait(0.5)
    wanted = net.wanted(A)
    view = next_view(wanted, A, B, reason="from a")
    net.machines[A].propose(view, net.now, ballot=wanted.ballot)
    accept = next(o for o in net.machines[A].outgoing() if isinstance(o.message, ViewAccept))
    net.machines[B].receive(accept.message, A, net.now)
    net.settle()
    del net.machines[A]
    net.see(B, C)
    net.wait(12.0)
    assert net.last(B, ProposalWanted) is None
    adopted = net.machines[B].view
    assert adopted is not None
    assert adopted.plan == view.plan
    assert net.machines[C].view == adopted


def test_promise_without_a_decision_makes_the_member_propose() -> None:
    net = three()
    lose(net, C)
    net.wait(0.5)
    assert net.wanted(A)
    del net.machines[A]
    net.see(B, C)
    net.wait(4.0)
    assert net.last(B, ProposalWanted) is None
    assert net.last(C, ProposalWanted) is None
    net.wait(8.0)
    proposer = B if net.last(B, ProposalWanted) else C
    net.propose(proposer, B, C)
    assert net.machines[B].view == net.machines[C].view
    assert net.views() == [2, 2]


def test_proposer_that_still_plans_is_not_overtaken() -> None:
    net = three()
    lose(net, C)
    net.wait(20.0)
    assert net.last(B, ProposalWanted) is None
    net.propose(A, A, B)
    assert net.views() == [2, 2, 1]


def test_slow_promise_of_a_stage_is_waited_for_while_its_device_is_reachable() -> None:
    net = three()
    net.cut = {B}  # silent, but nobody has noticed
    net.machines[A].want("d joined", 0.0, after_s=0.3)
    net.wait(0.3 + limits.GATHER_STAGE_S - 0.1)
    assert net.last(A, ProposalWanted) is None
    net.machines[A].reachable(frozenset({C}), net.now)  # now somebody has
    net.settle()
    assert [each.device for each in net.wanted(A).promises] == [A, C]


def test_want_waits_for_stability_and_can_be_taken_back() -> None:
    net = three()
    net.machines[A].want("b is silent", 0.0, after_s=1.0)
    net.machines[A].want("b is gone", 0.5, after_s=0.3)
    net.wait(0.9)
    assert net.last(A, ProposalWanted) is None
    assert net.machines[A].wanted == ("b is silent", "b is gone")
    net.machines[A].unwant(net.now)
    net.wait(20.0)
    assert net.views() == [1, 1, 1]
    assert net.last(A, ProposalWanted) is None


def test_side_without_a_quorum_pauses_names_who_is_missing_and_comes_back() -> None:
    net = three()
    net.see(A, B)
    assert net.machines[A].standing.stance is Stance.MEMBER
    standing = net.machines[C].standing
    assert standing.stance is Stance.PAUSED
    assert standing.reason == f"no quorum (1 of 3: {A[:8]}, {B[:8]} missing)"
    assert net.last(C, Paused) == Paused(reason=standing.reason, missing=(A, B))
    net.machines[C].want("others are gone", net.now, after_s=0.3)
    net.wait(30.0)
    assert net.machines[C].statistics().ballot_count == 0
    net.see(A, B, C)
    assert isinstance(net.last(C, Unpaused), Unpaused)


def test_of_two_members_home_goes_on_alone_and_the_other_pauses() -> None:
    net = Net(A, B, view=first_view(A, B, home=A))
    net.see()
    assert net.machines[A].standing.stance is Stance.MEMBER
    assert net.machines[B].standing.stance is Stance.PAUSED
    net.machines[A].want("b is gone", net.now, after_s=0.3)
    net.wait(1.0)
    net.propose(A, A)
    assert net.views() == [2, 1]
    net.complete(1, A)
    assert net.committed(A) == [1]


def test_unrecoverable_loss_pauses_and_is_tried_again_when_somebody_returns() -> None:
    net = three()
    lose(net, C)
    net.wait(0.5)
    wanted = net.wanted(A)
    net.machines[A].cannot_propose("segments 4 to 6 are with c", net.now, ballot=wanted.ballot)
    net.settle()
    assert net.machines[A].standing.reason == "segments 4 to 6 are with c"
    assert net.last(A, Paused) == Paused(reason="segments 4 to 6 are with c", missing=())
    assert net.last(B, Paused) == net.last(A, Paused)  # everybody's status says why, at once
    net.wait(limits.HINDERED_RETRY_S * 2)
    assert net.last(B, Paused) == net.last(A, Paused)
    wanted = net.wanted(A)
    net.machines[A].cannot_propose("segments 4 to 6 are with c", net.now, ballot=wanted.ballot)
    net.settle()
    net.see(A, B, C)
    net.wait(1.0)
    again = net.wanted(A)
    assert again.ballot > wanted.ballot
    assert [each.device for each in again.promises] == [A, B, C]
    net.machines[A].propose(next_view(wanted, A, B), net.now, ballot=wanted.ballot)  # too late
    assert net.views() == [1, 1, 1]
    net.propose(A, A, B, C)
    assert net.views() == [2, 2, 2]
    assert net.machines[A].standing.stance is Stance.MEMBER


def test_lone_member_decides_and_commits_by_itself() -> None:
    net = Net(A, view=first_view(A))
    net.complete(1, A)
    assert net.committed(A) == [1]
    net.machines[A].want("d joined", 0.0, after_s=0.3)
    net.wait(1.0)
    net.propose(A, A)
    assert net.views() == [2]


def test_restart_remembers_views_promises_acceptances_and_records() -> None:
    net = three()
    net.complete(1, A, B, C)
    lose(net, C)
    net.wait(0.5)
    wanted = net.wanted(A)
    net.machines[A].propose(next_view(wanted, A, B), net.now, ballot=wanted.ballot)
    net.cut = {A}
    net.settle()
    again = net.start(A)
    assert again.promised
    assert again.records == (make_step(1),)
    assert again.view == first_view(A, B, C)
    lines = [encode_run_record(record) for record in again.snapshot()]
    net.disk[A] = lines + lines[:1]  # a compacted journal, with a line told twice
    assert again.deadline() is not None  # it tells others where it stands, and is patient
    assert net.start(A).snapshot()[:-1] == again.snapshot()[:-1]  # the last line counts starts
    held = net.machines[A].snapshot()[-2]
    assert isinstance(held, AcceptanceRecord)
    assert held.value.plan == next_view(wanted, A, B).plan


def test_member_that_lost_its_disk_has_no_vote_until_the_next_view() -> None:
    net = three()
    net.complete(1, A, B, C)
    net.disk[B] = []
    net.start(B)
    net.see()
    net.see(A, B, C)
    assert net.machines[B].standing.stance is Stance.ABSTAINING
    net.cut = {C}
    net.complete(2, A, B)
    assert net.committed(A) == [1]  # B's record does not count
    lose(net, C)
    net.wait(3.0)
    assert net.last(A, ProposalWanted) is None  # nor its promise
    net.see(A, B, C)
    net.wait(8.0)
    proposer = A if net.last(A, ProposalWanted) else C
    assert B in [each.device for each in net.wanted(proposer).promises]  # what it holds counts
    net.propose(proposer, A, B, C)
    assert net.views() == [2, 2, 2]
    assert net.machines[B].standing.stance is Stance.MEMBER
    again = net.start(B)
    assert again.standing.stance is Stance.MEMBER
    assert again.deadline() is not None  # it goes on telling others where it stands


def test_lost_memory_is_not_given_back_by_hearing_of_an_older_view_first() -> None:
    net = three()
    lose(net, C)
    net.wait(0.5)
    net.propose(A, A, B)  # B votes in view 2 from now on
    net.disk[B] = []
    net.start(B)
    net.see(B, C)  # C still goes by view 1
    assert net.views() == [2, 1, 1]
    assert net.machines[B].standing.stance is Stance.ABSTAINING
    net.see(A, B)
    assert net.machines[B].view == net.machines[A].view
    assert net.machines[B].standing.stance is Stance.ABSTAINING
    net.wait(limits.HEAD_INTERVAL_S + limits.MEMORY_LOST_WAIT_S + 1.0)
    assert net.wanted(A).number == 3  # asked for by the member's own head
    net.propose(A, A, B)
    assert net.machines[B].standing.stance is Stance.MEMBER


def test_joiner_learns_the_present_view_and_is_a_full_member_of_the_next() -> None:
    net = Net(A, B, D, view=first_view(A, B))
    net.see(A, B, D)
    assert net.machines[D].standing.stance is Stance.OUTSIDER
    net.machines[A].want("d joined", 0.0, after_s=0.3)
    net.wait(1.0)
    net.propose(A, A, B, D)
    assert net.machines[D].standing.stance is Stance.MEMBER
    net.complete(1, A, D)
    assert net.committed(B) == [1]


def test_forced_lineage_wins_over_a_higher_view_of_the_old_one() -> None:
    net = three()
    lose(net, C)
    net.wait(0.5)
    net.propose(A, A, B)
    forced = first_view(B, C, lineage=1)
    net.machines[C].force(forced, net.now)
    net.see(A, B, C)
    view = net.machines[C].view
    assert view is not None
    assert view.plan == forced.plan
    assert all(core.view == view for core in net.machines.values())
    assert net.machines[B].standing.stance is Stance.MEMBER
    net.complete(1, B)
    assert net.committed(B) == [1]
    for begin in (net.machines[C].found, net.machines[C].force):
        with pytest.raises(LocalProtocolError, match="founded already"):
            begin(first_view(C, lineage=1), net.now)
    net.machines[C].found(first_view(A, B, C), net.now)  # an old one changes nothing
    assert net.machines[C].view == view


def test_lost_acknowledgements_are_asked_for_again() -> None:
    net = three()
    net.cut = {A, B, C}
    net.complete(1, A, B, C)
    net.cut = set()
    assert net.committed(A) == []
    net.wait(1.0)
    assert [net.committed(each) for each in (A, B, C)] == [[1], [1], [1]]


def test_member_that_missed_many_steps_catches_up_in_order() -> None:
    net = three()
    net.cut = {C}
    for step in range(1, 6):
        net.complete(step, A, B)
    net.cut = set()
    net.wait(limits.HEAD_INTERVAL_S * 2)
    assert net.committed(C) == [1, 2, 3, 4, 5]


def test_forgotten_records_are_skipped_by_a_member_that_missed_them() -> None:
    net = three()
    net.cut = {C}
    for step in range(1, 6):
        net.complete(step, A, B)
    for each in (A, B):
        net.machines[each].forget_before(4)
    assert [r.step for r in net.machines[A].records] == [4, 5]
    net.machines[A].forget_before(9)
    assert [r.step for r in net.machines[A].records] == [5]  # promises must tell the newest
    net.cut = set()
    net.wait(limits.HEAD_INTERVAL_S * 2)
    assert net.committed(C)[-1] == 5


REMOTE: dict[str, Callable[[Net], object]] = {
    "ballot of another device": lambda net: ViewPrepare(
        **_place(net), ballot=Ballot(round=1, device=C)
    ),
    "view that goes back": lambda net: ViewAccept(
        **_place(net), ballot=Ballot(round=1, device=B), value=first_view(A, B, C)
    ),
    "another view of the same number": lambda net: DecidedView(value=first_view(A, B)),
    "another head of the same number": lambda net: ViewHead(
        **{**_place(net), "plan": first_view(A, B).plan.digest},
        newest_step=0,
        memory=SOME,
        votes=True,
    ),
    "another record of a step": lambda net: StepRecorded(
        **_place(net), records=(make_step(1, loss=7.0),), since=1, after=None, memory=SOME
    ),
    "a view of nobody's chain": lambda net: DecidedView(value=_stranger()),
}


def _place(net: Net) -> dict[str, object]:
    view = net.machines[A].view
    assert view is not None
    return {
        "run": RUN, "lineage": view.lineage, "view": view.number, "plan": view.plan.digest,
    }  # fmt: skip


def _stranger() -> View:
    base = first_view(A, B)
    wanted = ProposalWanted(
        ballot=Ballot(round=1, device=A), number=2, base=base, promises=(), records=(),  # type: ignore[arg-type]
        resume_step=0,
    )  # fmt: skip
    return next_view(wanted, A, B)


@pytest.mark.parametrize("name", REMOTE)
def test_impossible_message_is_the_senders_fault(name: str) -> None:
    net = three()
    net.complete(1, A, B, C)
    with pytest.raises(RemoteProtocolError):
        net.machines[A].receive(REMOTE[name](net), B, 0.0)


def test_message_of_a_stranger_and_of_another_machine_are_refused() -> None:
    net = three()
    prepare = ViewPrepare(**_place(net), ballot=Ballot(round=1, device=D))  # type: ignore[arg-type]
    with pytest.raises(RemoteProtocolError, match="not a member"):
        net.machines[A].receive(prepare, D, 0.0)
    with pytest.raises(LocalProtocolError, match="no message of a run"):
        net.machines[A].receive(object(), B, 0.0)
    assert run_of(prepare) == run_of(DecidedView(value=first_view(A))) == RUN


def test_proposal_that_does_not_follow_is_refused() -> None:
    net = three()
    lose(net, C)
    net.wait(0.5)
    wanted = net.wanted(A)
    for wrong in (first_view(A, B), next_view(wanted, A, B, reason="x" * limits.VIEW_BYTES_MAX)):
        with pytest.raises(LocalProtocolError, match="cannot be proposed"):
            net.machines[A].propose(wrong, net.now, ballot=wanted.ballot)
