"""The machine of a run as a rule-based machine: any order of messages, ticks, crashes, wishes."""

from __future__ import annotations

import random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from p2ptrain.agreement.run_events import ProposalWanted, StepCommitted, ViewDecided
from p2ptrain.agreement.run_journal import decode_run_record, encode_run_record
from p2ptrain.agreement.run_machine import RunMachine
from p2ptrain.agreement.view import View
from p2ptrain.ids import DeviceId
from p2ptrain.training.step_record import StepRecord, check_consecutive
from tests.sim.plans import device
from tests.sim.run_views import NOTHING, first_view, make_step, next_view

PEERS = tuple(device(index) for index in range(4))
FOUNDERS = PEERS[:3]
peers = st.sampled_from(PEERS)


class OneRun(RuleBasedStateMachine):
    """Three members and one that may join; every message waits until a rule takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.lives = 0.0, 0
        self.disk: dict[DeviceId, list[bytes]] = {peer: [] for peer in PEERS}
        self.wire: list[tuple[DeviceId, DeviceId, object]] = []
        self.wanted: dict[DeviceId, ProposalWanted] = {}
        self.views: dict[int, View] = {}
        self.committed: dict[int, tuple[StepRecord, int]] = {}
        self.machines = {peer: self.begin(peer) for peer in PEERS}
        for founder in FOUNDERS:
            self.machines[founder].found(first_view(*FOUNDERS), 0.0)
            self.drain(founder)

    def begin(self, peer: DeviceId) -> RunMachine:
        self.lives += 1
        rng = random.Random(f"{peer} {self.lives}")
        core = RunMachine(device=peer, rng=rng, inventory=lambda: NOTHING)
        core.restore(map(decode_run_record, self.disk[peer]), self.now)
        self.wanted.pop(peer, None)
        return core

    def drain(self, peer: DeviceId) -> None:
        core = self.machines[peer]
        self.disk[peer] += map(encode_run_record, core.writes())
        self.wire += [(peer, out.to, out.message) for out in core.outgoing()]
        for event in core.events():
            match event:
                case ProposalWanted():
                    self.wanted[peer] = event
                case ViewDecided():
                    self.note_view(event.view)
                case StepCommitted():
                    assert core.view is not None
                    self.note_step(event.record, core.view)

    def note_view(self, view: View) -> None:
        assert self.views.setdefault(view.number, view).digest == view.digest
        for step, (_, number) in self.committed.items():
            assert number >= view.number or step <= view.resume_step, "a committed step is lost"

    def note_step(self, record: StepRecord, view: View) -> None:
        known, _ = self.committed.setdefault(record.step, (record, view.number))
        assert known == record, "a step is committed twice"
        for later in self.views.values():
            assert later.number <= view.number or record.step <= later.resume_step, "not fenced"

    @rule(index=st.integers(0, 1 << 16), keep=st.booleans())
    def deliver(self, index: int, keep: bool) -> None:
        """One message arrives, in any order, perhaps once more later."""
        if self.wire:
            sender, to, message = self.wire[index % len(self.wire)]
            if not keep:
                del self.wire[index % len(self.wire)]
            self.machines[to].receive(message, sender, self.now)
            self.drain(to)

    @rule()
    def deliver_all(self) -> None:
        """Everything that is under way arrives in order; what it causes waits."""
        wire, self.wire = self.wire, []
        for sender, to, message in wire:
            self.machines[to].receive(message, sender, self.now)
            self.drain(to)

    @rule(index=st.integers(0, 1 << 16))
    def lose(self, index: int) -> None:
        if self.wire:
            del self.wire[index % len(self.wire)]

    @rule(seconds=st.floats(0.1, 8.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        for peer, core in self.machines.items():
            core.tick(self.now)
            due = core.deadline()
            assert due is None or due > self.now
            self.drain(peer)

    @rule(peer=peers)
    def complete(self, peer: DeviceId) -> None:
        """The next step's record, as everybody in this view would make it."""
        view = self.machines[peer].view
        if view is not None:
            step = self.machines[peer].statistics().committed_step + 1
            made = make_step(step, loss=float(view.number))
            self.machines[peer].complete(made, self.now, plan=view.plan.digest)
            self.drain(peer)

    @rule(peer=peers)
    def want(self, peer: DeviceId) -> None:
        self.machines[peer].want("somebody is gone", self.now, after_s=0.3)

    @rule(peer=peers, others=st.sets(peers))
    def reach(self, peer: DeviceId, others: set[DeviceId]) -> None:
        self.machines[peer].reachable(frozenset(others), self.now)
        self.drain(peer)

    @rule(peer=peers, members=st.sets(peers, min_size=1))
    def answer(self, peer: DeviceId, members: set[DeviceId]) -> None:
        """The shell proposes any members, or says that it cannot."""
        wanted = self.wanted.pop(peer, None)
        if wanted is not None and len(members) == 1:
            self.machines[peer].cannot_propose("no", self.now, ballot=wanted.ballot)
        elif wanted is not None:
            view = next_view(wanted, *sorted(members), reason=f"{peer[0]} at {self.now}")
            self.machines[peer].propose(view, self.now, ballot=wanted.ballot)
        self.drain(peer)

    @rule(peer=peers, members=st.sets(peers, min_size=2), told=st.booleans())
    def change(self, peer: DeviceId, members: set[DeviceId], told: bool) -> None:
        """A whole change of views without a fault, but perhaps the last messages wait."""
        self.want(peer)
        for _ in range(3):
            self.wait(1.0)
            self.deliver_all()
        self.answer(peer, members)
        self.deliver_all()
        if told:
            self.deliver_all()
            self.deliver_all()

    @rule()
    def commit(self) -> None:
        """Every machine makes the next step of its own view, and all of them hear of it."""
        for peer in PEERS:
            self.complete(peer)
        self.deliver_all()

    @rule(peer=peers, disk=st.sampled_from((True, True, True, False)))
    def restart(self, peer: DeviceId, disk: bool) -> None:
        if not disk:
            self.disk[peer] = []
        elif self.machines[peer].view is not None:
            self.disk[peer] = [encode_run_record(r) for r in self.machines[peer].snapshot()]
        self.machines[peer] = self.begin(peer)

    @invariant()
    def records_are_consecutive_and_of_the_chain(self) -> None:
        for core in self.machines.values():
            check_consecutive(core.records)


TestOneRun = OneRun.TestCase
TestOneRun.settings = settings(
    max_examples=30, stateful_step_count=50, suppress_health_check=[HealthCheck.too_slow]
)
