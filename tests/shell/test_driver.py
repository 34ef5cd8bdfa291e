"""The trio driver under a virtual clock: order of writes, messages and events; waking; lag."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from p2ptrain.agreement.events import PlanDecided, ProposalReceived
from p2ptrain.agreement.machine import Agreement
from p2ptrain.agreement.messages import Accept, Decided, Propose
from p2ptrain.errors import InvariantBroken, RemoteProtocolError
from p2ptrain.ids import DeviceId
from p2ptrain.membership.events import MemberDown, MemberSuspected, MemberUp
from p2ptrain.membership.machine import Membership
from p2ptrain.membership.messages import Ack, News
from p2ptrain.runtime.driver import Driver
from p2ptrain.wire.machine import Machine
from tests.sim.plans import device, make_contract, make_plan, make_record

HOME, MEMBER = device(0), device(1)
CONTRACT = make_contract()
PLAN = make_plan(HOME, MEMBER)
PROPOSAL = Propose(plan=PLAN, contract=CONTRACT)


@dataclass
class Shell:
    """Records what a driver asks for, in order; `gate` keeps the disk busy."""

    log: list[tuple[str, object]] = field(default_factory=list)
    gate: trio.Event = field(default_factory=trio.Event)
    changed: trio.Event = field(default_factory=trio.Event)
    driver: Driver[Agreement] | None = None

    def note(self, kind: str, what: object) -> None:
        self.log.append((kind, what))
        self.changed.set()
        self.changed = trio.Event()

    async def wait_for(self, kind: str, count: int = 1) -> None:
        while sum(logged == kind for logged, _ in self.log) < count:
            await self.changed.wait()

    def send(self, to: DeviceId, message: object) -> None:
        self.note("send", message)

    async def persist(self, records: Sequence[object]) -> None:
        self.note("persist", tuple(records))
        await self.gate.wait()
        self.note("durable", tuple(records))

    def on_event(self, event: object) -> None:
        self.note("event", event)
        if isinstance(event, ProposalReceived) and self.driver is not None:
            self.driver.call(Agreement.accept, event.plan.digest, self.driver.now())

    def on_violation(self, sender: DeviceId, error: RemoteProtocolError) -> None:
        self.note("violation", (sender, str(error)))

    def kinds(self) -> list[tuple[str, type]]:
        return [(kind, type(what)) for kind, what in self.log]


def member_driver(shell: Shell) -> Driver[Agreement]:
    shell.driver = Driver(
        Agreement(device=MEMBER, rng=random.Random(1)),
        send=shell.send,
        persist=shell.persist,
        on_event=shell.on_event,
        on_violation=shell.on_violation,
    )
    return shell.driver


def membership_driver(shell: Shell) -> Driver[Membership]:
    core = Membership(own=make_record(HOME), rng=random.Random(1))
    return Driver(
        core,
        send=shell.send,
        on_event=shell.on_event,
        on_violation=shell.on_violation,
        lag=core.lag,
    )


async def test_nothing_is_sent_before_it_is_durable(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    shell = Shell()
    driver = member_driver(shell)
    await nursery.start(driver.run)
    await driver.deliver(HOME, PROPOSAL)
    await shell.wait_for("persist")
    # The disk is slow: time passes, the machine wants to repeat, and nothing may leave.
    await trio.sleep(3.0)
    assert [kind for kind, _ in shell.log] == ["event", "persist"]
    shell.gate.set()
    await shell.wait_for("send")
    assert [kind for kind, _ in shell.log[:4]] == ["event", "persist", "durable", "send"]
    assert isinstance(shell.log[3][1], Accept)


async def test_input_during_a_write_waits_for_its_own_write(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    shell = Shell()
    driver = member_driver(shell)
    await nursery.start(driver.run)
    await driver.deliver(HOME, PROPOSAL)
    await shell.wait_for("persist")
    key = {"run": PLAN.run, "lineage": PLAN.lineage, "view": PLAN.view, "plan": PLAN.digest}
    driver.call(Agreement.receive, Decided(**key), HOME, driver.now())
    await trio.testing.wait_all_tasks_blocked()
    shell.gate.set()
    await shell.wait_for("event", 2)
    assert [kind for kind, _ in shell.log] == [
        *("event", "persist", "durable", "send"),
        *("persist", "durable", "event"),
    ]
    assert isinstance(shell.log[-1][1], PlanDecided)


async def test_violation_is_reported_and_the_driver_goes_on(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    shell = Shell()
    driver = member_driver(shell)
    await nursery.start(driver.run)
    key = {"run": PLAN.run, "lineage": PLAN.lineage, "view": PLAN.view, "plan": PLAN.digest}
    driver.deliver_nowait(HOME, Decided(**key))
    driver.deliver_nowait(HOME, PROPOSAL)
    await shell.wait_for("event")
    assert shell.log[0] == (
        "violation",
        (HOME, "a plan was decided that this member never accepted"),
    )
    statistics = driver.statistics()
    assert (statistics.received_count, statistics.violation_count) == (2, 1)


async def test_call_wakes_the_driver_and_deadlines_are_kept(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    shell = Shell()
    driver = membership_driver(shell)
    await nursery.start(driver.run)
    await trio.sleep(60.0)
    assert shell.log == []
    began = trio.current_time()
    driver.call(Membership.link_up, MEMBER, driver.now())
    await driver.deliver(MEMBER, News(records=(make_record(MEMBER),)))
    await shell.wait_for("event", 3)
    events = [what for kind, what in shell.log if kind == "event"]
    assert [type(event) for event in events] == [MemberUp, MemberSuspected, MemberDown]
    assert trio.current_time() - began == pytest.approx(5.5, abs=0.01)
    assert driver.statistics().lag_s_max == 0.0


async def test_lag_of_the_loop_is_told_to_the_machine(nursery: trio.Nursery) -> None:
    shell, clock = Shell(), trio.testing.MockClock()

    async def story() -> None:
        driver = membership_driver(shell)
        async with trio.open_nursery() as inner:
            await inner.start(driver.run)
            driver.call(Membership.link_up, MEMBER, driver.now())
            await driver.deliver(MEMBER, News(records=(make_record(MEMBER),)))
            await shell.wait_for("event")
            await trio.testing.wait_all_tasks_blocked()
            clock.jump(30.0)  # as after SIGSTOP: the loop did not run
            await trio.testing.wait_all_tasks_blocked()
            assert driver.machine.alive() == (MEMBER,)
            assert driver.statistics().lag_s_max == pytest.approx(29.5, abs=0.5)
            inner.cancel_scope.cancel()

    await trio.to_thread.run_sync(lambda: trio.run(story, clock=clock))
    assert shell.kinds()[0] == ("send", News)
    assert MemberDown not in [kind for _, kind in shell.kinds()]


async def test_full_inbox_makes_the_link_wait(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    shell = Shell()
    driver = Driver(
        Membership(own=make_record(HOME), rng=random.Random(1)),
        send=shell.send,
        on_event=shell.on_event,
        on_violation=shell.on_violation,
        inbox_max=2,
    )
    for sequence in range(2):
        driver.deliver_nowait(MEMBER, Ack(sequence=sequence))
    with pytest.raises(trio.WouldBlock):
        driver.deliver_nowait(MEMBER, Ack(sequence=2))
    with trio.move_on_after(1.0) as waiting:
        await driver.deliver(MEMBER, Ack(sequence=2))
    assert waiting.cancelled_caught
    await nursery.start(driver.run)
    await driver.deliver(MEMBER, Ack(sequence=2))
    while driver.statistics().received_count < 3:
        await trio.lowlevel.checkpoint()


class _Broken:
    """A machine with a fault each: it spins, or it writes without a journal."""

    def __init__(self, *, due_s: float | None, records: tuple[object, ...]) -> None:
        self._due_s, self._records = due_s, records

    def receive(self, message: object, sender: DeviceId, now: float) -> None:
        raise AssertionError("nothing is delivered here")

    def tick(self, now: float) -> None:
        pass

    def deadline(self) -> float | None:
        return self._due_s

    def writes(self) -> Sequence[object]:
        return self._records

    def outgoing(self) -> Sequence[object]:
        return ()

    def events(self) -> Sequence[object]:
        return ()


@pytest.mark.parametrize(
    ("machine", "phrase"),
    [
        (_Broken(due_s=0.0, records=()), "did not move its deadline"),
        (_Broken(due_s=None, records=("record",)), "without a journal"),
    ],
)
async def test_broken_machine_stops_the_peer(
    autojump_clock: trio.testing.MockClock, machine: Machine, phrase: str
) -> None:
    shell = Shell()
    driver = Driver(
        machine, send=shell.send, on_event=shell.on_event, on_violation=shell.on_violation
    )
    driver.poke()
    with pytest.raises(ExceptionGroup) as caught:
        await driver.run()
    (error,) = caught.value.exceptions
    assert isinstance(error, InvariantBroken)
    assert phrase in str(error)
