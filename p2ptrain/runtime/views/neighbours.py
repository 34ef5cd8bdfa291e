"""Tensors on their way to the peers of the stages beside this one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import trio

from p2ptrain.engine.contract import Array
from p2ptrain.ids import DeviceId
from p2ptrain.runtime.exchange.outlet import Outlet, send_whole
from p2ptrain.runtime.reporting.usage import RunMeter
from p2ptrain.wire.frames import TensorHeader

SEND_QUEUE_MAX: Final = 8


@dataclass(frozen=True, slots=True)
class Outgoing:
    """Encoded tensors on their way to a neighbour; they stay untouched until they are sent."""

    header: TensorHeader
    arrays: tuple[Array, ...]


class Neighbours:
    """One bounded queue for each neighbour: a slow one holds up no other."""

    def __init__(
        self, devices: Iterable[DeviceId], *, outlet: Outlet, meter: RunMeter, copies: bool
    ) -> None:
        """Nothing is sent before `start`.

        Args:
            devices: All that `put` may name.
            outlet: Sends frames.
            meter: Where the time is booked.
            copies: Whether arrays may be written again before they are sent. Of one neighbour on
                each side the next tensors come only after it has ours; of several, from another.
        """
        self._outlet, self._meter, self._copies = outlet, meter, copies
        self._queues = {
            device: trio.open_memory_channel[Outgoing](SEND_QUEUE_MAX) for device in devices
        }
        self._shared: frozenset[DeviceId] = frozenset()

    def share(self, other: Neighbours) -> None:
        """Send to a neighbour of both in the order of both's `put`; the other one starts that."""
        self._shared = frozenset(self._queues.keys() & other._queues.keys())
        self._queues |= {device: other._queues[device] for device in self._shared}

    def start(self, nursery: trio.Nursery) -> None:
        """Send from now on; the tasks end after `close`, when everything is sent."""
        for device, (_, receive) in self._queues.items():
            if device not in self._shared:
                nursery.start_soon(self._send_all, device, receive)

    async def put(self, device: DeviceId, header: TensorHeader, arrays: tuple[Array, ...]) -> None:
        """Queue the tensors of one boundary; waits while the queue is full."""
        kept = tuple(array.copy() for array in arrays) if self._copies else arrays
        await self._queues[device][0].send(Outgoing(header, kept))

    def close(self) -> None:
        """No more tensors."""
        for send, _ in self._queues.values():
            send.close()

    async def _send_all(
        self, device: DeviceId, outgoing: trio.MemoryReceiveChannel[Outgoing]
    ) -> None:
        """One neighbour's tensors in order, one frame per array, until its queue closes."""
        async for tensors in outgoing:
            with self._meter.phase("communicate"):
                for index, array in enumerate(tensors.arrays):
                    header = dataclasses.replace(tensors.header, index=index)
                    await send_whole(self._outlet, device, header, array)
                if not tensors.arrays:
                    await send_whole(self._outlet, device, tensors.header)
