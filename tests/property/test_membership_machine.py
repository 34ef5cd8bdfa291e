"""Whatever comes in whatever order, the membership machine stays whole and keeps time."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from p2ptrain.errors import RemoteProtocolError
from p2ptrain.ids import DeviceId
from p2ptrain.membership.accusation import KINDS, VERDICTS, Accusation
from p2ptrain.membership.events import MemberDown, MemberUp
from p2ptrain.membership.machine import Membership
from p2ptrain.membership.messages import (
    Ack,
    AskFor,
    Held,
    Holdings,
    Linked,
    MembershipMessage,
    News,
    Ping,
    Vouch,
)
from p2ptrain.membership.states import State
from tests.sim.plans import device, make_record

ME = device(0)
OTHERS = tuple(device(i) for i in range(1, 6))
devices = st.sampled_from((ME, *OTHERS))
others = st.sampled_from(OTHERS)
small = st.integers(0, 3)
records = st.builds(
    lambda who, incarnation, version, refutations, leaving: replace(
        make_record(who, incarnation=incarnation, version=version),
        refutations=refutations,
        leaving=leaving,
        away_count=refutations,
    ),
    devices, small, small, small, st.booleans(),
)  # fmt: skip
accusations = st.builds(
    Accusation,
    device=devices, incarnation=small, refutations=small, verdict=st.sampled_from(VERDICTS),
    kind=st.sampled_from(("silent", "refused")), accuser=devices,
)  # fmt: skip
lines = st.builds(
    Held, device=devices, incarnation=small, version=small, content=small,
    dead=st.none() | small,
)  # fmt: skip
sequences = st.integers(0, 40)
messages = st.one_of(
    st.builds(Ping, sequence=sequences, incarnation=small, version=small),
    st.builds(Ack, sequence=sequences),
    st.builds(AskFor, sequence=sequences, target=devices),
    st.builds(Vouch, sequence=sequences, target=devices),
    st.builds(
        News,
        records=st.lists(records, max_size=3).map(tuple),
        accusations=st.lists(accusations, max_size=3).map(tuple),
    ),
    st.builds(Holdings, held=st.lists(lines, max_size=4).map(tuple), reply_wanted=st.booleans()),
    st.builds(Linked, devices=st.lists(devices, max_size=4, unique=True).map(tuple)),
)


class AnyInput(RuleBasedStateMachine):
    """One core, five others that say anything, a clock that jumps."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.core = Membership(own=make_record(ME), rng=random.Random(1))
        self.up: set[DeviceId] = set()

    def _drain(self) -> None:
        for out in self.core.outgoing():
            assert out.to != ME
            assert isinstance(out.message, MembershipMessage)
        for event in self.core.events():
            if isinstance(event, MemberUp):
                assert event.record.device not in self.up
                self.up.add(event.record.device)
            elif isinstance(event, MemberDown):
                assert event.kind in KINDS
                self.up.remove(event.device)

    @rule(who=others)
    def link_up(self, who: DeviceId) -> None:
        self.core.link_down(who, False, self.now)
        self.core.link_up(who, self.now)
        self._drain()

    @rule(who=others, refused=st.booleans())
    def link_down(self, who: DeviceId, refused: bool) -> None:
        self.core.link_down(who, refused, self.now)
        self._drain()

    @rule(who=others, message=messages)
    def receive(self, who: DeviceId, message: object) -> None:
        try:
            self.core.receive(message, who, self.now)
        except RemoteProtocolError:
            self.core.link_down(who, False, self.now)
        self._drain()

    @rule(who=others)
    def hear(self, who: DeviceId) -> None:
        self.core.heard(who, self.now)
        self._drain()

    @rule(seconds=st.floats(0.0, 4.0))
    def wait(self, seconds: float) -> None:
        """Ticks at every deadline on the way, as the driver does."""
        end = self.now + seconds
        while (due := self.core.deadline()) is not None and due <= end:
            self.now = max(self.now, due)
            self.core.tick(self.now)
            self._drain()
            after = self.core.deadline()
            assert after is None or after > self.now
        self.now = end

    @rule(seconds=st.floats(0.0, 10.0))
    def stall(self, seconds: float) -> None:
        """Nothing runs for a while; the driver then says how late it is."""
        due = self.core.deadline()
        self.now += seconds
        if due is not None and due < self.now:
            self.core.lag(self.now - due, self.now)
        self.core.tick(self.now)
        self._drain()

    @rule(seconds=st.floats(1.0, 1e6))
    def suspend(self, seconds: float) -> None:
        self.core.away(seconds, self.now)
        self._drain()

    @rule(leaving=st.booleans())
    def leave(self, leaving: bool) -> None:
        before = self.core.own
        self.core.update_own(leaving=leaving)
        assert self.core.own.standing >= before.standing
        self._drain()

    @invariant()
    def alive_is_what_the_events_say(self) -> None:
        assert set(self.core.alive()) == self.up

    @invariant()
    def counts_are_those_of_the_table(self) -> None:
        views = self.core.members(self.now)
        found = Counter(view.state for view in views)
        statistics = self.core.statistics()
        assert statistics.alive_count == found[State.ALIVE]
        assert statistics.suspect_count == found[State.SUSPECT]
        assert statistics.dead_count == found[State.DEAD]
        assert all(view.reason for view in views if view.state is not State.ALIVE)


TestAnyInput = AnyInput.TestCase
TestAnyInput.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
