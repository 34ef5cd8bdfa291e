"""One stage of a run on this peer: follow the schedule, exchange tensors, agree on each step."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, TypeVar

import trio

from p2ptrain.engine.contract import Array
from p2ptrain.errors import InvariantBroken, RemoteProtocolError
from p2ptrain.ids import DeviceId
from p2ptrain.recovery.inventory import LogKind
from p2ptrain.runtime.compute.stage import StageWorker
from p2ptrain.runtime.exchange.inbox import TensorInbox
from p2ptrain.runtime.keeping.run_state import LogPlace
from p2ptrain.runtime.views.gradient_sums import GradientSums
from p2ptrain.runtime.views.item_run import ItemRun, RunPlace
from p2ptrain.runtime.views.neighbours import Neighbours
from p2ptrain.runtime.views.tie_exchange import TieExchange
from p2ptrain.schedule.actions import Action, delayed_microbatches
from p2ptrain.training.arrivals import arrivals, tied_sends
from p2ptrain.training.collectives import MeetingKey
from p2ptrain.training.messages import Evaluated
from p2ptrain.training.program import Item
from p2ptrain.training.routing import Route, Runners, has_replicas
from p2ptrain.training.tensor_codec import encode_all
from p2ptrain.wire.frames import TensorHeader

_T = TypeVar("_T")
_How = Literal["whole", "in parts", "done"]


@dataclass(slots=True)
class OpenItem:
    """What this peer does in one item."""

    item: Item
    own: dict[int, int]
    """Its microbatches, and what names their buffers."""
    before: Runners
    after: Runners
    done_count: int = 0
    """Of its microbatches, those that have gone back."""


class StageRun(ItemRun):
    """Runs this peer's stage from `go` to the end of the session.

    What decides (order of actions, items, totals) comes from pure objects; this class waits and
    calls. Compute runs in a worker thread, one call at a time; only arrays cross.
    """

    inbox: TensorInbox

    def __init__(
        self,
        place: RunPlace,
        worker: StageWorker,
        marks: Collection[int] = (),
        *,
        stage: int | None = None,
    ) -> None:
        """Nothing is sent before `run`, or `start`.

        Args:
            place: Where in the run.
            worker: Of the stage.
            marks: Segments inside the stage after which what crosses is logged, not sent.
            stage: Which of this device's, where it has two; `views.ends_run` then joins them.
        """
        super().__init__(place, worker)
        plan, contract, manifest = place.plan, place.contract, place.manifest
        device, signal = place.device, place.signal
        route = self._route = Route(plan, device, stage=stage)
        index = route.stage_index
        self._worker = worker
        self._stage = route.stage
        self._first, self._last = index == 0, index == len(plan.stages) - 1
        self._marks = marks
        self._sequence = 0
        replicated = has_replicas(plan)
        self._neighbours = Neighbours(
            route.neighbours, outlet=place.outlet, meter=place.meter, copies=replicated
        )
        own = len(route.own(contract.microbatches))
        worker.take_share(own, has_siblings=self._stage.split == "replicas")
        self._sums: GradientSums | None = None
        if self._stage.split == "replicas":
            self._sums = GradientSums(
                worker,
                manifest,
                route,
                send=self._send_piece,
                phase=place.meter.phase,
                signal=signal,
            )
        self._item: OpenItem | None = None
        meetings = None if self._sums is None else self._sums.meetings
        self.inbox = TensorInbox(
            signal,
            arrivals=arrivals(manifest, contract, plan, device, stage=index),
            meetings=meetings,
        )
        sends = tied_sends(manifest, plan, index, route.rank)
        self._ties = TieExchange(place, worker, self.inbox, sends)

    async def run(self) -> None:
        """Work through the program.

        Returns when the program is complete. Owns one sender task per neighbour, which end with
        it. A cancellation leaves the stage between two actions; the step is abandoned.

        Raises:
            NumericsError: a loss or gradient is not finite; nothing of the step was applied.
            PeerLost: a neighbour's link broke: the view cannot go on, but the stage can.
        """
        async with trio.open_nursery() as nursery:
            self.start(nursery)
            while (item := self._program.current) is not None:
                await self._work(item)
            self.close()

    def start(self, nursery: trio.Nursery) -> None:
        """Send to the neighbours from now on."""
        self._neighbours.start(nursery)

    def share_device(self, other: StageRun) -> None:
        """Compute in turns with another stage of this device, and send to others in one order."""
        self._limiter = other._limiter
        self._neighbours.share(other._neighbours)

    @property
    def compute_ns(self) -> int:
        """Of the present item's actions so far."""
        return self._compute_ns

    def close(self) -> None:
        """Nothing more comes or goes; the sender tasks end once everything is sent."""
        self._neighbours.close()
        self.inbox.close()

    async def _work(self, item: Item) -> None:
        if item.kind in ("checkpoint", "replicate"):
            await self._save(item)
            return
        opened = self.open(item)
        # Without a microbatch of its own, another replica runs all of an evaluation.
        if (opened.own or item.kind == "train") and not await self._begins(item):
            return  # nobody has begun this step
        if self._sums is None or item.kind != "train":
            loss = await self.pipeline(opened)
        else:
            async with self._sums.added_up():
                loss = await self.pipeline(opened)
        if item.kind == "train":
            await self._finish_step(item.step, loss)
        elif self._last:
            done = Evaluated(stamp=self._stamp, step=item.step, loss=loss)
            self._outlet.send(self._plan.home, done)
        self._program.complete(item)

    def open(self, item: Item) -> OpenItem:
        """Accept an item's tensors."""
        count = self._program.microbatches(item)
        own = self._route.own(count)
        opened = self._item = OpenItem(
            item=item,
            own={microbatch: self._sequence + place for place, microbatch in enumerate(own)},
            before=self._route.beside(-1, count),
            after=self._route.beside(1, count),
        )
        self._compute_ns = 0
        self.inbox.open(item, self._targets, self._has_room)
        return opened

    async def pipeline(self, opened: OpenItem) -> float:
        """Run every own microbatch of an item; the sum of their losses on the last stage."""
        actions = self._actions(opened.item)
        delayed = delayed_microbatches(actions)
        loss = 0.0
        for action in actions:
            match action.kind:
                case "F":
                    loss += await self._forward(opened, action.microbatch)
                case "B":
                    parted = action.microbatch in delayed
                    await self._backward(opened, action.microbatch, parted=parted)
                    opened.done_count += 1
                    self._signal.notify()
                case "W":
                    await self._gradients(action, opened.own[action.microbatch])
        self._sequence += len(opened.own)
        return loss

    def _actions(self, item: Item) -> tuple[Action, ...]:
        """Evaluations, which may have more microbatches, need no more room than steps."""
        count = self._program.microbatches(item)
        if item.kind == "train":
            return self._route.training(count)
        return self._route.evaluation(count, trained=self._contract.microbatches)

    async def _forward(self, opened: OpenItem, microbatch: int) -> float:
        item, sequence = opened.item, opened.own[microbatch]
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
        if item.kind == "train":
            for mark in self._marks:
                crossing = self._worker.crossing(mark, sequence)
                self._log("activation", item.step, microbatch, mark, crossing)
        if not self._last:
            segment = self._stage.segments[-1]
            if item.kind == "train":
                self._log("activation", item.step, microbatch, segment, arrays)
            header = self._header(item, "activation", microbatch, segment)
            await self._put(opened.after, header, arrays)
        return 0.0 if loss is None else loss

    async def _backward(self, opened: OpenItem, microbatch: int, *, parted: bool) -> None:
        """Train: send the cotangent upstream. Evaluate: only say that the buffer is free.

        `parted`: gradients follow in an action of their own.
        """
        item, sequence = opened.item, opened.own[microbatch]
        kind = "cotangent" if item.kind == "train" else "release"
        if not self._last:
            awaited = self._worker.exit_cotangent(sequence) if kind == "cotangent" else ()
            await self._wait(kind, microbatch, max(1, len(awaited)))  # none: one empty frame
        segment = self._stage.first_segment - 1
        arrays: tuple[Array, ...] = ()
        if kind == "cotangent":
            how: _How = "in parts" if parted else "whole"
            if self._sums is not None and microbatch == max(opened.own):
                await self._backward_summed(self._sums, microbatch, sequence)
                how = "done"
            arrays = await self._act(lambda: self._back(microbatch, sequence, how))
            for mark in self._marks:
                crossing = self._worker.crossing_cotangent(mark, sequence)
                self._log("cotangent", item.step, microbatch, mark, crossing)
        if not self._first:
            if kind == "cotangent":
                self._log("cotangent", item.step, microbatch, segment, arrays)
            header = self._header(item, kind, microbatch, segment)
            await self._put(opened.before, header, arrays)

    async def _backward_summed(self, sums: GradientSums, microbatch: int, sequence: int) -> None:
        """The last own backward: every segment's gradients go to be added up when it is done."""
        steps = self._worker.backward_by_segment(microbatch=microbatch, sequence=sequence)
        while (segment := await self._act(lambda: next(steps, None))) is not None:
            sums.add(segment)

    def _back(self, microbatch: int, sequence: int, how: _How) -> tuple[Array, ...]:
        """The backward of a microbatch where it is not done yet; what is to be sent. Blocking."""
        worker = self._worker
        if how == "in parts":
            worker.backward_cotangents(microbatch=microbatch, sequence=sequence)
        elif how == "whole":
            worker.backward(microbatch=microbatch, sequence=sequence)
        if self._first:
            return ()
        segment = self._stage.first_segment - 1
        return worker.encoded_cotangent(segment, microbatch=microbatch, sequence=sequence)

    async def _put(self, runners: Runners, header: TensorHeader, arrays: tuple[Array, ...]) -> None:
        """Send a boundary's tensors to whoever runs their microbatch there."""
        for device in runners[header.microbatch]:
            await self._neighbours.put(device, header, arrays)

    async def _gradients(self, action: Action, sequence: int) -> None:
        """The delayed part of a backward."""
        await self._act(
            lambda: self._worker.backward_gradients(microbatch=action.microbatch, sequence=sequence)
        )

    async def _finish_step(self, step: int, loss: float) -> None:
        """Tell what this stage found, then apply the update once it can no longer be lost."""
        if self._worker.held_ties:
            arrived = await self._ties.arrived(step)
            await self._compute(lambda: self._worker.sum_ties(arrived))
        await self._end_step(step, loss, tells=self._last, counts=self._route.rank == 0)

    def _log(
        self, kind: LogKind, step: int, microbatch: int, segment: int, arrays: tuple[Array, ...]
    ) -> None:
        place = LogPlace(kind=kind, step=step, microbatch=microbatch, segment=segment)
        self._hooks.log(place, arrays)

    async def _wait(self, kind: str, microbatch: int, ports: int) -> None:
        with self._meter.phase("wait"):
            await self._signal.wait_until(lambda: self.inbox.arrived(kind, microbatch, ports))

    async def _send_piece(self, device: DeviceId, kind: str, key: MeetingKey, piece: Array) -> None:
        if self._item is None:
            raise InvariantBroken("a meeting outside of an item")
        await self._send_of(self._item.item, device, kind, key, piece)

    def _has_room(self, microbatch: int) -> bool:
        """Whether the buffers of a microbatch that comes are free.

        Of one sender on each side none comes too early; replicas run ahead of each other.
        """
        opened, holds = self._item, self._worker.holds
        if opened is None or microbatch not in opened.own:
            return True  # it is refused
        first = min(opened.own.values())
        return opened.own[microbatch] - first < opened.done_count + holds.at_edges

    def _targets(self, kind: str, microbatch: int) -> tuple[Array, ...]:
        """The buffers that a boundary tensor of this stage belongs into."""
        sequence = None if self._item is None else self._item.own.get(microbatch)
        if sequence is None:
            raise RemoteProtocolError(f"a {kind} of microbatch {microbatch}, which is not ours")
        match kind:
            case "activation" if not self._first:
                return self._worker.entry(sequence)
            case "cotangent" if not self._last:
                return self._worker.exit_cotangent(sequence)
            case "release" if not self._last:
                return ()
            case _:
                raise RemoteProtocolError(f"a {kind} that this stage does not expect")

    @property
    def _entry_ports(self) -> int:
        return len(self._manifest.boundary(self._stage.first_segment - 1))
