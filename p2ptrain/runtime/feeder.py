"""The data holder's part of a run: draw samples, send inputs first, labels last."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import trio

from p2ptrain.errors import DataError
from p2ptrain.planner.plan import Plan
from p2ptrain.runtime.job import Job
from p2ptrain.runtime.outlet import Outlet, send_whole
from p2ptrain.runtime.signal import Signal
from p2ptrain.training.arrivals import LOSS_WEIGHT_DTYPE
from p2ptrain.training.contract import Contract
from p2ptrain.training.feed import Feed
from p2ptrain.training.loss import counted_labels, loss_weight
from p2ptrain.training.messages import stamp_of
from p2ptrain.training.program import Item, Program
from p2ptrain.wire.frames import TensorHeader

ITEMS_AHEAD_MAX = 2
"""Items fed but not yet complete; the receivers hold no more (runtime.inbox)."""


class Feeder:
    """Feeds every item of the program to the first and the last stage, two ahead at most.

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
            if item.kind != "checkpoint":
                await self._feed(item)
            self._program.complete(item)
            self._fed += item.kind != "checkpoint"

    def _may_feed(self) -> bool:
        return self._fed - self._completed() < ITEMS_AHEAD_MAX

    async def _feed(self, item: Item) -> None:
        feeds = await trio.to_thread.run_sync(self._read, item)
        weight = np.array([self._loss_weight(item, feeds)], LOSS_WEIGHT_DTYPE)
        first, last = self._plan.stages[0].device, self._plan.stages[-1].device
        for microbatch, feed in enumerate(feeds):
            for index, array in enumerate(feed.inputs):
                header = self._header(item, "input", microbatch, index)
                await send_whole(self._outlet, first, header, array)
            for index, array in enumerate((feed.labels, weight)):
                header = self._header(item, "labels", microbatch, index)
                await send_whole(self._outlet, last, header, array)

    def _read(self, item: Item) -> list[Feed]:
        count = self._program.microbatches(item)
        return [self._samples(item, microbatch) for microbatch in range(count)]

    def _loss_weight(self, item: Item, feeds: list[Feed]) -> float:
        loss = self._job.bundle.manifest.loss
        count = sum(counted_labels(loss, feed.labels) for feed in feeds)
        if count == 0:
            raise DataError(
                f"{item}: no label counts in all of its {len(feeds)} microbatches",
                hint="use larger minibatches, or data with more labels",
            )
        return loss_weight(count)

    def _samples(self, item: Item, microbatch: int) -> Feed:
        size = self._contract.microbatch_size
        first_sample = microbatch * size
        if item.kind == "evaluate":
            return self._job.samples.heldout(
                sample_count=size * self._contract.heldout_microbatches,
                first_sample=first_sample,
                count=size,
            )
        return self._job.samples.training(
            seed=self._contract.seed, step=item.step, first_sample=first_sample, count=size
        )

    def _header(self, item: Item, kind: str, microbatch: int, index: int) -> TensorHeader:
        stamp = stamp_of(self._plan)
        return TensorHeader(
            run=stamp.run,
            lineage=stamp.lineage,
            view=stamp.view,
            plan=stamp.plan,
            kind=kind,
            phase=item.kind,
            step=item.step,
            microbatch=microbatch,
            segment=0,
            index=index,
        )
