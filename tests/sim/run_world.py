"""A run among simulated devices: one seed, virtual time, production cores on an event heap.

Control messages may be lost, doubled and reordered; tensors go over links that repeat until the
sender's view is over. Who can reach whom is noticed late, and one direction may fail alone.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from p2ptrain.agreement.run_rules import Rules
from p2ptrain.agreement.view import View
from p2ptrain.ids import DeviceId
from p2ptrain.planner.keepers import data_holders, replica_keepers
from p2ptrain.wire.codec import decode, encode
from tests.sim.plans import device, make_plan
from tests.sim.run_checkers import RunChecker
from tests.sim.run_model import Model
from tests.sim.run_node import RunNode
from tests.sim.run_shell import Disk, Flaws, StageDone
from tests.sim.run_views import CONTRACT, make_profile, staged_plan


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How a world begins."""

    stages: tuple[int, ...]
    """Segments of each stage; stage i is on device i, device 0 is at home."""
    reserves: int = 0
    outsiders: int = 0
    ties: tuple[tuple[int, ...], ...] = ()
    replica_every: int = 4
    keep_data_here: bool = False
    log_bytes_max: int = 1 << 20
    slow_disks: frozenset[int] = frozenset()
    """Devices that keep records of steps in memory."""


class RunWorld:
    """The heap, the network, the devices, and the checker that sees everything."""

    def __init__(
        self, *, seed: int, shape: Shape, rules: Rules | None = None, flaws: Flaws | None = None
    ) -> None:
        self.seed, self.shape, self.now = seed, shape, 0.0
        self.rng = random.Random(seed)
        self.rules, self.flaws = rules or Rules(), flaws or Flaws()
        self.model = Model(count=sum(shape.stages), ties=shape.ties)
        self.loss, self.doubling, self.delay_s = 0.0, 0.0, 0.01
        self.corruption = self.crash_after_write = self.done_loss = 0.0
        self._lost_dones: set[object] = set()
        self.whole_codec = seed % 8 == 0
        self.message_count = self.replay_count = self.return_count = 0
        self.leaving: set[DeviceId] = set()
        self.last_step = 1 << 30
        self.step_s = 0.15
        self.island: dict[DeviceId, int] = {}
        self.deaf: set[tuple[DeviceId, DeviceId]] = set()
        """(sender, receiver): this direction alone is broken."""
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._noticing: set[tuple[DeviceId, DeviceId]] = set()
        self.checker = RunChecker(self)
        count = len(shape.stages) + shape.reserves
        self.nodes = {device(i): RunNode(device(i), self) for i in range(count + shape.outsiders)}
        self.island = dict.fromkeys(self.nodes, 0)
        self.first = self._first_view(tuple(self.nodes)[:count])
        for index, node in enumerate(self.nodes.values()):
            node.has_slow_disk = index in shape.slow_disks
            node.start()
            if node.device in self.first.plan.holders:
                node.disk.has_data = True
            if node.device in self.first.members:
                node.found(self.first)
        self.refresh(at_once=True)

    def _first_view(self, members: tuple[DeviceId, ...]) -> View:
        stages = tuple(zip(members, self.shape.stages, strict=False))
        plan = staged_plan(make_plan(*members, contract=CONTRACT), *stages)
        keep = self.shape.keep_data_here
        holders = data_holders(plan.home, plan.stages, plan.members, keep_data_here=keep)
        plan = staged_plan(
            plan, *stages, holders=holders, keep_data_here=keep,
            replicas=replica_keepers(plan.stages, plan.members),
            replica_every=self.shape.replica_every,
        )  # fmt: skip
        return View(
            plan=plan, contract=CONTRACT, profiles=tuple(map(make_profile, plan.members)),
            previous=None, resume_step=0, records=(), restoration=None,
        )  # fmt: skip

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

    # The network.

    def passes(self, sender: DeviceId, to: DeviceId) -> bool:
        """Whether a message goes through in this direction."""
        return self.island[sender] == self.island[to] and (sender, to) not in self.deaf

    def linked(self, a: DeviceId, b: DeviceId) -> bool:
        """Whether two devices that answer can talk both ways."""
        there = self.nodes[a].up and self.nodes[b].up
        return there and self.passes(a, b) and self.passes(b, a)

    def post(self, sender: RunNode, to: DeviceId, message: object) -> None:
        """A control message: once, perhaps twice, perhaps never."""
        self.message_count += 1
        if self.whole_codec:
            message = decode(encode(message))
        for _ in range(2 if self.rng.random() < self.doubling else 1):
            if self.rng.random() < self.loss or not self.passes(sender.device, to):
                continue
            hear, life = self.nodes[to].hear, self.nodes[to].life
            delay_s = self.delay_s * (0.2 + self.rng.expovariate(1.0)) + sender.slowness_s
            self.at(delay_s, partial(hear, message, sender.device, sender.life, life))

    def ship(
        self, sender: RunNode, to: DeviceId, message: object, still: Callable[[], bool]
    ) -> None:
        """A tensor or report on the data link: repeated until it arrives or is `still` wanted."""
        life, target = sender.life, self.nodes[to]
        if to != sender.device and isinstance(message, StageDone) and self._loses(message):
            return

        def attempt() -> None:
            if sender.life != life or not sender.up or not still():
                return
            if target.up and not target.frozen and self.passes(sender.device, to):
                target.take(message, sender.device)
            else:
                self.at(0.3, attempt)

        self.at(self.delay_s * (0.2 + self.rng.expovariate(1.0)) + sender.slowness_s, attempt)

    def _loses(self, done: StageDone) -> bool:
        """A link ends and is back before anybody wants another view; once in a step at most."""
        step = (done.position, done.step)
        if step in self._lost_dones or self.rng.random() >= self.done_loss:
            return False
        self._lost_dones.add(step)
        return True

    # Who notices what, and when.

    def refresh(self, *, at_once: bool = False) -> None:
        """Something about links or processes changed: everybody notices after a while."""
        for observer, subject in itertools.permutations(self.nodes, 2):
            pair = (observer, subject)
            seen = self.nodes[observer].seen.get(subject, 0)
            if self.nodes[observer].up and seen != self._truth(*pair):
                if at_once:
                    self._notice(*pair)
                elif pair not in self._noticing:
                    self._noticing.add(pair)
                    delay_s = self._notice_delay_s(*pair)
                    self.at(delay_s, lambda o=observer, s=subject: self._notice(o, s))

    def _truth(self, observer: DeviceId, subject: DeviceId) -> int:
        """The subject's life if it can be talked to, 0 if not."""
        other = self.nodes[subject]
        there = self.linked(observer, subject) and not other.frozen
        return other.life if there else 0

    def _notice_delay_s(self, observer: DeviceId, subject: DeviceId) -> float:
        if not self.nodes[subject].up and self.passes(observer, subject):
            return self.rng.uniform(0.02, 0.3)  # its link was closed, a re-dial is refused
        if self._truth(observer, subject):
            return self.rng.uniform(0.05, 0.8)
        return self.rng.uniform(2.0, 5.0)  # silence

    def _notice(self, observer: DeviceId, subject: DeviceId) -> None:
        self._noticing.discard((observer, subject))
        node, truth = self.nodes[observer], self._truth(observer, subject)
        if node.up and node.frozen:
            self.at(0.5, lambda: self._notice(observer, subject))
        elif node.up and node.seen.get(subject, 0) != truth:
            node.notice(subject, truth)

    # Faults.

    def crash(self, node: RunNode, *, disk: bool = True) -> None:
        """kill -9; without `disk`, what it had stored is gone, too."""
        node.crash(disk=disk)
        self.refresh()

    def start(self, node: RunNode) -> None:
        node.start()
        self.refresh()

    def crash_to(self, node: RunNode, image: Disk) -> None:
        """The device stops, and finds its disk as it was when the image was taken."""
        self.crash(node)
        node.disk = image
        self.return_count += 1

    def freeze(self, node: RunNode, seconds: float) -> None:
        """SIGSTOP for a while."""
        if node.up and not node.frozen:
            node.frozen = True
            self.refresh()
            self.at(seconds, lambda: self._thaw(node, node.life))

    def _thaw(self, node: RunNode, life: int) -> None:
        if node.up and node.life == life and node.frozen:
            node.thaw()
            self.refresh()

    def leave(self, node: RunNode) -> None:
        """A graceful leave: it stays until a view without it has taken its state over."""
        self.leaving.add(node.device)
        for each in self.nodes.values():
            if each.up:
                self.at(self.rng.uniform(0.01, 0.1), each.consider)

    def train_until(self, step: int) -> None:
        """No step after this one begins until this is called again."""
        self.last_step = step
        for node in self.nodes.values():
            if node.up:
                node.stage.begin_step()

    def partition(self, islands: dict[DeviceId, int]) -> None:
        self.island = islands
        self.refresh()

    def heal(self) -> None:
        """Everything works again; whoever left may come back."""
        self.island = dict.fromkeys(self.nodes, 0)
        self.deaf.clear()
        self.leaving.clear()
        self.loss, self.doubling, self.delay_s = 0.02, 0.01, 0.01
        self.corruption = self.crash_after_write = self.done_loss = 0.0
        for node in self.nodes.values():
            if not node.up:
                node.start()
            elif node.frozen:
                node.thaw()
        self.refresh()
        for node in self.nodes.values():
            node.consider()

    # What tests ask.

    def newest_view(self) -> View | None:
        """None: every disk that knew the run is gone."""
        views = [n.machine.view for n in self.nodes.values() if n.up and n.machine.view]
        return max(views, key=lambda view: (view.lineage, view.number), default=None)

    def agreed(self) -> bool:
        """Whether every device is a member of one view that all of them know."""
        newest = self.newest_view()
        if newest is None:
            return False
        members = {node.device for node in self.nodes.values()} - self.leaving
        same = (n.machine.view is not None and n.machine.view.number == newest.number
                for n in self.nodes.values() if n.up)  # fmt: skip
        return set(newest.members) == members and all(same)
