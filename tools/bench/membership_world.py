"""A simulated group of up to 1,000 peers on the production membership core, in virtual time.

Links behave as the shell's do: a peer dials whom the core names until it has LINK_PEERS_WANTED
links, and takes up to LINK_PEERS_MAX; a message takes 5 to 30 ms and is not lost; a killed process
closes its links, and a new connection to it is refused.
"""

from __future__ import annotations

import base64
import hashlib
import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from p2ptrain import limits
from p2ptrain.ids import DeviceId
from p2ptrain.membership.events import AddressLearned
from p2ptrain.membership.machine import Membership
from p2ptrain.membership.record import MemberRecord
from p2ptrain.membership.states import State
from p2ptrain.training.contract import RuntimeBuild
from p2ptrain.wire.codec import encode, message_name

START_S: Final = 1.0
"""All peers start within this time, as after a power cut."""
CONTACTS: Final = 8
"""Addresses that each knows at its start, as from discovery."""
LOOK_EVERY_S: Final = 0.05
SIZES_EVERY: Final = 50
"""One message of so many is encoded, to know its bytes."""
BUILD: Final = RuntimeBuild(
    runtime="onnxruntime", version="1.32.0", numpy="2.4.0", machine="aarch64", isa="neon"
)


@dataclass(slots=True)
class Node:
    """One simulated peer."""

    device: DeviceId
    core: Membership
    links: set[DeviceId] = field(default_factory=set)
    running: bool = False
    stopped: bool = False
    wake_at_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What went over the links in some time."""

    messages_per_peer_s: float
    bytes_per_peer_s: float
    """Of control bodies, without frames, TLS and TCP; from a sample."""
    by_name: dict[str, float]
    """Message name -> messages per peer and second."""


class MembershipWorld:
    """The heap, the links and the peers; everything follows from the seed."""

    def __init__(self, *, count: int, seed: int) -> None:
        self.now = 0.0
        self._rng = random.Random(seed)
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.nodes = {node.device: node for node in _make_nodes(count, seed)}
        self._sent: Counter[str] = Counter()
        self._sampled: Counter[str] = Counter()
        self._sampled_bytes: Counter[str] = Counter()
        devices = list(self.nodes)
        for node in self.nodes.values():
            self._at(self._rng.uniform(0.0, START_S), lambda n=node: self._start(n, devices))

    # Time.

    def _at(self, delay_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (self.now + delay_s, next(self._order), action))

    def run(self, seconds: float) -> None:
        """Let that much time pass."""
        end_s = self.now + seconds
        while self._heap and self._heap[0][0] <= end_s:
            self.now, _, action = heapq.heappop(self._heap)
            action()
        self.now = end_s

    def run_until(self, condition: Callable[[], bool], *, within_s: float) -> float | None:
        """Seconds until the condition held, looked at every 50 ms; None: it did not."""
        since_s = self.now
        while self.now < since_s + within_s:
            self.run(LOOK_EVERY_S)
            if condition():
                return self.now - since_s
        return None

    # Peers and links.

    def _start(self, node: Node, devices: list[DeviceId]) -> None:
        node.running = True
        others = [device for device in devices if device != node.device]
        for device in self._rng.sample(others, min(CONTACTS, len(others))):
            self._dial(node, device, patient=True)

    def _dial(self, node: Node, device: DeviceId, *, patient: bool = False) -> None:
        target = self.nodes[device]
        if not node.running or device in node.links:
            return
        if not target.running or len(target.links) >= limits.LINK_PEERS_MAX:
            if patient:
                delay_s = self._rng.uniform(0.2, 0.5)
                self._at(delay_s, lambda: self._dial(node, device, patient=True))
        elif len(node.links) < limits.LINK_PEERS_WANTED:
            for one, other in ((node, target), (target, node)):
                one.links.add(other.device)
                one.core.link_up(other.device, self.now)
            self._settle(node)
            self._settle(target)

    def kill(self, device: DeviceId) -> None:
        """kill -9: its links close, and its machine refuses new ones."""
        victim = self.nodes[device]
        victim.running = False
        for other in sorted(victim.links):
            self._at(self._rng.uniform(0.005, 0.1), lambda o=other: self._lose(o, device))
        victim.links.clear()

    def _lose(self, device: DeviceId, gone: DeviceId) -> None:
        node = self.nodes[device]
        node.links.discard(gone)
        node.core.link_down(gone, True, self.now)
        self._settle(node)

    def stop(self, device: DeviceId) -> None:
        """SIGSTOP, or its network is gone: its links stand, and nothing comes over them."""
        self.nodes[device].stopped = True

    # The driver's part.

    def _settle(self, node: Node) -> None:
        core = node.core
        while (sends := core.outgoing()) or (events := core.events()):
            for outgoing in sends:
                self._send(node, outgoing.to, outgoing.message)
            for event in core.events() if sends else events:
                if isinstance(event, AddressLearned):
                    delay_s = self._rng.uniform(0.05, 0.3)
                    self._at(delay_s, lambda d=event.device: self._dial(node, d))
        due_s = core.deadline()
        if due_s is not None and (node.wake_at_s is None or due_s < node.wake_at_s):
            node.wake_at_s = due_s
            self._at(max(0.0, due_s - self.now), lambda: self._wake(node, due_s))

    def _wake(self, node: Node, at_s: float) -> None:
        if node.wake_at_s != at_s or not node.running or node.stopped:
            return
        node.wake_at_s = None
        node.core.tick(self.now)
        self._settle(node)

    def _send(self, node: Node, to: DeviceId, message: object) -> None:
        name = message_name(message)
        self._sent[name] += 1
        if self._sent[name] % SIZES_EVERY == 1:
            self._sampled[name] += 1
            self._sampled_bytes[name] += len(encode(message))
        delay_s = self._rng.uniform(0.005, 0.03)
        self._at(delay_s, lambda: self._arrive(node.device, self.nodes[to], message))

    def _arrive(self, sender: DeviceId, node: Node, message: object) -> None:
        if node.running and not node.stopped and sender in node.links:
            node.core.receive(message, sender, self.now)
            self._settle(node)

    # What is measured.

    def active(self) -> Iterator[Node]:
        """Peers that run."""
        return (n for n in self.nodes.values() if n.running and not n.stopped)

    def all_know_all(self) -> bool:
        """Every peer holds every other alive."""
        wanted = len(self.nodes) - 1
        return all(
            node.running and node.core.statistics().alive_count == wanted
            for node in self.nodes.values()
        )

    def all_hold(self, device: DeviceId, state: State) -> bool:
        """Every other peer that runs holds that one to be in that state."""
        others = (node for node in self.active() if node.device != device)
        return all(node.core.state_of(device) is state for node in others)

    def false_deaths(self, but: set[DeviceId]) -> int:
        """How many that are not in `but` somebody holds dead."""
        return sum(
            node.core.state_of(device) is State.DEAD
            for node in self.active()
            for device in self.nodes
            if device not in but
        )

    def traffic(self, seconds: float) -> Traffic:
        """Run for that long and count."""
        before = self._sent.copy()
        count = sum(1 for _ in self.active())
        self.run(seconds)
        sent = {name: self._sent[name] - before[name] for name in self._sent}
        size = {n: self._sampled_bytes[n] / max(1, self._sampled[n]) for n in sent}
        each = count * seconds
        return Traffic(
            messages_per_peer_s=sum(sent.values()) / each,
            bytes_per_peer_s=sum(sent[name] * size[name] for name in sent) / each,
            by_name={name: number / each for name, number in sorted(sent.items()) if number},
        )

    def mean_links(self) -> float:
        """Links per peer."""
        counts = [len(node.links) for node in self.active()]
        return sum(counts) / len(counts)


def _make_nodes(count: int, seed: int) -> Iterator[Node]:
    for index in range(count):
        digest = hashlib.sha256(f"peer {index}".encode()).digest()
        device = DeviceId(base64.b32encode(digest).decode()[:26].lower())
        own = MemberRecord(
            device=device, name=f"peer-{index}", incarnation=1_800_000_000, version=0,
            addresses=(f"192.0.2.{index % 256}:{20_000 + index}",), host=f"{index:016x}", cores=4,
            threads_max=4, memory_bytes=1 << 32, power_source="mains", build=BUILD,
            activity="idle",
        )  # fmt: skip
        yield Node(device, Membership(own=own, rng=random.Random(seed * 1_000_003 + index)))
