"""Both ends of a private run on its home peer: two stages, one device, one part in each commit.

Each end follows its own list of actions, as if it were on a device of its own; they compute one
after the other, as the actions' tensors come. Steps begin and end together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import trio

from p2ptrain.engine.contract import Array
from p2ptrain.ids import DeviceId
from p2ptrain.runtime.compute.ends_worker import EndsWorker
from p2ptrain.runtime.exchange.bodies import BodyReader
from p2ptrain.runtime.exchange.inbox import TensorInbox
from p2ptrain.runtime.views.item_run import ItemRun, RunPlace
from p2ptrain.runtime.views.stage_run import OpenItem, StageRun
from p2ptrain.runtime.views.tie_exchange import TieExchange
from p2ptrain.training.arrivals import tied_sends
from p2ptrain.training.messages import Evaluated
from p2ptrain.training.program import Item
from p2ptrain.wire.frames import TensorHeader

BACK_KINDS = ("labels", "activation")
"""Tensors for the last stage; the first one gets all others."""


class EndsInbox:
    """Sorts what arrives between the two ends."""

    def __init__(self, front: TensorInbox, back: TensorInbox) -> None:
        self._front, self._back = front, back

    async def receive(
        self, sender: DeviceId, header: TensorHeader, length: int, reader: BodyReader
    ) -> None:
        """As `TensorInbox.receive`."""
        await self._inbox_of(header).receive(sender, header, length, reader)

    def deliver(self, header: TensorHeader, array: Array) -> None:
        """As `TensorInbox.deliver`."""
        self._inbox_of(header).deliver(header, array)

    def begun(self) -> bool:
        """Whether anything of the open item has arrived at either end."""
        return self._front.begun() or self._back.begun()

    def fed(self, kind: str, microbatch: int) -> tuple[Array, ...] | None:
        """As `TensorInbox.fed`."""
        inbox = self._back if kind in BACK_KINDS else self._front
        return inbox.fed(kind, microbatch)

    def close(self) -> None:
        """Accept nothing more."""
        self._front.close()
        self._back.close()

    def _inbox_of(self, header: TensorHeader) -> TensorInbox:
        return self._back if header.kind in BACK_KINDS else self._front


class EndsRun(ItemRun):
    """Runs the first and the last stage from `go` to the end of the session."""

    def __init__(
        self, place: RunPlace, worker: EndsWorker, marks: Callable[[range], Collection[int]]
    ) -> None:
        """`marks`: segments inside a stage after which what crosses is logged, not sent."""
        super().__init__(place, worker)
        self._worker, last = worker, len(place.plan.stages) - 1
        self._front, self._back = (
            StageRun(place, end, marks(end.segments), stage=index)
            for end, index in zip(worker.ends, (0, last), strict=True)
        )
        self._back.share_device(self._front)
        self.inbox = EndsInbox(self._front.inbox, self._back.inbox)
        sends = tied_sends(place.manifest, place.plan, 0)
        self._ties = TieExchange(place, worker, self._front.inbox, sends)

    async def run(self) -> None:
        """Work through the program.

        As `StageRun.run`: it returns when the program is complete, and a cancellation leaves both
        ends between two actions.

        Raises:
            NumericsError: a loss or gradient is not finite; nothing of the step was applied.
            PeerLost: a neighbour's link broke: the view cannot go on, but the stages can.
        """
        async with trio.open_nursery() as nursery:
            self._front.start(nursery)
            self._back.start(nursery)
            while (item := self._program.current) is not None:
                await self._work(item)
            self._front.close()
            self._back.close()

    async def _work(self, item: Item) -> None:
        if item.kind in ("checkpoint", "replicate"):
            await self._save(item)
            return
        front, back = self._front.open(item), self._back.open(item)
        if not await self._begins(item):
            return  # nobody has begun this step
        loss = await self._pipelines(front, back)
        if item.kind == "train":
            await self._finish_step(item.step, loss)
        else:
            done = Evaluated(stamp=self._stamp, step=item.step, loss=loss)
            self._outlet.send(self._plan.home, done)
        self._program.complete(item)

    async def _pipelines(self, front: OpenItem, back: OpenItem) -> float:
        """Both ends' microbatches of an item, beside each other; the sum of the back's losses.

        Neither goes on to the next item before the other, and a lone stage between them is sent all
        in one order: what it waits for never comes behind what it has not begun (PROTOCOL.md
        section 6.3).
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._front.pipeline, front)
            return await self._back.pipeline(back)

    async def _finish_step(self, step: int, loss: float) -> None:
        if self._worker.held_ties:
            arrived = await self._ties.arrived(step)
            await self._compute(lambda: self._worker.sum_ties(arrived))
        self._compute_ns = self._front.compute_ns + self._back.compute_ns
        await self._end_step(step, loss, tells=True, counts=True)
