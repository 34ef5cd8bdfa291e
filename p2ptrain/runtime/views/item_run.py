"""What every peer of a run does alike in its items: wait, compute, tell, apply, save."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import trio
from numpy.typing import NDArray

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.engine.contract import Array
from p2ptrain.errors import InvariantBroken
from p2ptrain.ids import DeviceId
from p2ptrain.planner.plan import Plan
from p2ptrain.runtime.exchange.bodies import BodyReader
from p2ptrain.runtime.exchange.outlet import Outlet, send_whole
from p2ptrain.runtime.keeping.run_state import LogPlace
from p2ptrain.runtime.reporting.usage import RunMeter
from p2ptrain.runtime.signal import Signal
from p2ptrain.training.collectives import MeetingKey
from p2ptrain.training.contract import Contract
from p2ptrain.training.headers import header_of
from p2ptrain.training.learning_rate import learning_rate
from p2ptrain.training.messages import Done, stamp_of
from p2ptrain.training.program import Item, Program
from p2ptrain.training.step_record import StepRecord
from p2ptrain.wire.frames import TensorHeader

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageHooks:
    """What a stage asks of the run that it is part of."""

    save: Callable[[Item], Awaitable[None]]
    """Keep the stage's state as it is now, for a checkpoint or a replica."""
    done: Callable[[Done], None]
    """Tell all members that the step's gradients are complete here."""
    committed: Callable[[int], Awaitable[StepRecord]]
    """Wait until a step may be applied. NumericsError: nobody applies it, the run ends."""
    log: Callable[[LogPlace, tuple[Array, ...]], None]
    """Keep a copy of what is sent at one place in a training step."""
    clock_ns: Callable[[], int]
    """By which compute is timed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlace:
    """Where in a run a peer's work is, and whom it speaks to."""

    plan: Plan
    contract: Contract
    manifest: Manifest
    program: Program
    outlet: Outlet
    meter: RunMeter
    device: DeviceId
    signal: Signal
    hooks: StageHooks


class Updated(Protocol):
    """What applies updates to what this device has of a model."""

    def square_sums(self) -> NDArray[np.float64]:
        """Of the step's gradients, one per tensor."""

    def update(self, *, step: int, learning_rate: float, clip_scale: float) -> None:
        """As `StageWorker.update`."""


class Inbox(Protocol):
    """Takes in the tensors of a device's part of a view; as `TensorInbox`."""

    async def receive(
        self, sender: DeviceId, header: TensorHeader, length: int, reader: BodyReader
    ) -> None:
        """Take one frame off a data link."""

    def deliver(self, header: TensorHeader, array: Array) -> None:
        """Take what this very peer feeds."""

    def begun(self) -> bool:
        """Whether anything of the open item has arrived."""

    def fed(self, kind: str, microbatch: int) -> tuple[Array, ...] | None:
        """All inputs, or labels and loss weight, of a microbatch; None before they are here."""

    def close(self) -> None:
        """Accept nothing more."""


def apply_update(worker: Updated, contract: Contract, record: StepRecord) -> None:
    """The update of a recorded step, the same whenever and wherever it is applied; blocking."""
    choice = contract.optimizer
    rate = learning_rate(choice, step=record.step, steps=contract.steps)
    worker.update(step=record.step, learning_rate=rate, clip_scale=record.clip_scale)


class ItemRun:
    """Works through the program of a view, with one compute thread; `_run_item` says how."""

    inbox: Inbox

    def __init__(self, place: RunPlace, worker: Updated) -> None:
        self._place, self._updated = place, worker
        self._plan, self._contract, self._manifest = place.plan, place.contract, place.manifest
        self._program, self._outlet, self._meter = place.program, place.outlet, place.meter
        self._device, self._signal, self._hooks = place.device, place.signal, place.hooks
        self._stamp = stamp_of(place.plan)
        self._limiter = trio.CapacityLimiter(1)
        self._compute_ns = 0
        """Of the present item."""

    async def _save(self, item: Item) -> None:
        await self._hooks.save(item)
        self._program.complete(item)

    async def _begins(self, item: Item) -> bool:
        """Wait until an item has begun somewhere; False: the session ends before it."""
        with self._meter.phase("wait"):
            await self._signal.wait_until(
                lambda: self.inbox.begun() or self._program.current != item
            )
        return self._program.current == item

    async def _end_step(self, step: int, loss: float, *, tells: bool, counts: bool) -> None:
        """Tell what this peer found, then apply the update once it can no longer be lost.

        Args:
            step: The step, whose gradients are complete here.
            loss: What this peer knows of it.
            tells: Whether its loss is part of the step's.
            counts: Whether its square sums are; else they are another peer's, too.
        """
        sums = await self._compute(self._updated.square_sums)
        told = sums if counts else 0.0 * sums
        done = Done(
            stamp=self._stamp,
            step=step,
            square_sums=told.astype("<f8").tobytes(),
            loss=loss if tells else None,
            skip=not bool(np.isfinite(sums).all() and math.isfinite(loss)),
            compute_ns=self._compute_ns,
        )
        self._hooks.done(done)
        with self._meter.phase("wait"):
            record = await self._hooks.committed(step)
        await self._compute(lambda: apply_update(self._updated, self._contract, record))
        usage = self._meter.usage(self._stamp, step=step)
        self._outlet.send(self._plan.home, usage)

    async def _act(self, work: Callable[[], _T]) -> _T:
        """Compute what the plan has priced, and count its time."""

        def timed() -> tuple[_T, int]:
            began_ns = self._hooks.clock_ns()
            done = work()
            return done, self._hooks.clock_ns() - began_ns

        done, took_ns = await self._compute(timed)
        self._compute_ns += took_ns
        return done

    async def _compute(self, work: Callable[[], _T]) -> _T:
        with self._meter.phase("compute"):
            return await trio.to_thread.run_sync(work, limiter=self._limiter)

    async def _wait_fed(self, kind: str, microbatch: int) -> tuple[Array, ...]:
        with self._meter.phase("wait"):
            await self._signal.wait_until(lambda: self.inbox.fed(kind, microbatch) is not None)
        arrays = self.inbox.fed(kind, microbatch)
        if arrays is None:
            raise InvariantBroken("fed data vanished")
        return arrays

    async def _wait_labels(self, microbatch: int) -> tuple[Array, float]:
        """Labels, and what the summed loss is multiplied by."""
        labels, weight = await self._wait_fed("labels", microbatch)
        return labels, float(weight[0])

    async def _send_of(
        self, item: Item, device: DeviceId, kind: str, key: MeetingKey, piece: Array
    ) -> None:
        """Send one frame of a meeting of an item."""
        header = self._header(item, kind, key.microbatch, key.segment)
        await send_whole(self._outlet, device, dataclasses.replace(header, index=key.index), piece)

    def _header(self, item: Item, kind: str, microbatch: int, segment: int) -> TensorHeader:
        return header_of(self._stamp, item, kind, microbatch, segment)
