"""A replica's gradients, added up with its siblings' beside the backward of earlier segments."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager

import trio

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.energy.phases import Phase
from p2ptrain.errors import InvariantBroken
from p2ptrain.runtime.compute.stage import StageWorker
from p2ptrain.runtime.exchange.meeting import Meetings, Ranks, SendPiece
from p2ptrain.runtime.signal import Signal
from p2ptrain.training.collectives import gradient_meetings, held_bytes
from p2ptrain.training.routing import Route


class GradientSums:
    """Of one replica of a stage in a view: one meeting for each segment and step."""

    def __init__(
        self,
        worker: StageWorker,
        manifest: Manifest,
        route: Route,
        *,
        send: SendPiece,
        phase: Callable[[Phase], AbstractContextManager[None]],
        signal: Signal,
    ) -> None:
        """Arguments as `Meetings` takes them."""
        devices = route.stage.devices
        self._worker = worker
        self._keys = gradient_meetings(manifest, route.stage.segments, len(devices))
        self._nursery: trio.Nursery | None = None
        self._added = 0
        self.meetings = Meetings(
            Ranks(devices=devices, own=route.rank),
            expected=lambda phase, key: self._keys.get(key) if phase == "train" else None,
            held_bytes_max=held_bytes(tuple(self._keys.values()), route.rank),
            send=send,
            phase=phase,
            signal=signal,
        )

    @contextlib.asynccontextmanager
    async def added_up(self) -> AsyncIterator[None]:
        """A step: ends when every segment's gradients are the sum over all siblings.

        Who runs no microbatch of it takes part with zeros. Owns the meetings' tasks. A
        cancellation leaves gradients that are of no use: the step is to be abandoned.

        Raises:
            PeerLost: a sibling is gone; the view must change.
        """
        async with trio.open_nursery() as nursery:
            self._nursery, self._added = nursery, 0
            yield
            if self._added == 0:
                await trio.to_thread.run_sync(self._worker.clear_gradients)
                for key in self._keys:
                    self.add(key.segment)
        self._nursery = None
        self._worker.gradients_reduced()

    def add(self, segment: int) -> None:
        """The segment's last own backward is done: nothing adds to its gradients here any more."""
        key = next(key for key in self._keys if key.segment == segment)
        if self._nursery is None:
            raise InvariantBroken("gradients are added up outside of a step")
        self._added += 1
        vector = self._worker.gradient_vector(segment)
        self._nursery.start_soon(self.meetings.reduce, key, vector)
