"""An owner's part of a run whose peers feed their own data: draw samples, feed them to ourselves.

What a label weighs depends on how many count in the whole minibatch, so owners tell each other how
many count in theirs; nothing else of the data leaves them. The home peer takes part in that also
where it owns none: an item begins only when it has told its count, so that a stop can name a step
that nobody is beyond.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from p2ptrain import limits
from p2ptrain.bundle.manifest import Loss
from p2ptrain.errors import RemoteProtocolError
from p2ptrain.ids import DeviceId
from p2ptrain.planner.plan import Plan
from p2ptrain.runtime.exchange.outlet import Outlet, send_whole
from p2ptrain.runtime.home.feeder import ITEMS_AHEAD_MAX
from p2ptrain.runtime.signal import Signal
from p2ptrain.training.contract import Contract
from p2ptrain.training.feed import Samples
from p2ptrain.training.headers import header_of
from p2ptrain.training.messages import FedItem, LabelsCounted, stamp_of
from p2ptrain.training.minibatch import FedKind, OwnPart, fed_arrays, item_weight, read_own_part
from p2ptrain.training.owners import owner_of
from p2ptrain.training.program import FED_ITEMS, Item, Program

NOTHING = OwnPart(feeds={}, counted=0)
"""What a home peer without data feeds."""
_KINDS: tuple[FedKind, ...] = ("input", "labels")


@dataclass(slots=True)
class LabelCounts:
    """How many labels count at each of a view's members, by item, until the item is fed."""

    members: tuple[DeviceId, ...]
    told: dict[DeviceId, dict[Item, int]] = field(default_factory=dict)

    def add(self, device: DeviceId, item: Item, count: int) -> None:
        """Note what a member tells.

        Raises:
            RemoteProtocolError: it has told another number, or is too far ahead of us.
        """
        own = self.told.setdefault(device, {})
        if own.get(item, count) != count:
            raise RemoteProtocolError(f"{item}: {device[:8]} counts its labels twice")
        if item not in own and len(own) >= limits.COUNTS_AHEAD_MAX:
            raise RemoteProtocolError(f"{device[:8]} counts labels too far ahead")
        own[item] = count

    def whole(self, item: Item) -> bool:
        """Whether all members have told theirs."""
        return all(item in self.told.get(device, {}) for device in self.members)

    def take(self, item: Item) -> int:
        """The sum of all, which are then forgotten."""
        return sum(self.told[device].pop(item) for device in self.members)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedPlace:
    """Where in a run somebody feeds its own data, and whom it speaks to."""

    device: DeviceId
    plan: Plan
    contract: Contract
    loss: Loss
    program: Program
    """Its own: it is ahead of the stage's."""
    outlet: Outlet
    signal: Signal


class OwnFeeder:
    """Feeds this device's microbatches of every item of the program to its own stage, two items
    ahead at most; at a home peer without data it only counts along."""

    def __init__(
        self, place: FeedPlace, samples: Samples | None, completed: Callable[[], int]
    ) -> None:
        """`samples`: this device's; None: it owns none. `completed`: items that need no more."""
        self._place, self._samples, self._completed = place, samples, completed
        self._device, self._plan, self._contract = place.device, place.plan, place.contract
        self._program, self._outlet, self._signal = place.program, place.outlet, place.signal
        self._owner = owner_of(place.contract.owners, place.device)
        self._counts = LabelCounts(place.plan.members)
        self._fed = 0
        self._last_step_begun = place.program.step

    @property
    def last_step_begun(self) -> int:
        """The newest training step that others may have begun: the earliest possible end."""
        return self._last_step_begun

    def stop_after(self, step: int) -> None:
        """The session ends after a step; what was counted of a later one is never fed."""
        self._program.stop_after(step)
        self._signal.notify()

    def receive(self, device: DeviceId, message: LabelsCounted) -> None:
        """Take what a member tells; RemoteProtocolError where that cannot be."""
        self._counts.add(device, Item(kind=message.kind, step=message.step), message.count)
        self._signal.notify()

    async def run(self) -> None:
        """Feed until the program ends; cancelling leaves later items unfed.

        Raises:
            DataError: a sample cannot be read, or no label of an item counts; the run ends.
            PeerLost: a member is gone; the view changes.
        """
        while (item := self._program.current) is not None:
            await self._signal.wait_until(self._may_feed)
            if item.kind in FED_ITEMS:
                await self._feed(item)
            if self._program.current == item:  # else it was stopped while we waited
                self._fed += item.kind in FED_ITEMS
                self._program.complete(item)

    def _may_feed(self) -> bool:
        return self._fed - self._completed() < ITEMS_AHEAD_MAX

    async def _feed(self, item: Item) -> None:
        """Read our part, tell its count, and feed it once all are told and the item goes on."""
        part = await trio.to_thread.run_sync(self._read, item)
        if self._program.current != item:
            return
        if item.kind == "train":
            self._last_step_begun = item.step
        self._tell(item, part.counted)
        await self._signal.wait_until(
            lambda: self._counts.whole(item) or self._program.current != item
        )
        if self._program.current == item:
            counted = self._counts.take(item)
            weight = item_weight(item, counted, self._program.microbatches(item))
            await self._deliver(item, part, weight)

    def _read(self, item: Item) -> OwnPart:
        if self._owner is None or self._samples is None:
            return NOTHING
        return read_own_part(self._samples, self._contract, self._place.loss, self._owner, item)

    def _tell(self, item: Item, counted: int) -> None:
        kind: FedItem = "train" if item.kind == "train" else "evaluate"
        stamp = stamp_of(self._plan)
        told = LabelsCounted(stamp=stamp, kind=kind, step=item.step, count=counted)
        self._counts.add(self._device, item, counted)
        for device in self._plan.members:
            if device != self._device:
                self._outlet.send(device, told)

    async def _deliver(self, item: Item, part: OwnPart, weight: float) -> None:
        stamp = stamp_of(self._plan)
        for microbatch, feed in part.feeds.items():
            for kind in _KINDS:
                first = header_of(stamp, item, kind, microbatch, 0)
                for index, array in enumerate(fed_arrays(feed, kind, weight)):
                    header = dataclasses.replace(first, index=index)
                    await send_whole(self._outlet, self._device, header, array)
