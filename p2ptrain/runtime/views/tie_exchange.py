"""Copies of tied tensors on other peers: send our gradients of them, wait for theirs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import trio

from p2ptrain.engine.contract import Array
from p2ptrain.errors import InvariantBroken
from p2ptrain.ids import DeviceId
from p2ptrain.runtime.compute.segment_memory import FloatArray
from p2ptrain.runtime.exchange.inbox import TensorInbox
from p2ptrain.runtime.exchange.outlet import send_whole
from p2ptrain.runtime.keeping.run_state import LogPlace
from p2ptrain.runtime.views.item_run import RunPlace
from p2ptrain.training.arrivals import TieSend
from p2ptrain.training.headers import header_of
from p2ptrain.training.messages import stamp_of
from p2ptrain.training.program import Item
from p2ptrain.training.step_tensors import expected_tensors


class Tied(Protocol):
    """What holds copies of tied tensors."""

    def gradient(self, name: str) -> FloatArray:
        """The accumulated gradient of one: a live view."""


class TieExchange:
    """One device's part of the exchange, once in each step, after its last backward."""

    def __init__(
        self, place: RunPlace, worker: Tied, inbox: TensorInbox, sends: Sequence[TieSend]
    ) -> None:
        """`inbox` takes in the gradients of copies elsewhere; `sends` says whose go to whom."""
        self._place, self._worker, self._inbox, self._sends = place, worker, inbox, sends
        self._stamp = stamp_of(place.plan)

    async def arrived(self, step: int) -> dict[str, Array]:
        """The gradients of all copies elsewhere, by tensor name, once our own are sent, too.

        All sends end before the sum, which overwrites the gradients that are sent.
        """
        place = self._place
        self._log(step)
        async with trio.open_nursery() as nursery:
            for send in self._sends:
                for device in send.devices:
                    nursery.start_soon(self._send, step, send, device)
            with place.meter.phase("wait"):
                await place.signal.wait_until(lambda: self._inbox.tied() is not None)
        arrived = self._inbox.tied()
        if arrived is None:
            raise InvariantBroken("tied gradients vanished")
        tensors = place.manifest.tensors
        return {tensors[key.tensor_index].name: array for key, array in arrived.items()}

    def _log(self, step: int) -> None:
        """Log every tied copy of each segment that sends one: a log does not depend on cuts."""
        manifest = self._place.manifest
        for segment in sorted({send.key.segment for send in self._sends}):
            copies = expected_tensors(manifest, self._place.contract, "tied", segment)
            names = [manifest.tensors[copy.index].name for copy in copies]
            arrays = tuple(self._worker.gradient(name) for name in names)
            at = LogPlace(kind="tied", step=step, microbatch=0, segment=segment)
            self._place.hooks.log(at, arrays)

    async def _send(self, step: int, send: TieSend, device: DeviceId) -> None:
        item = Item(kind="train", step=step)
        header = header_of(self._stamp, item, "tied", 0, send.key.segment)
        header = dataclasses.replace(header, index=send.key.tensor_index)
        with self._place.meter.phase("communicate"):
            await send_whole(self._place.outlet, device, header, self._worker.gradient(send.tensor))
