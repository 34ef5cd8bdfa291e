"""A peer's process that fails at one exact moment, and writes down what it computed.

    python -m tests.e2e.faulty_peer join ...

It is `p2ptrain` itself, with a look into the places where a run can be hit. Every peer of a case
runs it with the same wish in the environment; the one whose role it is fulfils it, once.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from p2ptrain.cli.main import main
from p2ptrain.net.tls_link import TlsLink
from p2ptrain.runtime.compute.replay import Replayer
from p2ptrain.runtime.compute.stage import StageWorker
from p2ptrain.runtime.exchange.asking import Asker
from p2ptrain.runtime.exchange.blobs import BlobExchange
from p2ptrain.runtime.journal import RunJournal
from p2ptrain.runtime.keeping.replication import ReplicaKeeper, SnapshotOwner
from p2ptrain.runtime.runs.proposing import Proposing
from p2ptrain.runtime.runs.run_member import RunMember
from p2ptrain.runtime.views.view_work import ViewWork
from p2ptrain.wire.flows import Flow

FAULT_VARIABLE: Final = "P2PTRAIN_TEST_FAULT"
EVENTS_VARIABLE: Final = "P2PTRAIN_TEST_EVENTS"
CUT_S: Final = 12.0
HOLD_S: Final = 0.01
WHOLE_STEP_MIN: Final = 6
Function = Callable[..., Any]  # Any: whatever is wrapped


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What shall happen, where and when."""

    role: str
    """first, middle, last, holder; replayer or proposer: whoever restores or plans."""
    phase: str
    step: int
    how: str
    """kill, stop, cut, leave."""


