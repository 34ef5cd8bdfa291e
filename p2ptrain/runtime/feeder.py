"""The data holder's part of a run: draw samples, send inputs first, labels last."""

from __future__ import annotations

from collections.abc import Callable

from p2ptrain.planner.plan import Plan
from p2ptrain.runtime.job import Job
from p2ptrain.runtime.outlet import Outlet, send_whole
from p2ptrain.runtime.signal import Signal
from p2ptrain.training.contract import Contract
from p2ptrain.training.feed import Feed
from p2ptrain.training.messages import stamp_of
from p2ptrain.training.program import Item, Program
from p2ptrain.wire.frames import TensorHeader

ITEMS_AHEAD_MAX = 2
"""Items fed but not yet complete; the receivers hold no more (runtime.inbox)."""


class Feeder:
    """Feeds every item of the program to the first and the last stage, two ahead at most."""

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
        """Feed until the program ends; cancelling leaves later items unfed."""
        while (item := self._program.current) is not None:
            await self._signal.wait_until(self._may_feed)
            if self._program.current != item:
                continue  # stopped while we waited
            if item.kind == "train":
                self._last_step_begun = item.step
            for microbatch in range(self._program.microbatches(item)):
                await self._feed(item, microbatch)
            self._program.complete(item)
            self._fed += item.kind != "checkpoint"

    def _may_feed(self) -> bool:
        return self._fed - self._completed() < ITEMS_AHEAD_MAX

    async def _feed(self, item: Item, microbatch: int) -> None:
        feed = self._samples(item, microbatch)
        first, last = self._plan.stages[0].device, self._plan.stages[-1].device
        header = self._header(item, "input", microbatch)
        await send_whole(self._outlet, first, header, feed.inputs[0])
        header = self._header(item, "labels", microbatch)
        await send_whole(self._outlet, last, header, feed.labels)

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

    def _header(self, item: Item, kind: str, microbatch: int) -> TensorHeader:
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
            index=0,
        )
