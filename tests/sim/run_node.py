"""A simulated device: the production machine, its journal, wishes, proposals and a stage."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from p2ptrain.agreement.run_events import (
    ProposalWanted,
    StepCommitted,
    ViewDecided,
)
from p2ptrain.agreement.run_journal import (
    AcceptanceRecord,
    RunJournalRecord,
    StepsRecord,
    ViewRecord,
    decode_run_record,
    encode_run_record,
)
from p2ptrain.agreement.run_machine import RunMachine
from p2ptrain.agreement.view import View
from p2ptrain.errors import RemoteProtocolError
from p2ptrain.ids import DeviceId
from p2ptrain.planner.plan import Plan
from p2ptrain.recovery.planning import Losses, Unrecoverable, restoration
from p2ptrain.recovery.protection import Protected, Provisional, Safeguards, protection
from p2ptrain.recovery.restoration import Restoration
from p2ptrain.recovery.successor import Succession, successor_plans
from tests.sim.run_checkers import Violation
from tests.sim.run_model import Value, record_of
from tests.sim.run_shell import Disk, Position, StageDone, place
from tests.sim.run_stage import SimStage
from tests.sim.run_views import CONTRACT, make_profile

if TYPE_CHECKING:
    from tests.sim.run_world import RunWorld

PLANNING_S = (0.02, 0.5)


class RunNode:
    """One device: what survives a crash is its disk."""

    def __init__(self, device: DeviceId, world: RunWorld) -> None:
        self.device, self.world = device, world
        self.disk = Disk()
        self.life = 0
        self.up = self.frozen = False
        self.slowness_s = 0.0
        self.has_slow_disk = False
        self.seen: dict[DeviceId, int] = {}
        """Others that can be talked to, and in which life."""
        self.hindrance = ""
        self._clock = (1.0, 0.0)
        self._backlog: list[tuple[object, DeviceId, int]] = []
        self._heard_lives: dict[DeviceId, int] = {}
        self._view_lives: dict[DeviceId, int] = {}
        self._complaints: set[DeviceId] = set()
        self._dones: dict[tuple[Position, int], dict[DeviceId, dict[int, Value]]] = {}
        self._wake_at: float | None = None
        self.machine: RunMachine
        self.stage: SimStage

    # The process.

    def start(self) -> None:
        """A process begins with what the disk has; its clock is not the last one's."""
        rng = self.world.rng
        self.life, self.up, self.frozen = self.life + 1, True, False
        self._clock = (rng.uniform(0.98, 1.02), rng.uniform(-1000.0, 1000.0))
        self.seen, self._backlog, self._wake_at = {}, [], None
        self._heard_lives = {}
        self._view_lives, self._complaints, self._dones = {}, set(), {}
        self.stage = SimStage(self)
        self.machine = RunMachine(
            device=self.device, rng=random.Random(rng.getrandbits(32)),
            inventory=self.stage.inventory, rules=self.world.rules,
            volatile=self.has_slow_disk and not self.world.flaws.count_memory,
        )  # fmt: skip
        self.machine.restore([self._read(line) for line in self.disk.journal], self.clock())
        if self.machine.view is not None:
            # Whatever stage it had is lost: the members must know, and it cannot begin the view.
            self.stage.view = self.machine.view
            self.stage.sets.begin(self.machine.view)
            if self.stage.own is not None:
                self.stage.complain()
        self.settle()

    def found(self, view: View) -> None:
        self.machine.found(view, self.clock())
        self.settle()

    def force(self, view: View) -> None:
        self.machine.force(view, self.clock())
        self.settle()

    def crash(self, *, disk: bool) -> None:
        self.up = False
        self.world.checker.on_loss(self.device)
        if not disk:
            self.disk = Disk()

    def thaw(self) -> None:
        self.frozen = False
        backlog, self._backlog = self._backlog, []
        for message, sender, spoken_in in backlog:
            self.hear(message, sender, spoken_in, self.life)
        self.settle()

    def clock(self) -> float:
        rate, offset = self._clock
        return self.world.now * rate + offset

    def _read(self, line: object) -> RunJournalRecord:
        return decode_run_record(line) if isinstance(line, bytes) else line  # type: ignore[return-value]

    # The driver's part.

    def hear(self, message: object, sender: DeviceId, spoken_in: int, life: int) -> None:
        """A control message arrives, unless the process it was for is gone.

        With the first link to a later life of its sender the links to earlier ones are closed.
        """
        if not self.up or self.life != life or spoken_in < self._heard_lives.get(sender, 0):
            return
        if self.frozen:
            self._backlog.append((message, sender, spoken_in))
            return
        self._heard_lives[sender] = spoken_in
        try:
            self.machine.receive(message, sender, self.clock())
        except RemoteProtocolError as error:
            raise Violation(f"{self.device[0]} got an impossible message: {error}") from error
        self.settle()

    def take(self, message: object, sender: DeviceId) -> None:
        self.stage.take(message, sender)

    def settle(self) -> None:
        """Write, then send, then tell, as the driver does; a crash may come between."""
        while self.up:
            writes, sends = self.machine.writes(), self.machine.outgoing()
            events = self.machine.events()
            if not (writes or sends or events):
                break
            self.disk.journal += self._written(writes)
            if len(self.disk.journal) > 60:
                self.disk.journal = self._written(self.machine.snapshot())
            # Votes are few beside steps, and more depends on their being durable.
            votes = any(isinstance(write, AcceptanceRecord | ViewRecord) for write in writes)
            chance = self.world.crash_after_write * (20.0 if votes else 1.0)
            if writes and self.world.rng.random() < chance:
                self.world.crash(self)
                return
            for out in sends:
                self.world.post(self, out.to, out.message)
            for event in events:
                self._on_event(event)
        if self.up:
            self._schedule()

    def _written(self, records: Sequence[RunJournalRecord]) -> list[object]:
        """What is on disk of them: with a slow one, not the steps."""
        whole, slow = self.world.whole_codec, self.has_slow_disk
        kept = [each for each in records if not (slow and isinstance(each, StepsRecord))]
        return [encode_run_record(each) if whole else each for each in kept]

    def _schedule(self) -> None:
        due = self.machine.deadline()
        if due is None or self.frozen:
            return
        rate, offset = self._clock
        at = max(self.world.now, (due - offset) / rate) + 1e-6
        if self._wake_at is None or at < self._wake_at - 1e-9 or self._wake_at < self.world.now:
            self._wake_at, life = at, self.life
            self.world.at(at - self.world.now, lambda: self._wake(at, life))

    def _wake(self, at: float, life: int) -> None:
        if self.up and self.life == life and not self.frozen and self._wake_at == at:
            self._wake_at = None
            self.machine.tick(self.clock())
            after = self.machine.deadline()
            if after is not None and after <= self.clock():
                raise Violation("a machine did not move its deadline")
            self.settle()

    def _on_event(self, event: object) -> None:
        match event:
            case StepCommitted():
                self._committed(event)
            case ViewDecided():
                self._decided(event.view)
            case ProposalWanted():
                life = self.life
                self.world.at(self.world.rng.uniform(*PLANNING_S), lambda: self._plan(event, life))

    # Steps and views.

    def told(self, step: int) -> None:
        """The own stage gives its result of a step, or has given all up to it."""
        view = self.stage.view
        assert view is not None
        self.machine.told(step, plan=view.plan.digest)

    def note_done(self, done: StageDone, sender: DeviceId) -> None:
        """Whoever holds every stage's `done` makes the record."""
        view = self.machine.view
        if view is None or (view.lineage, view.number) != done.position:
            return
        key = (done.position, done.step)
        found = self._dones.setdefault(key, {})
        found[sender] = done.gradients
        if {stage.device for stage in view.plan.stages} <= found.keys():
            gradients = {s: g for each in found.values() for s, g in each.items()}
            record = record_of(done.step, view.number, gradients)
            del self._dones[key]
            self.machine.complete(record, self.clock(), plan=view.plan.digest)
            self.settle()

    def _committed(self, event: StepCommitted) -> None:
        view = self.machine.view
        assert view is not None
        self.world.checker.on_committed(self, view, event.record)
        self.stage.apply(event.record)
        verdict = self.protection()
        if isinstance(verdict, Protected):
            self.world.checker.on_protected(self, event.record.step)

    def _decided(self, view: View) -> None:
        self.world.checker.on_view(self, view)
        self._complaints.clear()
        self._dones.clear()
        self._view_lives = dict(self.seen)
        self.stage.begin(view)
        if self.device in self.world.leaving and self.device not in view.members:
            self.world.at(3.0, lambda: self._gone(view))
        self.consider()

    def _gone(self, view: View) -> None:
        """It left: its process ends once others have had time to take its state."""
        if self.up and self.device in self.world.leaving:
            self.world.crash(self)

    def protection(self) -> Protected | Provisional:
        view, nodes = self.machine.view, self.world.nodes
        assert view is not None
        same = {d for d, life in self.seen.items() if life == self._view_lives.get(d, life) != 0}
        present = {self.device, *same} & set(view.members)
        near = [nodes[d] for d in present if nodes[d].up]
        whole = self.stage.sets.whole_step(present)
        copies = {node.device for node in near if node.disk.has_data}
        if self.world.flaws.assume_copies:
            copies = set(view.plan.holders)
            whole = self.machine.statistics().committed_step
        return protection(
            view.plan,
            Safeguards(
                present=present, whole_step=whole, data_copies=copies,
                log_full=any(node.stage.log.full for node in near),
                record_count=len(self.machine.records),
                newest_step=self.machine.statistics().committed_step,
                replicated_step=self.machine.replicated_step,
            ),
        )  # fmt: skip

    # Wishes.

    @property
    def linked(self) -> tuple[DeviceId, ...]:
        return tuple(sorted({self.device, *(d for d in self.seen if self.seen[d])}))

    def notice(self, subject: DeviceId, life: int) -> None:
        """A link came up (to that life of the other), or is gone (0)."""
        self.seen[subject] = life
        if life and not self._view_lives.get(subject, 0):
            self._view_lives[subject] = life
        self.machine.reachable(frozenset(self.linked), self.clock())
        self.settle()
        self.consider()

    def complained(self, sender: DeviceId) -> None:
        self._complaints.add(sender)
        self.consider()

    def consider(self) -> None:
        """Want a next view while anything speaks for it, and no longer."""
        view = self.machine.view
        if not self.up or view is None or self.device not in view.members:
            return
        reasons = dict(self._reasons(view))
        for reason in reasons.keys() - set(self.machine.wanted):
            self.machine.want(reason, self.clock(), after_s=reasons[reason])
        if not reasons:
            self.machine.unwant(self.clock())
        self.settle()

    def _reasons(self, view: View) -> list[tuple[str, float]]:
        found = []
        for other in self.world.nodes:
            life = self.seen.get(other, 0)
            inside, leaves = other in view.members, other in self.world.leaving
            name = other[0]
            if other == self.device:
                if leaves:
                    found.append(("i leave", 0.1))
            elif inside and not life:
                found.append((f"{name} is gone", 0.5))
            elif inside and life != self._view_lives.get(other, life):
                found.append((f"{name} restarted", 0.3))
            elif inside and leaves:
                found.append((f"{name} leaves", 0.1))
            elif not inside and life and not leaves:
                found.append((f"{name} joined", 1.0))
        return found + [(f"{name[0]} cannot go on", 0.3) for name in sorted(self._complaints)]

    # Proposals.

    def _plan(self, wanted: ProposalWanted, life: int) -> None:
        if not self.up or self.life != life:
            return
        if self.frozen:
            self.world.at(0.5, lambda: self._plan(wanted, life))
            return
        answer = self.answer(wanted)
        if isinstance(answer, View):
            self.machine.propose(answer, self.clock(), ballot=wanted.ballot)
        else:
            self.machine.cannot_propose(answer, self.clock(), ballot=wanted.ballot)
        self.settle()

    def answer(self, wanted: ProposalWanted) -> View | str:
        """The first candidate whose states can be had, or why there is none."""
        promises = {each.device: each.inventory for each in wanted.promises}
        # A member in reserve that is only slow to promise stays, or it would come and go for ever.
        owners = {stage.device for stage in wanted.base.plan.stages}
        usable = {d for d in self.linked if d in promises or d not in owners} - self.world.leaving
        holding = [d for d, held in promises.items() if held.has_data]
        reason = f"{self.device[0]} at {self.world.now:.3f}: {', '.join(self.machine.wanted)}"
        succession = Succession(
            base=wanted.base.plan, usable=usable, holding=holding, reason=reason
        )
        problem = "the data is not here"
        plans = successor_plans(succession, place)
        for remakes_live, plan in itertools.product((False, True), plans):
            found = restoration(
                Losses(
                    base=wanted.base, plan=plan, promises=promises, records=wanted.records,
                    resume_step=wanted.resume_step, tie_segments=self.world.model.ties,
                    remakes_live=remakes_live,
                )
            )  # fmt: skip
            if isinstance(found, Unrecoverable):
                problem = found.sentence
            else:
                return view_after(wanted, plan, found)
        return problem


def view_after(wanted: ProposalWanted, plan: Plan, found: Restoration) -> View:
    """The view that a shell proposes."""
    return View(
        plan=replace(plan, step_ns=max(1, plan.step_ns)), contract=CONTRACT,
        profiles=tuple(map(make_profile, plan.members)), previous=wanted.base.plan.digest,
        resume_step=wanted.resume_step, records=wanted.records, restoration=found,
    )  # fmt: skip