class Saboteur:
    """Knows this process's role and hits it at the moment that is wished for."""

    def __init__(self, faults: list[Fault], events: Path) -> None:
        self._faults, self._events = faults, events
        self._roles: set[str] = set()
        self.replaying = False
        self._hold = threading.Event()
        self.keeps_replicas = True
        self.offered_step = 0
        self.member: RunMember | None = None
        self.link_open = trio.Event()
        self.link_open.set()

    def enter(self, work: ViewWork) -> None:
        """A view begins: roles are those of the first view that this process takes part in."""
        plan, own = work.plan, work._services.device
        self.note(
            view=plan.view,
            device=own,
            members=plan.members,
            aims=bool(work.view.aim),
            spans={s.device: [s.segments.start, s.segments.stop] for s in plan.stages},
            replays=[] if work.view.restoration is None else [
                [replay.replayer, replay.span.segments.start, replay.span.segments.stop]
                for replay in work.view.restoration.replays
            ],
        )  # fmt: skip
        if plan.view != 1:
            return
        self.keeps_replicas = own in plan.replicas
        index, last = plan.stage_of(own), len(plan.stages) - 1
        if index is not None:
            self._roles.add("first" if index == 0 else "last" if index == last else "middle")
        if own == plan.home:
            self._roles.add("holder")

    def reach(self, phase: str, step: int) -> None:
        """A phase of a step begins here, in a worker thread: hold it until it may be hit."""
        for fault in self._due(phase, step):
            while not (self._is_protected(fault) or self._is_done(fault)):
                self._hold.wait(HOLD_S)
            self._fulfil(fault, step)

    def pace(self, step: int) -> None:
        """Let no replica set be overtaken by the next before the one that shall be hit."""
        for fault in self._due("replicate", step):
            while not (self._is_protected(fault) or self._is_done(fault)):
                self._hold.wait(HOLD_S)

    async def reach_async(self, phase: str, step: int) -> None:
        """The same in the event loop; a replica that is held would itself keep sets from being
        whole, so the next one is hit instead."""
        for fault in self._due(phase, step):
            if phase == "replicate" and not self._is_protected(fault):
                continue
            while not (self._is_protected(fault) or self._is_done(fault)):  # noqa: ASYNC110 the run's
                await trio.sleep(HOLD_S)
            self._fulfil(fault, step)

    def _due(self, phase: str, step: int) -> list[Fault]:
        return [
            fault
            for fault in self._faults
            if (fault.role in self._roles or fault.role in ("replayer", "proposer"))
            and fault.phase == phase
            and step >= fault.step
        ]

    def _fulfil(self, fault: Fault, step: int) -> None:
        if fault in self._faults:
            self._faults.remove(fault)
            if self._claim(fault):
                self.note(fault=fault.how, phase=fault.phase, step=step, at=time.time())
                self._strike(fault.how)

    def _is_protected(self, fault: Fault) -> bool:
        """Whether a loss may cost nothing now, after the second replica set or a later one; a
        second loss, amid a recovery, waits for nothing."""
        member = self.member
        if fault.step == 0 or member is None:
            return fault.step == 0
        whole = member.state.whole_step or 0
        return whole >= WHOLE_STEP_MIN and member.safety().startswith("protected")

    def _is_done(self, fault: Fault) -> bool:
        """Whether another process has fulfilled this wish: two may have the same role."""
        return self._path(fault).exists()

    def _path(self, fault: Fault) -> Path:
        return self._events.parent / f"struck-{fault.role}-{fault.phase}-{fault.step}"

    def _claim(self, fault: Fault) -> bool:
        """Whether no other process has fulfilled this wish, and this one does now."""
        try:
            os.close(os.open(self._path(fault), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def note(self, **what: object) -> None:
        """Write one line down, whole, so that a kill loses nothing."""
        with self._events.open("a") as stream:
            stream.write(json.dumps(what) + "\n")

    def _strike(self, how: str) -> None:
        if how == "cut":
            self.link_open = trio.Event()
            trio.from_thread.run_sync(self._heal_later) if not _in_trio() else self._heal_later()
            return
        number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "leave": signal.SIGTERM}[how]
        os.kill(os.getpid(), number)

    def _heal_later(self) -> None:
        trio.lowlevel.spawn_system_task(self._heal, self.link_open)

    async def _heal(self, opened: trio.Event) -> None:
        await trio.sleep(CUT_S)
        self.note(healed=True)
        opened.set()


def _in_trio() -> bool:
    try:
        trio.lowlevel.current_task()
    except RuntimeError:
        return False
    return True


def wrap(owner: type, name: str, before: Function) -> None:
    """Call `before` with the same arguments ahead of a method."""
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def wrapped(self: object, *args: object, **kwargs: object) -> object:
        before(self, *args, **kwargs)
        return inner(self, *args, **kwargs)

    setattr(owner, name, wrapped)


def wrap_async(owner: type, name: str, place: Function, saboteur: Saboteur) -> None:
    """The same for an async method, whose phase and step `place` tells."""
    inner = getattr(owner, name)

    @functools.wraps(inner)
    async def wrapped(self: object, *args: object, **kwargs: object) -> object:
        await saboteur.reach_async(*place(self, *args, **kwargs))
        return await inner(self, *args, **kwargs)

    setattr(owner, name, wrapped)


def sabotage(saboteur: Saboteur) -> None:
    """Put a look into every phase."""
    hit, note = saboteur.reach, saboteur.note
    training = {"step": 0}

    def forward(worker: StageWorker, **given: Any) -> None:  # Any: the method's own arguments
        training["step"] = given["step"]
        if given["training"] and not saboteur.replaying:
            saboteur.pace(given["step"])
        if given["training"] and given["microbatch"] == 1 and not saboteur.replaying:
            hit("forward", given["step"])

    def backward(worker: StageWorker, **given: Any) -> None:  # Any: as above
        if given["microbatch"] == 1 and not saboteur.replaying:
            hit("backward", training["step"])

    def update(worker: StageWorker, **given: Any) -> None:  # Any: as above
        if not saboteur.replaying:
            hit("update", given["step"])
        span = [worker.segments.start, worker.segments.stop]
        note(update=given["step"], span=span, replay=saboteur.replaying)

    def run_step(replayer: Replayer, inputs: object, record: Any) -> None:  # Any: a StepRecord
        hit("replay", record.step)

    wrap(StageWorker, "forward", forward)
    wrap(StageWorker, "backward", backward)
    wrap(StageWorker, "backward_cotangents", backward)
    wrap(StageWorker, "update", update)
    wrap(Replayer, "run_step", run_step)
    wrap_async(ReplicaKeeper, "_keep", lambda k, w: ("replicate", w.saved.step), saboteur)
    wrap_async(Proposing, "propose", lambda p, w: ("replan", w.resume_step), saboteur)
    wrap(ViewWork, "run", lambda work: saboteur.enter(work))
    wrap(RunMember, "_work_in", lambda member, view: setattr(saboteur, "member", member))
    _mark_replays(saboteur)
    _count_states(saboteur)
    _hit_as_owner(saboteur)
    _hit_after_journal(saboteur)
    _cut_links(saboteur)


def _mark_replays(saboteur: Saboteur) -> None:
    inner = Replayer.run_step

    def run_step(replayer: Replayer, inputs: Any, record: Any) -> None:  # Any: the method's own
        saboteur.replaying = True
        try:
            inner(replayer, inputs, record)
        finally:
            saboteur.replaying = False

    Replayer.run_step = run_step  # type: ignore[method-assign]  # a test's look into it


def _count_states(saboteur: Saboteur) -> None:
    inner = Asker.fetch

    async def fetch(
        asker: Asker, device: Any, what: str, segment: int, step: int, *rest: Any
    ) -> bytes:  # Any: the method's own
        content = await inner(asker, device, what, segment, step, *rest)
        if what == "state":
            saboteur.note(state=segment, step=step, bytes=len(content))
        return content

    Asker.fetch = fetch  # type: ignore[method-assign]  # a test's look into it


def _hit_as_owner(saboteur: Saboteur) -> None:
    """Replication where a device keeps nothing: its keeper is fetching its own stage's state. Of
    three stages the middle one's neighbours keep each other's, so its device keeps none."""
    inner = BlobExchange._serve_chunks

    async def serve(
        blobs: BlobExchange, device: Any, request: Any, content: Any, flow: Flow
    ) -> None:  # Any: the method's own
        if flow.kind == "state" and not saboteur.keeps_replicas:
            await saboteur.reach_async("replicate", saboteur.offered_step)
        await inner(blobs, device, request, content, flow)

    BlobExchange._serve_chunks = serve  # type: ignore[method-assign]  # a test's look into it

    def offer(owner: SnapshotOwner, snapshot: Any) -> None:  # Any: the method's own
        saboteur.offered_step = snapshot.step

    wrap(SnapshotOwner, "_offer", offer)


def _hit_after_journal(saboteur: Saboteur) -> None:
    """The commit: durable here, and nobody knows."""
    inner = RunJournal.append

    async def append(journal: RunJournal, records: Any) -> None:  # Any: journal records
        await inner(journal, records)
        for record in records:
            for step in getattr(record, "records", ()):
                await saboteur.reach_async("commit", step.step)

    RunJournal.append = append  # type: ignore[method-assign]  # a test's look into it


def _cut_links(saboteur: Saboteur) -> None:
    """A cut link carries nothing, in either direction, and nobody is told."""
    for name in ("_fill", "_flush"):
        inner = getattr(TlsLink, name)

        def cut(inner: Function = inner) -> Function:
            async def wrapped(link: TlsLink, *args: object, **kwargs: object) -> object:
                if not saboteur.link_open.is_set():
                    await saboteur.link_open.wait()
                return await inner(link, *args, **kwargs)

            return wrapped

        setattr(TlsLink, name, cut())


if __name__ == "__main__":
    wishes = [Fault(**each) for each in json.loads(os.environ.get(FAULT_VARIABLE, "[]"))]
    sabotage(Saboteur(wishes, Path(os.environ[EVENTS_VARIABLE])))
    sys.exit(main())
