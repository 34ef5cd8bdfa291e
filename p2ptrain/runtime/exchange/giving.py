"""What a member gives while others restore their segments: states, logs, the run's data."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from p2ptrain import limits
from p2ptrain.errors import CheckpointError, PeerLost, RemoteProtocolError
from p2ptrain.ids import DeviceId, Digest
from p2ptrain.runtime.exchange.blobs import BlobExchange, blob_digest
from p2ptrain.runtime.exchange.outlet import Outlet
from p2ptrain.runtime.signal import Signal
from p2ptrain.training.messages import Given, Wanted
from p2ptrain.wire.flows import Flow

Read = Callable[[Wanted], Awaitable[bytes | None]]
"""The wanted bytes; None while they are not there yet. CheckpointError: they never will be."""


_KINDS: Final = {"state": "state", "input": "data", "labels": "data"}
"""What is counted otherwise than as logs."""


class Giver:
    """Answers `wanted` of one view until it begins.

    One blob per asker is offered at a time: asking for the next says that the last has arrived.
    """

    def __init__(self, *, outlet: Outlet, blobs: BlobExchange, read: Read) -> None:
        self._outlet, self._blobs, self._read = outlet, blobs, read
        self._waiting: list[tuple[DeviceId, Wanted]] = []
        self._offered: dict[DeviceId, Digest] = {}
        self._stale = False
        self._changed = Signal()
        self.given_bytes = 0

    def ask(self, device: DeviceId, wanted: Wanted) -> None:
        """Note what a member wants.

        Raises:
            RemoteProtocolError: it wants more at once than one thing after another.
        """
        if len(self._waiting) >= limits.WANTED_MAX:
            raise RemoteProtocolError("more is wanted than can be given")
        self._waiting.append((device, wanted))
        self.look_again()

    def look_again(self) -> None:
        """Something that may be waited for is there now."""
        self._stale = True
        self._changed.notify()

    async def run(self) -> None:
        """Give, in the order of asking, until cancelled; then nothing is offered any more."""
        try:
            while True:
                self._stale = False
                for device, wanted in list(self._waiting):
                    await self._answer(device, wanted)
                await self._changed.wait_until(lambda: self._stale)
        finally:
            for digest in self._offered.values():
                self._blobs.withdraw(digest)
            self._offered.clear()

    async def _answer(self, device: DeviceId, wanted: Wanted) -> None:
        try:
            content = await self._read(wanted)
        except CheckpointError:
            self._waiting.remove((device, wanted))
            self._tell(device, wanted, Digest(""), 0, missing=True)
            return
        if content is None:
            return
        self._waiting.remove((device, wanted))
        digest = await trio.to_thread.run_sync(blob_digest, content)
        old = self._offered.pop(device, None)
        if old is not None:
            self._blobs.withdraw(old)
        flow = Flow(wanted.stamp.run, _KINDS.get(wanted.what, "log"))
        self._offered[device] = self._blobs.publish(content, digest=digest, flow=flow)
        self.given_bytes += len(content)
        self._tell(device, wanted, digest, len(content), missing=False)

    def _tell(
        self, device: DeviceId, wanted: Wanted, blob: Digest, size: int, *, missing: bool
    ) -> None:
        given = Given(
            stamp=wanted.stamp,
            what=wanted.what,
            segment=wanted.segment,
            step=wanted.step,
            blob=blob,
            blob_bytes=size,
            missing=missing,
        )
        with contextlib.suppress(PeerLost):  # then the view changes again
            self._outlet.send(device, given)
