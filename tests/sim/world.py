"""A group of peers on an event heap: one seed, virtual time, the production cores.

A link behaves like TCP seen from afar: it exists between two running processes, a crash closes
it, a re-dial to a machine without the process is refused, a partition is silence. Unlike TCP it
also loses, doubles and reorders messages, because the cores must not care.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from p2ptrain.agreement.events import (
    PlanDecided,
    ProposalFailed,
    ProposalReceived,
)
from p2ptrain.agreement.journal import decode_record, encode_record
from p2ptrain.agreement.machine import Agreement
from p2ptrain.errors import RemoteProtocolError
from p2ptrain.ids import DeviceId, Lineage
from p2ptrain.membership.events import MemberDown
from p2ptrain.membership.machine import Membership
from p2ptrain.membership.messages import MembershipMessage
from p2ptrain.membership.states import State
from p2ptrain.wire.codec import decode, encode
from p2ptrain.wire.machine import Machine
from tests.sim.checkers import AgreementChecker, MembershipChecker, Violation
from tests.sim.plans import RUN, device, make_contract, make_plan, make_record


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Which cores run; a mutation puts a broken one in."""

    membership: type[Membership] = Membership
    agreement: type[Agreement] = Agreement


@dataclass
class Node:
    """One simulated peer: what survives a crash, and what does not."""

    device: DeviceId
    disk: list[bytes] = field(default_factory=list)
    lives: int = 0
    running: bool = False
    paused: bool = False
    membership: Membership | None = None
    agreement: Agreement | None = None
    backlog: list[tuple[DeviceId, int, object]] = field(default_factory=list)
    wake_at: float | None = None

    @property
    def active(self) -> bool:
        return self.running and not self.paused


