"""Notice links that carry nothing although their other ends live.

Membership asks through others, so a peer whose direct way to one other is cut stays alive for all.
A run needs that very way: its members close a link that has been silent and plan without it.
"""

from __future__ import annotations

from collections.abc import Iterable

from p2ptrain import limits
from p2ptrain.ids import DeviceId
from p2ptrain.membership.standings import MemberView
from p2ptrain.membership.states import State

LOOK_EVERY_S = 1.0
LOOKS = 3
"""In a row, each on time: after a pause of our own the others get as long to be heard."""


class LinkWatch:
    """Judges links at regular looks; pure but for the times it is told."""

    def __init__(self) -> None:
        self._silent: dict[DeviceId, int] = {}
        self._looked_at_s: float | None = None

    def look(self, views: Iterable[MemberView], now: float) -> tuple[DeviceId, ...]:
        """Devices whose link is to be closed, given membership's table at `now`."""
        before, self._looked_at_s = self._looked_at_s, now
        if before is None or now - before > 2 * LOOK_EVERY_S:
            self._silent.clear()
            return ()
        silent = {view.device for view in views if _is_silent(view)}
        self._silent = {device: self._silent.get(device, 0) + 1 for device in silent}
        return tuple(sorted(d for d, count in self._silent.items() if count >= LOOKS))


def _is_silent(view: MemberView) -> bool:
    heard = view.last_heard_s
    there = view.state in (State.ALIVE, State.SUSPECT)
    return there and view.linked and heard is not None and heard > limits.LINK_SILENT_S
