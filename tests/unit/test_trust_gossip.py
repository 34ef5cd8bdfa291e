"""The gossip about trust: everybody ends up with the same, whatever came first."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence

import pytest

from p2ptrain import limits
from p2ptrain.errors import LocalProtocolError, RemoteProtocolError
from p2ptrain.ids import DeviceId
from p2ptrain.membership.messages import Ping
from p2ptrain.trust import certificates as certs
from p2ptrain.trust.chains import MemberChain, member_chain
from p2ptrain.trust.gossip import ChainLearned, RevocationLearned, RootRotated, TrustGossip
from p2ptrain.trust.gossip_messages import ChainShown, Known, Summary
from p2ptrain.trust.revocation import RevokedKeys
from p2ptrain.trust.roster import Roster
from p2ptrain.trust.rotation import OldRoot, Roots, Rotation, rotate
from tests.minted_group import NOW, MintedGroup, MintedMember


class Network:
    """Machines of members, and what is on its way between those that are linked."""

    def __init__(self, group: MintedGroup, members: Sequence[MintedMember]) -> None:
        self.now = 0.0
        self.events: dict[DeviceId, list[object]] = {m.device: [] for m in members}
        self.written: dict[DeviceId, list[object]] = {m.device: [] for m in members}
        self.machines = {
            member.device: TrustGossip(
                gid=group.gid,
                roots=Roots(group.made.root, gid=group.gid),
                revoked=RevokedKeys(),
                roster=Roster(),
                rng=random.Random(index),
            )
            for index, member in enumerate(members)
        }
        for member in members:
            self.machines[member.device].show(member.chain)
        self.links: set[frozenset[DeviceId]] = set()

    def link(self, a: MintedMember, b: MintedMember) -> None:
        self.links.add(frozenset((a.device, b.device)))
        self.machines[a.device].link_up(b.device, self.now)
        self.machines[b.device].link_up(a.device, self.now)
        self.settle()

    def cut(self, a: MintedMember, b: MintedMember) -> None:
        self.links.discard(frozenset((a.device, b.device)))
        self.machines[a.device].link_down(b.device)
        self.machines[b.device].link_down(a.device)

    def settle(self) -> int:
        """Deliver until nobody has anything more to say; how many messages that took."""
        for count in itertools.count():
            sent = [
                (device, outgoing)
                for device, machine in self.machines.items()
                for outgoing in self._drain(device, machine)
            ]
            if not sent:
                return count
            assert count < 50, "the machines talk without end"
            for device, outgoing in sent:
                if frozenset((device, outgoing.to)) in self.links:
                    self.machines[outgoing.to].receive(outgoing.message, device, self.now)
        raise AssertionError("unreachable")

    def _drain(self, device: DeviceId, machine: TrustGossip) -> list[object]:
        self.written[device] += machine.writes()
        sends = list(machine.outgoing())
        self.events[device] += machine.events()
        return sends  # type: ignore[return-value]  # Outgoing

    def agree(self) -> bool:
        return len({machine._summary().digest for machine in self.machines.values()}) == 1


@pytest.fixture
def group() -> MintedGroup:
    return MintedGroup()


def line_of(group: MintedGroup, count: int) -> tuple[Network, list[MintedMember]]:
    """Members in a row, each linked with the next."""
    members = [group.founder(f"m{index}") for index in range(count)]
    network = Network(group, members)
    for a, b in itertools.pairwise(members):
        network.link(a, b)
    return network, members


def test_certificates_of_all_members_reach_everybody(group: MintedGroup) -> None:
    network, members = line_of(group, 5)
    assert network.agree()
    for machine in network.machines.values():
        assert {chain.device for chain in machine.roster.chains} == {m.device for m in members}


def test_revocation_reaches_everybody_over_others_and_is_written_once(group: MintedGroup) -> None:
    network, members = line_of(group, 5)
    statement = group.revoke(members[4], by=members[0])
    network.machines[members[0].device].state_revocation(statement)
    network.settle()
    for device, machine in network.machines.items():
        assert machine.revoked.statements == (statement,)
        assert network.written[device] == [statement]
        learned = [e for e in network.events[device] if isinstance(e, RevocationLearned)]
        assert learned == [RevocationLearned(statement=statement)]


def test_member_that_was_away_learns_at_its_next_link(group: MintedGroup) -> None:
    network, members = line_of(group, 3)
    network.cut(members[1], members[2])
    statement = group.revoke(members[1], by=members[0])
    network.machines[members[0].device].state_revocation(statement)
    network.settle()
    assert len(network.machines[members[2].device].revoked) == 0
    network.link(members[0], members[2])
    assert network.machines[members[2].device].revoked.statements == (statement,)


def test_both_sides_of_a_partition_end_with_both_statements(group: MintedGroup) -> None:
    network, members = line_of(group, 4)
    network.cut(members[1], members[2])
    for revoker, target in ((0, 1), (3, 2)):
        statement = group.revoke(members[target], by=members[revoker])
        network.machines[members[revoker].device].state_revocation(statement)
    network.settle()
    network.link(members[0], members[3])
    assert network.agree()
    assert {len(machine.revoked) for machine in network.machines.values()} == {2}


def test_equal_knowledge_costs_one_message_each(group: MintedGroup) -> None:
    network, members = line_of(group, 2)
    machine = network.machines[members[0].device]
    due = machine.deadline()
    assert due is not None
    machine.tick(due)
    (sent,) = machine.outgoing()
    assert isinstance(sent.message, Summary)
    network.machines[members[1].device].receive(sent.message, members[0].device, due)
    assert not network.machines[members[1].device].outgoing()
    later = machine.deadline()
    assert later is not None
    assert later > due


def test_lost_messages_are_made_up_for_by_the_next_comparison(group: MintedGroup) -> None:
    network, members = line_of(group, 2)
    first, second = (network.machines[member.device] for member in members)
    first.state_revocation(group.revoke(group.admit(members[0], "phone"), by=members[0]))
    first.outgoing()  # lost
    due = first.deadline()
    assert due is not None
    first.tick(due)
    network.settle()
    assert len(second.revoked) == 1


def test_rotation_goes_first_and_what_hangs_below_it_follows(group: MintedGroup) -> None:
    network, members = line_of(group, 3)
    new = certs.create_group("home 2", now=NOW)
    rotation = rotate(
        OldRoot(key=group.made.root_key, certificate=group.made.root),
        new,
        gid=group.gid,
        number=1,
        issuers=[member.chain.issuers[-1] for member in members],
        now=NOW,
    )
    machine = network.machines[members[0].device]
    machine.state_rotation(rotation)
    network.settle()
    for device, each in network.machines.items():
        assert each.roots.current == new.root
        assert RootRotated(rotation=rotation) in network.events[device]
        assert network.written[device] == [rotation]


def test_statement_below_an_unknown_root_waits_for_the_rotation(group: MintedGroup) -> None:
    network, members = line_of(group, 2)
    unheard_of = MintedGroup()
    unheard_of.made = dataclasses.replace(unheard_of.made, id=group.gid)
    machine = network.machines[members[0].device]
    founder = unheard_of.founder()
    chain = ChainShown(certificates=founder.chain.to_der())
    machine.receive(chain, members[1].device, 0.0)
    later = Rotation(
        group=group.gid, number=2, root="ab", issuers=(), at_s=0, until_s=1, signature=""
    )
    machine.receive(later, members[1].device, 0.0)
    assert not machine.writes()
    assert not machine.roots.rotations


def test_chain_that_overtakes_its_rotation_comes_again_behind_it(group: MintedGroup) -> None:
    network, members = line_of(group, 2)
    rotation, moved = moved_by_rotation(group, members[0])
    one, two = (network.machines[member.device] for member in members)
    one.state_rotation(rotation)
    one.show(moved)
    one.outgoing()  # the rotation is slow
    two.receive(ChainShown(certificates=moved.to_der()), members[0].device, 0.0)
    network.settle()
    assert two.roots.current == rotation.new_root
    assert two.roster.get(members[0].device) == one.roster.get(members[0].device) == moved


def moved_by_rotation(
    group: MintedGroup, founder: MintedMember, *, now: float = NOW
) -> tuple[Rotation, MemberChain]:
    """A rotation that moves one member, and the member's chain below the new root."""
    new = certs.create_group("home 2", now=now)
    old = OldRoot(key=group.made.root_key, certificate=group.made.root)
    issuers = [founder.chain.issuers[-1]]
    rotation = rotate(old, new, gid=group.gid, number=1, issuers=issuers, now=now)
    roots = Roots(group.made.root, [rotation], gid=group.gid)
    chain = roots.mended(founder.chain.certificates)
    return rotation, member_chain(chain, gid=group.gid, roots=roots.ever)


