"""Gossip as a rule-based machine: whatever order and company, everybody ends with the same."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
)

from p2ptrain.ids import DeviceId
from p2ptrain.membership.machine import Membership
from p2ptrain.membership.merge import is_newer
from p2ptrain.membership.messages import Holdings
from p2ptrain.membership.record import MemberRecord
from p2ptrain.wire.codec import decode, encode
from tests.sim.plans import device, make_record

PEERS = tuple(device(i) for i in range(4))
records = st.builds(
    make_record,
    st.sampled_from(PEERS),
    incarnation=st.integers(0, 3),
    version=st.integers(0, 2),
    activity=st.sampled_from(("idle", "training", "leaving")),
)


def fold(found: list[MemberRecord]) -> dict[DeviceId, MemberRecord]:
    held: dict[DeviceId, MemberRecord] = {}
    for record in found:
        if is_newer(record, held.get(record.device)):
            held[record.device] = record
    return held


@given(st.lists(records, max_size=12), st.randoms(use_true_random=False))
def test_merge_ignores_order_and_repetition(found: list[MemberRecord], rng: random.Random) -> None:
    shuffled = found + [rng.choice(found) for _ in range(3) if found]
    rng.shuffle(shuffled)
    assert fold(shuffled) == fold(found)


@given(records, records, records)
def test_newer_is_a_strict_order(a: MemberRecord, b: MemberRecord, c: MemberRecord) -> None:
    assert not is_newer(a, a)
    if a.device == b.device == c.device:
        assert (a == b) + is_newer(a, b) + is_newer(b, a) == 1
        if is_newer(a, b) and is_newer(b, c):
            assert is_newer(a, c)


class Gossip(RuleBasedStateMachine):
    """Linked peers change their own records, push what they hold, and mails go astray."""

    mails = Bundle("mails")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.peers: dict[DeviceId, Membership] = {}
        self.authored: dict[DeviceId, list[MemberRecord]] = {p: [] for p in PEERS}
        for who in PEERS:
            self._start(who, incarnation=5)

    def _start(self, who: DeviceId, *, incarnation: int) -> None:
        own = make_record(who, incarnation=incarnation)
        self.peers[who] = Membership(own=own, rng=random.Random(1))
        self.authored[who].append(own)
        for other in PEERS:
            if other != who:
                self.peers[who].link_up(other, self.now)
        self._drain(who)

    def _drain(self, who: DeviceId) -> list[tuple[DeviceId, DeviceId, bytes]]:
        core = self.peers[who]
        core.events()
        if core.own != self.authored[who][-1]:
            self.authored[who].append(core.own)
        return [(who, out.to, encode(out.message)) for out in core.outgoing()]

    @rule(who=st.sampled_from(PEERS), activity=st.sampled_from(("idle", "a", "b", "c")))
    def change(self, who: DeviceId, activity: str) -> None:
        self.peers[who].update_own(activity=activity)
        self._drain(who)

    @rule(who=st.sampled_from(PEERS), clock=st.integers(0, 9))
    def restart(self, who: DeviceId, clock: int) -> None:
        """A peer restarts, perhaps with a clock that went backwards."""
        self._start(who, incarnation=clock)

    @rule(target=mails, who=st.sampled_from(PEERS), to=st.sampled_from(PEERS))
    def push(self, who: DeviceId, to: DeviceId) -> list[tuple[DeviceId, DeviceId, bytes]]:
        if who == to:
            return []
        self.peers[who].receive(Holdings(held=(), reply_wanted=True), to, self.now)
        return self._drain(who)

    @rule(batch=mails)
    def arrive(self, batch: list[tuple[DeviceId, DeviceId, bytes]]) -> None:
        self._take(batch)

    @rule(batch=consumes(mails))
    def arrive_last(self, batch: list[tuple[DeviceId, DeviceId, bytes]]) -> None:
        self._take(batch)

    @rule(batch=consumes(mails))
    def lose(self, batch: object) -> None:
        pass

    def _take(self, batch: list[tuple[DeviceId, DeviceId, bytes]]) -> None:
        for sender, to, body in batch:
            self.now += 0.001
            self.peers[to].receive(decode(body), sender, self.now)
            self._drain(to)

    @invariant()
    def nobody_writes_another_record(self) -> None:
        """What is held of a device is something that device once said of itself."""
        for core in self.peers.values():
            for who in PEERS:
                held = core.record_of(who)
                assert held is None or held in self.authored[who]

    def teardown(self) -> None:
        """Everybody pushes to everybody until nothing changes: then all hold the same."""
        for _ in range(3):
            for who in PEERS:
                for to in PEERS:
                    self._take(self.push(who, to))
        for who in PEERS:
            held = {core.record_of(who) for core in self.peers.values()}
            assert held == {self.peers[who].own}


TestGossip = Gossip.TestCase
TestGossip.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
