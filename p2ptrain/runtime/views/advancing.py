"""What a member does in a view that has an aim: take in advance what it is to run next.

`recovery.advance` says what goes where. States come as replicas do (`runtime.keeping.replication`);
here is the rest: a bundle's weights, and the moment at which the next view is wanted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable

import trio

from p2ptrain.agreement.view import View
from p2ptrain.errors import BundleError, PeerLost
from p2ptrain.ids import DeviceId
from p2ptrain.recovery.advance import advanced_step, marks, receivers
from p2ptrain.runtime.keeping.run_state import WEIGHTS_FOLDER, RunState
from p2ptrain.runtime.keeping.stage_weights import StageWeights


class Advance:
    """One member's part in a view's aim; without one it has nothing to do."""

    def __init__(self, view: View, state: RunState, want: Callable[[str], None]) -> None:
        """`want` is told, in words, that the next view can be the one aimed at."""
        self._view, self._state, self._want = view, state, want
        self._device = state.services.device
        self._receivers = receivers(view)
        self._wanted = False

    def gets(self, segment: int) -> bool:
        """Whether this device is to run the segment next, and does not yet."""
        return self._receivers.get(segment) == self._device

    def sends(self, segments: Iterable[int]) -> tuple[tuple[DeviceId, int], ...]:
        """Who gets which of our stage's segments next."""
        return tuple((self._receivers[s], s) for s in segments if s in self._receivers)

    def marks(self, segments: range) -> tuple[int, ...]:
        """Where in our stage is logged what crosses, though nobody is sent it."""
        return marks(self._view, segments)

    def look(self) -> None:
        """A replica is durable somewhere: the home peer asks for the next view once all are."""
        sets = self._state.sets
        if self._wanted or self._view.plan.home != self._device:
            return
        if advanced_step(self._view, sets.steps, sets.keepers) is not None:
            self._wanted = True
            name_of = self._state.services.directory.name_of
            names = ", ".join(sorted(map(name_of, set(self._receivers.values()))))
            self._want(f"{names} can take over segments")

    async def run(self) -> None:
        """Fetch the weights of what we are to run. What cannot be had now is asked for again when
        it is needed. Cancelled: whole segments stay."""
        for segment in sorted(filter(self.gets, self._receivers)):
            with contextlib.suppress(PeerLost, BundleError):
                await self._fetch_weights(segment)
        await trio.lowlevel.checkpoint()

    async def _fetch_weights(self, segment: int) -> None:
        state = self._state
        if state.own_weights is None:
            weights = StageWeights(
                state.path / WEIGHTS_FOLDER,
                manifest=state.manifest,
                segments=range(segment, segment + 1),
            )
            await weights.fetch(state.services.blobs, self._view.plan.home, resumed=True)
