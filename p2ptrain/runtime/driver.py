"""The one trio driver that runs any deciding core.

Order is its whole job: after each input it takes what the machine wants written, sent and told at
one instant, waits until the writes are durable, then sends, then tells. It decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Concatenate, Generic, ParamSpec, TypeVar

import trio

from p2ptrain import limits
from p2ptrain.errors import InvariantBroken, RemoteProtocolError
from p2ptrain.ids import DeviceId
from p2ptrain.wire.machine import Machine

M = TypeVar("M", bound=Machine)
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """One message that arrived over an authenticated link."""

    sender: DeviceId
    message: object


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverStatistics:
    """What a driver has done so far."""

    received_count: int
    violation_count: int
    sent_count: int
    written_count: int
    event_count: int
    lag_s_max: float
    """The latest that it woke after a deadline."""


async def persist_nothing(records: Sequence[object]) -> None:
    """For machines that keep nothing on disk."""
    if records:
        raise InvariantBroken("a machine without a journal wants to write")
    await trio.lowlevel.checkpoint()


def ignore_lag(seconds: float, now: float) -> None:
    """For machines that judge nobody by silence."""


class Driver(Generic[M]):
    """Runs one machine. The owner of the nursery that runs `run` ends it by cancelling.

    Args:
        machine: The core; nobody else calls its six verbs.
        send: Put one message on the link to a device; never waits, may drop.
        persist: Make records durable; returns when they are.
        on_event: Take one event; may call `call`.
        on_violation: A sender broke the protocol; drop its link.
        lag: Told (seconds, now) when the driver woke late; `machine.lag` where there is one.
        inbox_max: Deliveries that may wait; then `deliver` waits, and so does the link.
    """

    def __init__(
        self,
        machine: M,
        *,
        send: Callable[[DeviceId, object], None],
        on_event: Callable[[object], None],
        on_violation: Callable[[DeviceId, RemoteProtocolError], None],
        persist: Callable[[Sequence[object]], Awaitable[None]] = persist_nothing,
        lag: Callable[[float, float], None] = ignore_lag,
        inbox_max: int = limits.CONTROL_QUEUE_MAX,
    ) -> None:
        self.machine = machine
        self._send = send
        self._persist = persist
        self._on_event = on_event
        self._on_violation = on_violation
        self._lag = lag
        self._inbox, self._deliveries = trio.open_memory_channel[Delivery](inbox_max)
        self._wake = trio.Event()
        self._flushing = trio.Lock()
        self._counts = dict.fromkeys(("received", "violation", "sent", "written", "event"), 0)
        self._lag_s_max = 0.0

    def now(self) -> float:
        """The clock that every input of the machine is given."""
        return trio.current_time()

    def call(self, method: Callable[Concatenate[M, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call an input of the machine, `driver.call(Membership.link_up, device, now)`.

        Runs at once; what follows from it is written and sent by `run`, soon.
        """
        result = method(self.machine, *args, **kwargs)
        self.poke()
        return result

    def poke(self) -> None:
        """Make `run` look at the machine again."""
        self._wake.set()

    async def deliver(self, sender: DeviceId, message: object) -> None:
        """Hand over one message; waits while the inbox is full. Cancelled: not delivered."""
        await self._inbox.send(Delivery(sender=sender, message=message))

    def deliver_nowait(self, sender: DeviceId, message: object) -> None:
        """Hand over one message at once; trio.WouldBlock when the inbox is full."""
        self._inbox.send_nowait(Delivery(sender=sender, message=message))

    def statistics(self) -> DriverStatistics:
        """Counts since the start."""
        counts = {f"{name}_count": count for name, count in self._counts.items()}
        return DriverStatistics(**counts, lag_s_max=self._lag_s_max)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Drive until cancelled; then what was not yet written was not sent either."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._receive_all)
            nursery.start_soon(self._keep_time)
            task_status.started()

    async def _receive_all(self) -> None:
        async for delivery in self._deliveries:
            self._counts["received"] += 1
            try:
                self.machine.receive(delivery.message, delivery.sender, self.now())
            except RemoteProtocolError as error:
                self._counts["violation"] += 1
                self._on_violation(delivery.sender, error)
            # The deadline may have moved; the timer must not sleep past it.
            self.poke()
            await self._flush()

    async def _keep_time(self) -> None:
        while True:
            due_s = self.machine.deadline()
            with trio.move_on_at(math.inf if due_s is None else due_s):
                await self._wake.wait()
            self._wake = trio.Event()
            if due_s is not None:
                self._note_lag(self.now() - due_s)
            self._tick()
            await self._flush()

    def _tick(self) -> None:
        now = self.now()
        self.machine.tick(now)
        due_s = self.machine.deadline()
        if due_s is not None and due_s <= now:
            raise InvariantBroken("a machine did not move its deadline: it would spin")

    def _note_lag(self, late_s: float) -> None:
        if late_s >= limits.LAG_NOTICED_S:
            self._lag_s_max = max(self._lag_s_max, late_s)
            self._lag(late_s, self.now())

    async def _flush(self) -> None:
        """Write, then send, then tell, until the machine has nothing more to say."""
        async with self._flushing:
            while True:
                # Taken at one instant: a message never overtakes the write it depends on,
                # even when an input arrives while `persist` waits.
                writes, sends = self.machine.writes(), self.machine.outgoing()
                events = self.machine.events()
                if not (writes or sends or events):
                    return
                if writes:
                    await self._persist(writes)
                for outgoing in sends:
                    self._send(outgoing.to, outgoing.message)
                for event in events:
                    self._on_event(event)
                self._count(writes, sends, events)

    def _count(self, *drained: Sequence[object]) -> None:
        for name, items in zip(("written", "sent", "event"), drained, strict=True):
            self._counts[name] += len(items)
