"""The data holder's part of a run: draw samples, send inputs first, labels last."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import trio

from p2ptrain.planner.plan import Plan
from p2ptrain.runtime.exchange.outlet import Outlet, send_whole
from p2ptrain.runtime.planning.job import Job
from p2ptrain.runtime.signal import Signal
from p2ptrain.training.contract import Contract
from p2ptrain.training.headers import header_of
from p2ptrain.training.messages import stamp_of
from p2ptrain.training.minibatch import FedKind, read_minibatch
from p2ptrain.training.program import FED_ITEMS, Item, Program
from p2ptrain.training.routing import Runners, runners
from p2ptrain.wire.frames import TensorHeader

ITEMS_AHEAD_MAX = 2
"""Items fed but not yet complete; the receivers hold no more (runtime.exchange.inbox)."""


class Feeder:
    """Feeds every item of the program to the first and the last stage, two ahead at most: each
    microbatch to who runs it there.

    What a label weighs depends on how many count in the whole minibatch, so an item is read whole
    before its first microbatch goes out. That holds one item in memory, a third of what the first
    stage may hold, and reads each sample once.
    """

    def __init__(
        self,
        *,
        job: Job,
        plan: Plan,
        contract: Contract,
        program: Program,
        outlet: Outlet,
        signal: Signal,
        completed: Callable[[], int],
    ) -> None:
        self._job, self._plan, self._contract = job, plan, contract
        self._program, self._outlet, self._signal = program, outlet, signal
        self._completed = completed
        self._fed = 0
        self._last_step_begun = program.step

    @property
    def last_step_begun(self) -> int:
        """The newest training step whose data has begun to go out: the earliest possible end."""
        return self._last_step_begun

    async def run(self) -> None:
        """Feed until the program ends; cancelling leaves later items unfed.

        Raises:
            DataError: a sample cannot be read, or no label of an item counts; the run ends.
        """
        while (item := self._program.current) is not None:
            await self._signal.wait_until(self._may_feed)
            if self._program.current != item:
                continue  # stopped while we waited
            if item.kind == "train":
                self._last_step_begun = item.step
            if item.kind in FED_ITEMS:
                await self._feed(item)
                self._fed += 1
            self._program.complete(item)

    def _may_feed(self) -> bool:
        return self._fed - self._completed() < ITEMS_AHEAD_MAX

    async def _feed(self, item: Item) -> None:
        job = self._job
        read = await trio.to_thread.run_sync(
            read_minibatch, job.samples, self._contract, job.bundle.manifest.loss, item
        )
        count = len(read.feeds)
        first, last = (runners(self._plan.stages[index], count) for index in (0, -1))
        ends: tuple[tuple[FedKind, Runners], ...] = (("input", first), ("labels", last))
        for microbatch in range(count):
            for kind, taken_by in ends:
                for index, array in enumerate(read.arrays(kind, microbatch)):
                    header = self._header(item, kind, microbatch, index)
                    for device in taken_by[microbatch]:
                        await send_whole(self._outlet, device, header, array)

    def _header(self, item: Item, kind: str, microbatch: int, index: int) -> TensorHeader:
        first = header_of(stamp_of(self._plan), item, kind, microbatch, 0)
        return dataclasses.replace(first, index=index)