@pytest.mark.parametrize("later_s", [0, -3600, 3600])
def test_chain_below_a_newer_root_is_the_newer_one_whatever_the_clock_of_who_rotated(
    group: MintedGroup, later_s: int
) -> None:
    """Dates have whole seconds and come from many clocks."""
    for _ in range(8):  # equal dates were decided by hashes
        founder = group.founder()
        _, moved = moved_by_rotation(group, founder, now=NOW + later_s)
        assert (founder.chain.generation, moved.generation) == (0, 1)
        for order in ((founder.chain, moved), (moved, founder.chain)):
            assert Roster(order).get(founder.device) == moved


def test_statement_that_does_not_hold_costs_the_link(group: MintedGroup) -> None:
    network, members = line_of(group, 2)
    statement = group.revoke(members[0], by=members[1])
    forged = type(statement)(
        **{
            **{name: getattr(statement, name) for name in statement.__slots__},
            "reason": "forged",
        }
    )
    machine = network.machines[members[0].device]
    with pytest.raises(RemoteProtocolError, match="does not hold"):
        machine.receive(forged, members[1].device, 0.0)
    assert not machine.writes()


def test_message_that_overtakes_the_news_of_its_link_counts(group: MintedGroup) -> None:
    network, members = line_of(group, 2)
    network.cut(*members)
    machine = network.machines[members[0].device]
    statement = group.revoke(group.admit(members[0], "phone"), by=members[0])
    machine.receive(statement, members[1].device, 0.0)
    assert len(machine.revoked) == 1
    assert not machine.outgoing()


