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
from p2ptrain.runtime.inbox import TensorInbox
from p2ptrain.runtime.outlet import Outlet, send_whole
from p2ptrain.runtime.signal import Signal
from p2ptrain.runtime.stage import StageWorker
from p2ptrain.runtime.usage import RunMeter
from p2ptrain.schedule.actions import Action, stage_actions
from p2ptrain.training.arrivals import TieSend, arrivals, tied_sends
from p2ptrain.training.barrier import StepBarrier
from p2ptrain.training.contract import Contract
from p2ptrain.training.learning_rate import learning_rate
from p2ptrain.training.messages import Done, Evaluated, stamp_of
from p2ptrain.training.program import Item, Program
from p2ptrain.wire.frames import TensorHeader

_T = TypeVar("_T")
SEND_QUEUE_MAX = 8


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A tensor on its way to a neighbour; its arrays stay untouched until it is sent."""

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
        save: Callable[[int], Awaitable[None]],
    ) -> None:
        index = plan.stage_of(device)
        if index is None:
            raise InvariantBroken("a stage run on a device without a stage")
        self._plan, self._contract, self._manifest = plan, contract, manifest
        self._worker, self._program, self._outlet = worker, program, outlet
        self._meter, self._device, self._signal, self._save = meter, device, signal, save
        self._index, self._stage, self._stamp = index, plan.stages[index], stamp_of(plan)
        self._first, self._last = index == 0, index == len(plan.stages) - 1
        self._limiter = trio.CapacityLimiter(1)
        self._sequence = 0
        self._next = Neighbour(None if self._last else plan.stages[index + 1].device)
        self._previous = Neighbour(None if self._first else plan.stages[index - 1].device)
        self._tied_sends = tied_sends(manifest, plan, index)
        self.inbox = TensorInbox(signal, arrivals=arrivals(manifest, contract, plan, index))
        self.barrier = StepBarrier(
            plan=plan,
            manifest=manifest,
            clip_norm=contract.optimizer.clip_norm,
            first_step=program.step,
        )

    async def run(self) -> None:
        """Work through the program.

        Returns when the program is complete. Owns one sender task per neighbour, which end with
        it. A cancellation leaves the stage between two actions; the step is abandoned.

        Raises:
            NumericsError: a loss or gradient is not finite; nothing of the step was applied.
            PeerLost: a neighbour's link broke.
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
        if item.kind == "checkpoint":
            await self._save(item.step)
            self._program.complete(item)
            return
        base = self._sequence
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
        count = self._program.microbatches(item)
        stages = len(self._plan.stages)
        loss = 0.0
        for action in stage_actions(self._plan.schedule, self._index, stages, count):
            if action.kind == "F":
                loss += await self._forward(item, action, base + action.microbatch)
            else:
                await self._backward(item, action, base + action.microbatch)
        self._sequence = base + count
        return loss

    async def _forward(self, item: Item, action: Action, sequence: int) -> float:
        microbatch = action.microbatch
        if not self._first:
            await self._wait("activation", microbatch, self._entry_ports)
        inputs = await self._wait_fed("input", microbatch) if self._first else None
        labels, weight = await self._wait_labels(microbatch) if self._last else (None, 0.0)
        loss = await self._compute(
            lambda: self._worker.forward(
                step=item.step,
                microbatch=microbatch,
                sequence=sequence,
                training=item.kind == "train",
                inputs=inputs,
                labels=labels,
                loss_weight=weight,
            )
        )
        if not self._last:
            await self._next.put(
                self._header(item, "activation", microbatch, self._stage.segments[-1]),
                self._worker.exit(sequence),
            )
        return 0.0 if loss is None else loss

    async def _backward(self, item: Item, action: Action, sequence: int) -> None:
        """Train: send the cotangent upstream. Evaluate: only say that the buffer is free."""
        microbatch = action.microbatch
        kind = "cotangent" if item.kind == "train" else "release"
        if not self._last:
            awaited = self._worker.exit_cotangent(sequence) if kind == "cotangent" else ()
            await self._wait(kind, microbatch, max(1, len(awaited)))  # none: one empty frame
        if kind == "cotangent":
            await self._compute(
                lambda: self._worker.backward(microbatch=microbatch, sequence=sequence)
            )
        if not self._first:
            arrays = self._worker.entry_cotangent(sequence) if kind == "cotangent" else ()
            header = self._header(item, kind, microbatch, self._stage.first_segment - 1)
            await self._previous.put(header, arrays)

    async def _finish_step(self, step: int, loss: float) -> None:
        """Exchange square sums with every stage, then apply the one update that all agree on."""
        if self._worker.held_ties:
            await self._sum_ties(step)
        sums = await self._compute(self._worker.square_sums)
        done = Done(
            stamp=self._stamp,
            step=step,
            square_sums=sums.astype("<f8").tobytes(),
            loss=loss if self._last else None,
            skip=not bool(np.isfinite(sums).all() and math.isfinite(loss)),
        )
        for member in self._plan.members:
            self._outlet.send(member, done)
        with self._meter.phase("wait"):
            await self._signal.wait_until(lambda: not self.barrier.missing(step))
        totals = self.barrier.take(step)
        rate = learning_rate(self._contract.optimizer, step=step, steps=self._contract.steps)
        await self._compute(
            lambda: self._worker.update(step=step, learning_rate=rate, clip_scale=totals.clip_scale)
        )
        usage = self._meter.usage(self._stamp, step=step)
        self._outlet.send(self._plan.home, usage)

    async def _sum_ties(self, step: int) -> None:
        """Give the copies of tied tensors one gradient, wherever they live.

        All sends end before the sum, which overwrites the gradients that are sent.
        """
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

    async def _send_tied(self, step: int, send: TieSend, device: DeviceId) -> None:
        header = self._header(Item(kind="train", step=step), "tied", 0, send.key.segment)
        header = dataclasses.replace(header, index=send.key.tensor_index)
        with self._meter.phase("communicate"):
            await send_whole(self._outlet, device, header, self._worker.gradient(send.tensor))

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
