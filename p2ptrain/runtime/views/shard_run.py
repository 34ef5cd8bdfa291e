"""One shard of a run on this peer: every microbatch together with the other shards, step by step.

Its work is a generator (`runtime.compute.shard_worker`); here it is driven: compute in a worker
thread, what it yields brought to the meetings of all ranks. Microbatches come one after another, so
the meetings of an item are strictly ordered and what may wait is bounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import numpy as np

from p2ptrain.engine.contract import Array
from p2ptrain.errors import InvariantBroken, RemoteProtocolError
from p2ptrain.ids import DeviceId
from p2ptrain.runtime.compute.shard_worker import ShardWorker
from p2ptrain.runtime.exchange.inbox import TensorInbox
from p2ptrain.runtime.exchange.meeting import Meetings, Ranks
from p2ptrain.runtime.views.item_run import ItemRun, RunPlace
from p2ptrain.training.arrivals import arrivals
from p2ptrain.training.collectives import MeetingKey
from p2ptrain.training.exchanges import Exchange, Exchanges
from p2ptrain.training.messages import Evaluated
from p2ptrain.training.program import Item
from p2ptrain.training.shard_meetings import ShardMeetings

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Result(Generic[_T]):
    """What a shard's work has come to."""

    value: _T


class ShardRun(ItemRun):
    """Runs this peer's shard from `go` to the end of the session."""

    inbox: TensorInbox

    def __init__(self, place: RunPlace, worker: ShardWorker) -> None:
        super().__init__(place, worker)
        self._worker, self._rank = worker, worker.share.rank
        self._item: Item | None = None
        known = ShardMeetings(place.manifest, place.contract, worker.share)
        self._meetings = Meetings(
            Ranks(devices=place.plan.stages[0].devices, own=self._rank),
            expected=known.expected,
            held_bytes_max=known.held_bytes_max,
            send=self._send_piece,
            phase=place.meter.phase,
            signal=place.signal,
        )
        self.inbox = TensorInbox(
            place.signal,
            arrivals=arrivals(place.manifest, place.contract, place.plan, place.device),
            meetings=self._meetings,
        )

    async def run(self) -> None:
        """Work through the program.

        Returns when the program is complete. A cancellation leaves the step abandoned.

        Raises:
            NumericsError: a loss or gradient is not finite; nothing of the step was applied.
            PeerLost: another rank is gone: the view must change.
        """
        while (item := self._program.current) is not None:
            await self._work(item)
        self.inbox.close()

    async def _work(self, item: Item) -> None:
        if item.kind in ("checkpoint", "replicate"):
            await self._save(item)
            return
        self._item, self._compute_ns = item, 0
        self.inbox.open(item, _no_targets)
        if not await self._begins(item):
            return  # nobody has begun this step
        if item.kind == "train":
            await self._train(item)
        else:
            await self._evaluate(item)
        self._program.complete(item)

    async def _train(self, item: Item) -> None:
        loss = 0.0
        for microbatch in range(self._program.microbatches(item)):
            inputs = await self._wait_fed("input", microbatch)
            labels, weight = await self._wait_labels(microbatch)
            forward = self._worker.forward(
                step=item.step,
                microbatch=microbatch,
                inputs=inputs,
                labels=labels,
                loss_weight=weight,
            )
            loss += await self._drive(forward, microbatch)
            await self._drive(self._worker.backward(), microbatch)
        await self._drive(self._worker.sum_gradients(), 0)
        await self._end_step(item.step, loss, tells=self._rank == 0, counts=True)

    async def _evaluate(self, item: Item) -> None:
        loss = 0.0
        for microbatch in range(self._program.microbatches(item)):
            inputs = await self._wait_fed("input", microbatch)
            labels, weight = await self._wait_labels(microbatch)
            work = self._worker.evaluate(inputs=inputs, labels=labels, loss_weight=weight)
            loss += await self._drive(work, microbatch)
        told = loss if self._rank == 0 else 0.0  # the sum over ranks is the loss
        self._outlet.send(self._plan.home, Evaluated(stamp=self._stamp, step=item.step, loss=told))

    async def _drive(self, work: Exchanges[_T], microbatch: int) -> _T:
        """Run a shard's work to its end, meeting the other ranks on the way."""
        answer: Array | None = None
        while True:
            reached = await self._act(partial(_advance, work, answer))
            if isinstance(reached, _Result):
                return reached.value
            answer = await self._meet(reached, microbatch)

    async def _meet(self, exchange: Exchange, microbatch: int) -> Array:
        """What all ranks' values come to."""
        own = exchange.array
        key = MeetingKey(microbatch=microbatch, segment=exchange.segment, index=exchange.site)
        match exchange.kind:
            case "reduce":
                vector = own.flatten()
                await self._meetings.reduce(key, vector)
                return vector.reshape(own.shape)
            case "gather":
                slices = await self._meetings.gather(key, np.ascontiguousarray(own).reshape(-1))
                shaped = [
                    piece.reshape(_with_axis(own.shape, exchange.axis, count))
                    for piece, count in zip(slices, exchange.counts, strict=True)
                ]
                return np.concatenate(shaped, exchange.axis)
            case _:
                edges = np.cumsum(exchange.counts)[:-1]
                cut = np.split(own, edges, exchange.axis)
                terms = [np.array(piece, order="C").reshape(-1) for piece in cut]
                total = await self._meetings.scatter(key, terms)
                return total.reshape(cut[self._rank].shape)

    async def _send_piece(self, device: DeviceId, kind: str, key: MeetingKey, piece: Array) -> None:
        if self._item is None:
            raise InvariantBroken("a meeting outside of an item")
        await self._send_of(self._item, device, kind, key, piece)


def _advance(work: Exchanges[_T], answer: Array | None) -> Exchange | _Result[_T]:
    """The next meeting of a shard's work, or what it has come to; blocking."""
    try:
        return next(work) if answer is None else work.send(answer)
    except StopIteration as end:
        return _Result(end.value)


def _no_targets(kind: str, microbatch: int) -> tuple[Array, ...]:
    raise RemoteProtocolError(f"a {kind} of microbatch {microbatch} for a shard")


def _with_axis(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis + 1 :])