def test_message_of_another_machine_is_our_own_mistake(group: MintedGroup) -> None:
    network, members = line_of(group, 2)
    with pytest.raises(LocalProtocolError):
        network.machines[members[0].device].receive(Ping(sequence=1), members[1].device, 0.0)


def test_number_of_statements_is_bounded(
    group: MintedGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "REVOCATIONS_MAX", 1)
    network, members = line_of(group, 2)
    machine = network.machines[members[0].device]
    machine.state_revocation(group.revoke(group.admit(members[0], "a"), by=members[0]))
    with pytest.raises(RemoteProtocolError, match="more revocations"):
        machine.receive(
            group.revoke(group.admit(members[0], "b"), by=members[0]), members[1].device, 0.0
        )


def test_newer_certificates_replace_older_ones_and_never_the_other_way(
    group: MintedGroup,
) -> None:
    founder = group.founder()
    later = MintedGroup.__new__(MintedGroup)
    later.made, later.now = group.made, NOW + 86_400
    renewed = later._member(founder.key, founder.may_sign, "founder")
    network = Network(group, [founder])
    machine = network.machines[founder.device]
    machine.show(renewed.chain)
    machine.show(founder.chain)
    assert machine.roster.get(founder.device) == renewed.chain
    learned = [e for e in machine.events() if isinstance(e, ChainLearned)]
    assert [event.chain for event in learned] == [founder.chain, renewed.chain]


def test_roster_is_bounded(group: MintedGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ROSTER_MAX", 2)
    roster = Roster(group.founder(name).chain for name in ("a", "b", "c"))
    assert len(roster.chains) == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"revocations": ("x",), "chains": {}},
        {"revocations": (), "chains": {"x": "0" * 64}},
        {"revocations": (), "chains": {"a" * 26: "x"}},
    ],
)
def test_malformed_lists_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="is not"):
        Known(rotations=0, **fields)  # type: ignore[arg-type]  # a table of cases
    with pytest.raises(ValueError, match="leaf"):
        ChainShown(certificates=(b"x",))