class World:
    """The heap, the network and the nodes."""

    def __init__(
        self, *, seed: int, count: int, rules: Rules, start_all: bool = True,
        mesh: frozenset[tuple[int, int]] | None = None,
    ) -> None:  # fmt: skip
        """`mesh`: pairs of indices that may have a link; None: everybody with everybody."""
        self.rng = random.Random(seed)
        self.seed, self.rules, self.now = seed, rules, 0.0
        self.loss, self.doubling, self.delay_s = 0.0, 0.0, 0.02
        self.refusal = 0.0
        self.whole_codec = seed % 8 == 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.nodes = {device(i): Node(device(i)) for i in range(count)}
        self.island = dict.fromkeys(self.nodes, 0)
        self.mute: set[tuple[DeviceId, DeviceId]] = set()
        """(sender, receiver): what is sent that way is lost, without anybody noticing."""
        self._whole = mesh is None
        self._links: dict[frozenset[DeviceId], int] = {}
        self._generation = itertools.count(1)
        self.membership_checker = MembershipChecker()
        self.agreement_checker = AgreementChecker(lambda d: self.nodes[d].disk)
        self.failed: list[ProposalFailed] = []
        self.message_count = 0
        self.proposal_count = 0
        pairs = itertools.combinations(range(count), 2) if mesh is None else sorted(mesh)
        for a, b in ((device(i), device(j)) for i, j in pairs):
            self.at(self.rng.uniform(0, 0.5), lambda a=a, b=b: self._dial(a, b))
        for node in self.nodes.values() if start_all else ():
            self.start(node)

    # Time.

    def at(self, delay_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (self.now + delay_s, next(self._order), action))

    def run(self, seconds: float, until: Callable[[], bool] | None = None) -> bool:
        """Run for `seconds` or until the condition holds; whether it held."""
        end = self.now + seconds
        while self._heap and self._heap[0][0] <= end:
            if until is not None and until():
                return True
            self.now, _, action = heapq.heappop(self._heap)
            action()
        self.now = end
        return until is not None and until()

    # Processes.

    def start(self, node: Node) -> None:
        node.running, node.paused, node.lives = True, False, node.lives + 1
        # Clocks without a battery: a later life may believe that it is earlier.
        incarnation = 1000 + 10 * node.lives + self.rng.choice((0, 0, 1, -25))
        own = make_record(node.device, incarnation=incarnation)
        seed = self.rng.getrandbits(32)
        node.membership = self.rules.membership(own=own, rng=random.Random(seed))
        node.agreement = self.rules.agreement(device=node.device, rng=random.Random(seed + 1))
        node.agreement.restore(map(decode_record, node.disk), self.now)
        node.backlog.clear()
        node.wake_at = None
        self.settle(node)

    def crash(self, node: Node) -> None:
        """kill -9: memory and links are gone, the disk stays."""
        node.running, node.membership, node.agreement = False, None, None
        for other in self.nodes.values():
            if self._links.pop(frozenset((node.device, other.device)), None) is not None:
                delay_s = self.rng.uniform(0.001, 0.05)
                if self._reachable(node, other):
                    self.at(delay_s, lambda o=other: self._tell_down(o, node.device, False))

    def pause(self, node: Node) -> None:
        """SIGSTOP: the kernel goes on taking bytes, the process does nothing."""
        node.paused = True

    def resume(self, node: Node) -> None:
        node.paused = False
        if node.running:
            self._wake(node)
            backlog, node.backlog = node.backlog, []
            for sender, generation, message in backlog:
                self._arrive(sender, node, generation, message)

    # Links.

    def _reachable(self, sender: Node, receiver: Node) -> bool:
        if (sender.device, receiver.device) in self.mute:
            return False
        return self.island[sender.device] == self.island[receiver.device]

    def _both_ways(self, a: Node, b: Node) -> bool:
        return self._reachable(a, b) and self._reachable(b, a)

    def _dial(self, a: DeviceId, b: DeviceId) -> None:
        first, second = self.nodes[a], self.nodes[b]
        self.at(self.rng.uniform(0.3, 1.0), lambda: self._dial(a, b))
        if frozenset((a, b)) in self._links or not self._both_ways(first, second):
            return
        if first.active and second.active:
            self._connect(first, second)
        elif first.active and not second.running:
            self._tell_down(first, b, True)
        elif second.active and not first.running:
            self._tell_down(second, a, True)

    def _connect(self, first: Node, second: Node) -> None:
        self._links[frozenset((first.device, second.device))] = next(self._generation)
        for node, other in ((first, second), (second, first)):
            assert node.membership is not None
            node.membership.link_down(other.device, False, self.now)
            node.membership.link_up(other.device, self.now)
        self.settle(first)
        self.settle(second)

    def _tell_down(self, node: Node, other: DeviceId, refused: bool) -> None:
        if node.paused:
            self.at(0.5, lambda: self._tell_down(node, other, refused))
        elif node.running and frozenset((node.device, other)) not in self._links:
            assert node.membership is not None
            node.membership.link_down(other, refused, self.now)
            self.settle(node)

    def send(self, sender: Node, to: DeviceId, message: object) -> None:
        generation = self._links.get(frozenset((sender.device, to)))
        target = self.nodes.get(to)
        if generation is None or target is None:
            return
        self.message_count += 1
        if self.whole_codec or not isinstance(message, MembershipMessage):
            message = decode(encode(message))
        for _ in range(2 if self.rng.random() < self.doubling else 1):
            if self.rng.random() >= self.loss and self._reachable(sender, target):
                delay_s = self.delay_s * (0.5 + self.rng.expovariate(2.0))
                self.at(
                    delay_s,
                    lambda: self._arrive(sender.device, target, generation, message),
                )

    def _arrive(self, sender: DeviceId, to: Node, generation: int, message: object) -> None:
        if not to.running or self._links.get(frozenset((sender, to.device))) != generation:
            return
        if to.paused:
            to.backlog.append((sender, generation, message))
            return
        machine: Machine | None = to.agreement
        if isinstance(message, MembershipMessage):
            machine = to.membership
        assert machine is not None
        try:
            machine.receive(message, sender, self.now)
        except RemoteProtocolError as error:
            raise Violation(f"{to.device[:4]} got an impossible message: {error}") from error
        self.settle(to)

    # The driver's part.

    def settle(self, node: Node) -> None:
        """What `runtime.driver` does after each input, in the same order."""
        for machine in (node.membership, node.agreement):
            while machine is not None and node.running and self._drain(node, machine):
                pass
        self._schedule_wake(node)

    def _drain(self, node: Node, machine: Machine) -> bool:
        writes, sends, events = machine.writes(), machine.outgoing(), machine.events()
        for record in writes:
            node.disk.append(encode_record(record))  # type: ignore[arg-type]  # agreement's
            self.agreement_checker.on_write(node.device)
        if writes and self.rng.random() < self._crash_after_write:
            self.crash(node)
            return False
        for outgoing in sends:
            self.send(node, outgoing.to, outgoing.message)
        for event in events:
            self._on_event(node, event)
        return bool(writes or sends or events)

    _crash_after_write = 0.0

    def _schedule_wake(self, node: Node) -> None:
        if not node.active or node.membership is None or node.agreement is None:
            return
        due = [m.deadline() for m in (node.membership, node.agreement)]
        at = min((d for d in due if d is not None), default=None)
        if at is not None and at != node.wake_at:
            node.wake_at = at
            life = node.lives
            self.at(max(0.0, at - self.now), lambda: self._wake_if_due(node, at, life))

    def _wake_if_due(self, node: Node, at: float, life: int) -> None:
        if node.active and node.lives == life and node.wake_at == at:
            self._wake(node)

    def _wake(self, node: Node) -> None:
        assert node.membership is not None
        assert node.agreement is not None
        due = node.membership.deadline()
        if due is not None and due < self.now:
            node.membership.lag(self.now - due, self.now)
        node.wake_at = None
        for machine in (node.membership, node.agreement):
            machine.tick(self.now)
            after = machine.deadline()
            assert after is None or after > self.now, "a machine did not move its deadline"
        self.settle(node)

    # The shell's part.

    def _on_event(self, node: Node, event: object) -> None:
        assert node.agreement is not None
        self.membership_checker.on_event(self.now, node.device, event)
        match event:
            case MemberDown():
                node.agreement.member_down(event.device, self.now)
                self.at(0.0, lambda: self.settle(node))
            case ProposalReceived():
                life, plan = node.lives, event.plan
                self.at(self.rng.uniform(0.0, 0.5), lambda: self._judge(node, life, plan.digest))
            case PlanDecided():
                self.agreement_checker.on_decided(node.device, event.plan)
            case ProposalFailed():
                self.failed.append(event)

    def _judge(self, node: Node, life: int, digest: object) -> None:
        if node.paused:
            self.at(0.5, lambda: self._judge(node, life, digest))
        elif node.running and node.lives == life and node.agreement is not None:
            if self.rng.random() < self.refusal:
                node.agreement.refuse(digest, "no memory", self.now)  # type: ignore[arg-type]
            else:
                node.agreement.accept(digest, self.now)  # type: ignore[arg-type]
            self.settle(node)

    def propose(self, node: Node, members: tuple[DeviceId, ...]) -> tuple[str, int, int]:
        """Propose a fresh plan for the next view this node knows of; gives its key."""
        assert node.agreement is not None
        self.proposal_count += 1
        contract = make_contract(self.seed)
        view = node.agreement.next_view(RUN, Lineage(0))
        plan = make_plan(
            *members, home=node.device, view=view, contract=contract,
            reason=f"proposal {self.proposal_count}",
        )  # fmt: skip
        node.agreement.propose(plan, contract, self.now)
        self.settle(node)
        return (RUN, 0, view)

    # What a test asks.

    def sees(self, node: Node, state: State) -> set[DeviceId]:
        """Whom a node holds to be in a state."""
        assert node.membership is not None
        peers = node.membership._peers  # quicker than all the views
        return {device for device, peer in peers.items() if peer.state is state}

    def all_hold(self, subject: DeviceId, state: State) -> bool:
        """Every other node that runs holds `subject` to be in that state."""
        others = [n for n in self.nodes.values() if n.active and n.device != subject]
        return all(subject in self.sees(node, state) for node in others)

    def all_see_all(self) -> bool:
        """Every node runs, holds every other alive, and knows what it says of itself.

        Where links are not limited it has a link with every other, too.
        """
        for node in self.nodes.values():
            if not node.active or node.membership is None:
                return False
            if self.sees(node, State.ALIVE) != set(self.nodes) - {node.device}:
                return False
            if self._whole and set(node.membership.alive()) != set(self.nodes) - {node.device}:
                return False
            for other in self.nodes.values():
                own = None if other.membership is None else other.membership.own
                if node.membership.record_of(other.device) != own:
                    return False
        return True
