"""Blob exchanges of several devices that reach each other in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from p2ptrain.errors import PeerLost
from p2ptrain.ids import DeviceId
from p2ptrain.runtime.exchange.blobs import BlobExchange
from p2ptrain.training.messages import BlobMissing, BlobRequest
from p2ptrain.wire import frames
from p2ptrain.wire.flows import Flow
from p2ptrain.wire.frames import BulkHeader


@dataclass
class BlobNet:
    """Serves every request in a task of the nursery; `down` devices lose what is under way."""

    nursery: trio.Nursery
    count: int
    devices: tuple[DeviceId, ...]
    down: set[DeviceId] = field(default_factory=set)
    on_chunk: Callable[[BulkHeader], None] = lambda header: None
    """Called before each chunk travels."""
    sent: list[object] = field(default_factory=list)
    """Every message."""

    def __post_init__(self) -> None:
        self.exchanges = {each: self._exchange(each) for each in self.devices[: self.count]}

    def __getitem__(self, index: int) -> BlobExchange:
        return self.exchanges[self.devices[index]]

    def fail(self, device: DeviceId) -> None:
        """The device is gone: nobody hears from it."""
        self.down.add(device)
        for exchange in self.exchanges.values():
            exchange.peer_down(device)

    def _exchange(self, own: DeviceId) -> BlobExchange:
        def send(to: DeviceId, message: object) -> None:
            self._check(own, to)
            self.sent.append(message)
            if isinstance(message, BlobRequest):
                self.nursery.start_soon(self._serve, to, own, message)
            elif isinstance(message, BlobMissing):
                self.exchanges[to].missing(own, message)

        async def send_bulk(
            to: DeviceId, header: BulkHeader, chunk: memoryview, flow: Flow
        ) -> None:
            await trio.lowlevel.checkpoint()
            self._check(own, to)
            self.on_chunk(header)
            content = bytes(chunk)
            frames.check_chunk(header, content)
            self.exchanges[to].chunk_received(own, header, content)

        return BlobExchange(send=send, send_bulk=send_bulk)

    async def _serve(self, own: DeviceId, to: DeviceId, request: BlobRequest) -> None:
        try:
            await self.exchanges[own].serve(to, request)
        except PeerLost:
            return  # as a peer: whoever asked is told that it is gone

    def _check(self, own: DeviceId, to: DeviceId) -> None:
        if own in self.down or to in self.down:
            raise PeerLost("there is no link")
