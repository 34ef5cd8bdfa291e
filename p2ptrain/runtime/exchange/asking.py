"""Ask another member for something that the view says it has, and wait for it."""

from __future__ import annotations

import trio

from p2ptrain import limits
from p2ptrain.errors import PeerLost
from p2ptrain.ids import DeviceId
from p2ptrain.runtime.exchange.blobs import BlobExchange
from p2ptrain.runtime.exchange.outlet import Outlet
from p2ptrain.runtime.signal import Signal
from p2ptrain.training.messages import Given, Stamp, Wanted

_Key = tuple[DeviceId, str, int, int]


class NotThere(PeerLost):
    """A member does not have what the view says it has, and will not."""


class Asker:
    """The asking side of one view; `receive` takes the answers."""

    def __init__(
        self,
        *,
        stamp: Stamp,
        outlet: Outlet,
        blobs: BlobExchange,
        signal: Signal,
        replay_s: float = 0.0,
    ) -> None:
        """`replay_s`: how long who is asked may need to make it again, beside getting ready."""
        self._stamp, self._outlet, self._blobs, self._signal = stamp, outlet, blobs, signal
        self._wait_s = limits.PREPARE_TIMEOUT_S + replay_s
        self._answers: dict[_Key, Given | None] = {}
        self.fetched_bytes = 0

    def receive(self, device: DeviceId, given: Given) -> None:
        """Take an answer; one that nobody waits for is dropped."""
        key = (device, given.what, given.segment, given.step)
        if key in self._answers:
            self._answers[key] = given
            self._signal.notify()

    async def fetch(
        self,
        device: DeviceId,
        what: str,
        segment: int,
        step: int,
        microbatches: tuple[int, ...] = (),
    ) -> bytes:
        """Get one thing whole, or of a step's log some microbatches. Cancelled: nothing is kept.

        Raises:
            NotThere: it does not have it, which may not matter.
            PeerLost: it went away, or did not have it ready in time; the view must change.
            RemoteProtocolError: what came is not what it announced.
        """
        wanted = Wanted(
            stamp=self._stamp, what=what, segment=segment, step=step, microbatches=microbatches
        )
        key = (device, what, segment, step)
        self._answers[key] = None
        try:
            self._outlet.send(device, wanted)
            given = await self._wait(key)
            if given.missing:
                raise NotThere(
                    f"{device[:8]} does not have the {what} of segment {segment} at step {step}"
                )
            content = await self._blobs.fetch(device, given.blob, size=given.blob_bytes)
        finally:
            del self._answers[key]
        self.fetched_bytes += len(content)
        return content

    async def _wait(self, key: _Key) -> Given:
        with trio.move_on_after(self._wait_s):
            await self._signal.wait_until(lambda: self._answers[key] is not None)
        given = self._answers[key]
        if given is None:
            raise PeerLost(
                f"{key[0][:8]} did not give the {key[1]} of segment {key[2]} at step {key[3]} "
                f"within {self._wait_s:.0f} s"
            )
        return given
