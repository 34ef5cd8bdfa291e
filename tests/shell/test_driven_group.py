"""Three peers under the production driver and a virtual clock: membership feeds agreement."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import trio
import trio.testing

from p2ptrain.agreement.events import PlanDecided, ProposalFailed, ProposalReceived
from p2ptrain.agreement.journal import AcceptedRecord, DecidedRecord
from p2ptrain.agreement.machine import Agreement
from p2ptrain.errors import RemoteProtocolError
from p2ptrain.ids import DeviceId
from p2ptrain.membership.events import MemberDown, MemberUp
from p2ptrain.membership.machine import Membership
from p2ptrain.membership.messages import MembershipMessage
from p2ptrain.runtime.driver import Driver
from p2ptrain.wire.codec import decode, encode
from tests.sim.plans import device, make_contract, make_plan, make_record

CONTRACT = make_contract()


class Group:
    """Peers in one process; messages cross as bytes, and a muted peer's are lost."""

    def __init__(self, count: int) -> None:
        self.peers = {device(i): Peer(device(i), self) for i in range(count)}
        self.muted: set[DeviceId] = set()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            for peer in self.peers.values():
                await nursery.start(peer.membership.run)
                await nursery.start(peer.agreement.run)
            for peer in self.peers.values():
                for other in self.peers.keys() - {peer.device}:
                    peer.membership.call(Membership.link_up, other, trio.current_time())
            task_status.started()


class Peer:
    """What a peer's top will do: split the inbox by message type, react to events."""

    def __init__(self, own: DeviceId, group: Group) -> None:
        self.device, self.group = own, group
        self.events: list[object] = []
        self.times: list[float] = []
        self.disk: list[object] = []
        core = Membership(own=make_record(own), rng=random.Random(1))
        self.membership = Driver(
            core,
            send=self.send,
            on_event=self.on_event,
            on_violation=self.on_violation,
            lag=core.lag,
        )
        self.agreement = Driver(
            Agreement(device=own, rng=random.Random(2)),
            send=self.send,
            on_event=self.on_event,
            on_violation=self.on_violation,
            persist=self.persist,
        )

    def send(self, to: DeviceId, message: object) -> None:
        if not {to, self.device} & self.group.muted:
            self.group.peers[to].take(self.device, decode(encode(message)))

    def take(self, sender: DeviceId, message: object) -> None:
        if isinstance(message, MembershipMessage):
            self.membership.deliver_nowait(sender, message)
        else:
            self.agreement.deliver_nowait(sender, message)

    async def persist(self, records: Sequence[object]) -> None:
        await trio.sleep(0.01)
        self.disk.extend(records)

    def on_event(self, event: object) -> None:
        now = trio.current_time()
        self.events.append(event)
        self.times.append(now)
        if isinstance(event, ProposalReceived):
            self.agreement.call(Agreement.accept, event.plan.digest, now)
        elif isinstance(event, MemberDown):
            self.agreement.call(Agreement.member_down, event.device, now)

    def on_violation(self, sender: DeviceId, error: RemoteProtocolError) -> None:
        raise AssertionError(f"{sender} broke the protocol: {error}")

    def count(self, kind: type) -> int:
        return sum(isinstance(event, kind) for event in self.events)


async def test_group_meets_decides_and_notices_a_silent_member(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    group = Group(3)
    home, member, silent = group.peers.values()
    await nursery.start(group.run)
    await trio.sleep(1.0)
    assert [peer.count(MemberUp) for peer in group.peers.values()] == [2, 2, 2]

    plan = make_plan(*group.peers)
    home.agreement.call(Agreement.propose, plan, CONTRACT, trio.current_time())
    await trio.sleep(1.0)
    for peer in group.peers.values():
        assert peer.events[-1] == PlanDecided(plan=plan, contract=CONTRACT)
        assert [type(record) for record in peer.disk] == [AcceptedRecord, DecidedRecord]

    await trio.sleep(60.0)
    assert [peer.count(MemberDown) for peer in group.peers.values()] == [0, 0, 0]
    assert home.membership.statistics().violation_count == 0

    group.muted.add(silent.device)
    later = make_plan(*group.peers, view=2)
    home.agreement.call(Agreement.propose, later, CONTRACT, trio.current_time())
    began = trio.current_time()
    await trio.sleep(8.0)
    (failure,) = [event for event in home.events if isinstance(event, ProposalFailed)]
    # Last heard up to a probe interval before the muting.
    failed_at = home.times[home.events.index(failure)]
    assert failed_at - began == pytest.approx(4.5, abs=0.8)
    assert failure.devices == (silent.device,)
    assert member.count(MemberDown) == 1

    group.muted.clear()
    await trio.sleep(6.0)
    assert [peer.count(MemberUp) for peer in group.peers.values()] == [3, 3, 4]
