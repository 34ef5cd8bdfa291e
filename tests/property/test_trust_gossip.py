"""Trust converges: whatever is lost, doubled, late or cut off, all members end with the same."""

from __future__ import annotations

import functools
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from p2ptrain import limits
from p2ptrain.ids import DeviceId
from p2ptrain.trust.gossip import RevocationLearned, TrustGossip
from p2ptrain.trust.revocation import Revocation, RevokedKeys
from p2ptrain.trust.roster import Roster
from p2ptrain.trust.rotation import Roots
from tests.minted_group import MintedGroup, MintedMember

MEMBERS = 5


@functools.cache
def cast() -> tuple[MintedGroup, tuple[MintedMember, ...], tuple[Revocation, ...]]:
    """Five members, and a statement of each against the next: made once, keys are slow."""
    group = MintedGroup()
    members = tuple(group.founder(f"m{index}") for index in range(MEMBERS))
    statements = tuple(
        group.revoke(members[(index + 1) % MEMBERS], by=members[index]) for index in range(MEMBERS)
    )
    return group, members, statements


class Chaos:
    """A network that loses, doubles and reorders by one seed."""

    def __init__(self, seed: int) -> None:
        group, members, _ = cast()
        self.rng = random.Random(seed)
        self.now = 0.0
        self.devices = [member.device for member in members]
        self.machines = {
            device: TrustGossip(
                gid=group.gid,
                roots=Roots(group.made.root, gid=group.gid),
                revoked=RevokedKeys(),
                roster=Roster(),
                rng=random.Random(self.rng.random()),
            )
            for device in self.devices
        }
        self.flying: list[tuple[DeviceId, DeviceId, object]] = []
        self.written: dict[DeviceId, list[object]] = {device: [] for device in self.devices}
        self.effective: dict[DeviceId, list[str]] = {device: [] for device in self.devices}
        for member in members:
            self.machines[member.device].show(member.chain)

    def link(self, a: DeviceId, b: DeviceId) -> None:
        self.machines[a].link_up(b, self.now)
        self.machines[b].link_up(a, self.now)

    def cut(self, a: DeviceId, b: DeviceId) -> None:
        self.machines[a].link_down(b)
        self.machines[b].link_down(a)

    def collect(self) -> None:
        for device, machine in self.machines.items():
            self.written[device] += machine.writes()
            for outgoing in machine.outgoing():
                self.flying.append((device, outgoing.to, outgoing.message))
            for event in machine.events():
                if isinstance(event, RevocationLearned):
                    assert event.statement in self.written[device]
                    self.effective[device].append(event.statement.id)

    def deliver(self, *, lost: float) -> None:
        """Deliver everything that flies, in any order."""
        self.collect()
        flying, self.flying = self.flying, []
        self.rng.shuffle(flying)
        for sender, to, message in flying:
            for _ in range(1 + (self.rng.random() < 0.1)):
                if self.rng.random() >= lost:
                    self.machines[to].receive(message, sender, self.now)

    def tick(self) -> None:
        self.now += limits.TRUST_SYNC_INTERVAL_S * 1.2
        for machine in self.machines.values():
            machine.tick(self.now)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), stated=st.sets(st.integers(0, MEMBERS - 1)))
def test_all_members_end_with_the_same_after_healing(seed: int, stated: set[int]) -> None:
    chaos = Chaos(seed)
    _, _, statements = cast()
    pairs = [(a, b) for a in chaos.devices for b in chaos.devices if a < b]
    for index in sorted(stated):
        for a, b in chaos.rng.sample(pairs, 4):
            chaos.rng.choice((chaos.link, chaos.cut))(a, b)
        chaos.machines[chaos.devices[index]].state_revocation(statements[index])
        chaos.deliver(lost=0.4)
        chaos.tick()
    for a, b in pairs:
        chaos.link(a, b)
    for _ in range(40):
        chaos.deliver(lost=0.2)
        chaos.tick()
    while chaos.flying or any(machine._outgoing for machine in chaos.machines.values()):
        chaos.deliver(lost=0.0)
    wanted = {statements[index].id for index in stated}
    for device, machine in chaos.machines.items():
        assert {statement.id for statement in machine.revoked.statements} == wanted
        assert len(machine.roster.chains) == MEMBERS
        # Once each, and on disk before it took effect.
        assert sorted(chaos.effective[device]) == sorted(wanted)
        assert len(chaos.written[device]) == len(wanted)
