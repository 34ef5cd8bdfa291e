"""One stage of a run on this peer: follow the schedule, exchange tensors, agree on each step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import trio

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.engine.contract import Array
from p2ptrain.errors import InvariantBroken, RemoteProtocolError
from p2ptrain.ids import DeviceId
from p2ptrain.planner.plan import Plan
from p2ptrain.recovery.inventory import LogKind
from p2ptrain.runtime.inbox import TensorInbox
from p2ptrain.runtime.outlet import Outlet, send_whole
from p2ptrain.runtime.run_state import LogPlace
from p2ptrain.runtime.signal import Signal
from p2ptrain.runtime.stage import StageWorker
from p2ptrain.runtime.usage import RunMeter
from p2ptrain.schedule.actions import (
    Action,
    delayed_microbatches,
    evaluation,
    stage_actions,
)
from p2ptrain.training.arrivals import TieSend, arrivals, tied_sends
from p2ptrain.training.contract import Contract
from p2ptrain.training.learning_rate import learning_rate
from p2ptrain.training.messages import Done, Evaluated, stamp_of
from p2ptrain.training.program import Item, Program
from p2ptrain.training.step_record import StepRecord
from p2ptrain.training.step_tensors import expected_tensors
from p2ptrain.training.tensor_codec import encode_all
from p2ptrain.wire.frames import TensorHeader

_T = TypeVar("_T")
SEND_QUEUE_MAX = 8


@dataclass(frozen=True, slots=True)
class Outgoing:
    """Encoded tensors on their way to a neighbour; they stay untouched until they are sent."""

    header: TensorHeader
    arrays: tuple[Array, ...]


class Neighbour:
    """The bounded queue of tensors for one neighbour."""

    def __init__(self, device: DeviceId | None) -> None:
        self.device = device
        self._send, self.outgoing = trio.open_memory_channel[Outgoing](SEND_QUEUE_MAX)

    async def put(self, header: TensorHeader, arrays: tuple[Array, ...]) -> None:
        """Queue one tensor; waits while the queue is full."""
        await self._send.send(Outgoing(header, arrays))

    def close(self) -> None:
        """No more tensors: the sender task ends when the queue is empty."""
        self._send.close()


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


def apply_update(worker: StageWorker, contract: Contract, record: StepRecord) -> None:
    """The update of a recorded step, the same whenever and wherever it is applied; blocking."""
    choice = contract.optimizer
    rate = learning_rate(choice, step=record.step, steps=contract.steps)
    worker.update(step=record.step, learning_rate=rate, clip_scale=record.clip_scale)


class StageRun:
    """Runs this peer's stage from `go` to the end of the session.

    What decides (order of actions, items, totals) comes from pure objects; this class waits and
    calls. Compute runs in a worker thread, one call at a time; only arrays cross.
    """

    def __init__(
        self,
        *,
        plan: Plan,
        contract: Contract,
        manifest: Manifest,
        worker: StageWorker,
        program: Program,
        outlet: Outlet,
        meter: RunMeter,
        device: DeviceId,
        signal: Signal,
        hooks: StageHooks,
    ) -> None:
        index = plan.stage_of(device)
        if index is None:
            raise InvariantBroken("a stage run on a device without a stage")
        self._plan, self._contract, self._manifest = plan, contract, manifest
        self._worker, self._program, self._outlet = worker, program, outlet
        self._meter, self._device, self._signal, self._hooks = meter, device, signal, hooks
        self._index, self._stage, self._stamp = index, plan.stages[index], stamp_of(plan)
        self._first, self._last = index == 0, index == len(plan.stages) - 1
        self._limiter = trio.CapacityLimiter(1)
        self._sequence = 0
        self._compute_ns = 0
        """Of the present item."""
        self._next = Neighbour(None if self._last else plan.stages[index + 1].device)
        self._previous = Neighbour(None if self._first else plan.stages[index - 1].device)
        self._tied_sends = tied_sends(manifest, plan, index)
        self.inbox = TensorInbox(signal, arrivals=arrivals(manifest, contract, plan, index))

    async def run(self) -> None:
        """Work through the program.

        Returns when the program is complete. Owns one sender task per neighbour, which end with
        it. A cancellation leaves the stage between two actions; the step is abandoned.

        Raises:
            NumericsError: a loss or gradient is not finite; nothing of the step was applied.
            PeerLost: a neighbour's link broke: the view cannot go on, but the stage can.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_all, self._next)
            nursery.start_soon(self._send_all, self._previous)
            while (item := self._program.current) is not None:
                await self._work(item)
            self._next.close()
            self._previous.close()
        self.inbox.close()

    async def _work(self, item: Item) -> None:
        if item.kind in ("checkpoint", "replicate"):
            await self._hooks.save(item)
            self._program.complete(item)
            return
        base, self._compute_ns = self._sequence, 0
        self.inbox.open(item, lambda kind, mb: self._targets(kind, base + mb))
        with self._meter.phase("wait"):
            await self._signal.wait_until(
                lambda: self.inbox.begun() or self._program.current != item
            )
        if self._program.current != item:
            return  # the session ends before this step; nobody has begun it
        loss = await self._pipeline(item, base)
        if item.kind == "train":
            await self._finish_step(item.step, loss)
        elif self._last:
            done = Evaluated(stamp=self._stamp, step=item.step, loss=loss)
            self._outlet.send(self._plan.home, done)
        self._program.complete(item)

    async def _pipeline(self, item: Item, base: int) -> float:
        """Run every microbatch of an item; the sum of their losses on the last stage."""
        actions = self._actions(item)
        delayed = delayed_microbatches(actions)
        loss = 0.0
        for action in actions:
            sequence = base + action.microbatch
            match action.kind:
                case "F":
                    loss += await self._forward(item, action, sequence)
                case "B":
                    parted = action.microbatch in delayed
                    await self._backward(item, action, sequence, parted=parted)
                case "W":
                    await self._gradients(action, sequence)
        self._sequence = base + self._program.microbatches(item)
        return loss

    def _actions(self, item: Item) -> tuple[Action, ...]:
        """Evaluations, which may have more microbatches, need no more room than steps."""
        stages, count = len(self._plan.stages), self._program.microbatches(item)
        if item.kind == "train":
            return stage_actions(self._plan.schedule, self._index, stages, count)
        return evaluation(self._index, stages, count, in_flight=self._stage.in_flight_max)

    async def _forward(self, item: Item, action: Action, sequence: int) -> float:
        microbatch = action.microbatch
        if not self._first:
            await self._wait("activation", microbatch, self._entry_ports)
        inputs = await self._wait_fed("input", microbatch) if self._first else None
        labels, weight = await self._wait_labels(microbatch) if self._last else (None, 0.0)

        def run() -> tuple[float | None, tuple[Array, ...]]:
            loss = self._worker.forward(
                step=item.step,
                microbatch=microbatch,
                sequence=sequence,
                training=item.kind == "train",
                inputs=inputs,
                labels=labels,
                loss_weight=weight,
            )
            return loss, encode_all(self._contract.codec, self._worker.exit(sequence))

        loss, arrays = await self._act(run)
        if not self._last:
            segment = self._stage.segments[-1]
            if item.kind == "train":
                self._log("activation", item.step, microbatch, segment, arrays)
            await self._next.put(self._header(item, "activation", microbatch, segment), arrays)
        return 0.0 if loss is None else loss

    async def _backward(self, item: Item, action: Action, sequence: int, *, parted: bool) -> None:
        """Train: send the cotangent upstream. Evaluate: only say that the buffer is free.

        `parted`: gradients follow in an action of their own.
        """
        microbatch = action.microbatch
        kind = "cotangent" if item.kind == "train" else "release"
        if not self._last:
            awaited = self._worker.exit_cotangent(sequence) if kind == "cotangent" else ()
            await self._wait(kind, microbatch, max(1, len(awaited)))  # none: one empty frame
        segment = self._stage.first_segment - 1
        arrays: tuple[Array, ...] = ()

        def run() -> tuple[Array, ...]:
            if parted:
                self._worker.backward_cotangents(microbatch=microbatch, sequence=sequence)
            else:
                self._worker.backward(microbatch=microbatch, sequence=sequence)
            if self._first:
                return ()
            return self._worker.encoded_cotangent(segment, microbatch=microbatch, sequence=sequence)

        if kind == "cotangent":
            arrays = await self._act(run)
        if not self._first:
            if kind == "cotangent":
                self._log("cotangent", item.step, microbatch, segment, arrays)
            await self._previous.put(self._header(item, kind, microbatch, segment), arrays)

    async def _gradients(self, action: Action, sequence: int) -> None:
        """The delayed part of a backward."""
        await self._act(
            lambda: self._worker.backward_gradients(microbatch=action.microbatch, sequence=sequence)
        )

    async def _finish_step(self, step: int, loss: float) -> None:
        """Tell what this stage found, then apply the update once it can no longer be lost."""
        if self._worker.held_ties:
            await self._sum_ties(step)
        sums = await self._compute(self._worker.square_sums)
        done = Done(
            stamp=self._stamp,
            step=step,
            square_sums=sums.astype("<f8").tobytes(),
            loss=loss if self._last else None,
            skip=not bool(np.isfinite(sums).all() and math.isfinite(loss)),
            compute_ns=self._compute_ns,
        )
        self._hooks.done(done)
        with self._meter.phase("wait"):
            record = await self._hooks.committed(step)
        await self._compute(lambda: apply_update(self._worker, self._contract, record))
        usage = self._meter.usage(self._stamp, step=step)
        self._outlet.send(self._plan.home, usage)

    async def _sum_ties(self, step: int) -> None:
        """Give the copies of tied tensors one gradient, wherever they live.

        All sends end before the sum, which overwrites the gradients that are sent.
        """
        self._log_tied(step)
        async with trio.open_nursery() as nursery:
            for send in self._tied_sends:
                for device in send.devices:
                    nursery.start_soon(self._send_tied, step, send, device)
            with self._meter.phase("wait"):
                await self._signal.wait_until(lambda: self.inbox.tied() is not None)
        arrived = self.inbox.tied()
        if arrived is None:
            raise InvariantBroken("tied gradients vanished")
        tensors = self._manifest.tensors
        elsewhere = {tensors[key.tensor_index].name: array for key, array in arrived.items()}
        await self._compute(lambda: self._worker.sum_ties(elsewhere))

    def _log(
        self, kind: LogKind, step: int, microbatch: int, segment: int, arrays: tuple[Array, ...]
    ) -> None:
        place = LogPlace(kind=kind, step=step, microbatch=microbatch, segment=segment)
        self._hooks.log(place, arrays)

    def _log_tied(self, step: int) -> None:
        """Log every tied copy of each segment that sends one: a log does not depend on cuts."""
        for segment in sorted({send.key.segment for send in self._tied_sends}):
            copies = expected_tensors(self._manifest, self._contract, "tied", segment)
            names = [self._manifest.tensors[copy.index].name for copy in copies]
            arrays = tuple(self._worker.gradient(name) for name in names)
            self._log("tied", step, 0, segment, arrays)

    async def _send_tied(self, step: int, send: TieSend, device: DeviceId) -> None:
        header = self._header(Item(kind="train", step=step), "tied", 0, send.key.segment)
        header = dataclasses.replace(header, index=send.key.tensor_index)
        with self._meter.phase("communicate"):
            await send_whole(self._outlet, device, header, self._worker.gradient(send.tensor))

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

    async def _wait(self, kind: str, microbatch: int, ports: int) -> None:
        with self._meter.phase("wait"):
            await self._signal.wait_until(lambda: self.inbox.arrived(kind, microbatch, ports))

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

    async def _send_all(self, neighbour: Neighbour) -> None:
        """Send one neighbour's tensors in order, one frame per array, until the queue closes."""
        async for outgoing in neighbour.outgoing:
            if neighbour.device is None:
                raise InvariantBroken("a tensor for a neighbour that does not exist")
            with self._meter.phase("communicate"):
                for index, array in enumerate(outgoing.arrays):
                    header = dataclasses.replace(outgoing.header, index=index)
                    await send_whole(self._outlet, neighbour.device, header, array)
                if not outgoing.arrays:
                    await send_whole(self._outlet, neighbour.device, outgoing.header)

    def _targets(self, kind: str, sequence: int) -> tuple[Array, ...]:
        """The buffers that a boundary tensor of this stage belongs into."""
        match kind:
            case "activation" if not self._first:
                return self._worker.entry(sequence)
            case "cotangent" if not self._last:
                return self._worker.exit_cotangent(sequence)
            case "release" if not self._last:
                return ()
            case _:
                raise RemoteProtocolError(f"a {kind} that this stage does not expect")

    def _header(self, item: Item, kind: str, microbatch: int, segment: int) -> TensorHeader:
        return TensorHeader(
            run=self._stamp.run,
            lineage=self._stamp.lineage,
            view=self._stamp.view,
            plan=self._stamp.plan,
            kind=kind,
            phase=item.kind,
            step=item.step,
            microbatch=microbatch,
            segment=segment,
            index=0,
        )

    @property
    def _entry_ports(self) -> int:
        return len(self._manifest.boundary(self._stage.first_segment - 1))
