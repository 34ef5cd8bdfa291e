"""Messages that come ahead of the view they belong to.

A view's members learn of it at different moments, so the first to know may already speak of it.
"""

from __future__ import annotations

from p2ptrain import limits
from p2ptrain.errors import RemoteProtocolError
from p2ptrain.ids import DeviceId
from p2ptrain.training.messages import Stamp

Early = tuple[tuple[DeviceId, object], ...]
"""Messages with their senders, in the order of arrival."""


class EarlyMessages:
    """Keeps a bounded number of messages per sender until their view is entered."""

    def __init__(self) -> None:
        self._kept: list[tuple[DeviceId, Stamp, object]] = []

    def keep(self, device: DeviceId, stamp: Stamp, message: object) -> None:
        """Keep one message; RemoteProtocolError when its sender has too many here."""
        count = sum(sender == device for sender, _, _ in self._kept)
        if count >= limits.EARLY_MESSAGES_MAX:
            raise RemoteProtocolError("too many messages ahead of a decision")
        self._kept.append((device, stamp, message))

    def take(self, stamp: Stamp) -> Early:
        """What came for this view; what came for older ones of its lineage is forgotten."""
        taken = tuple((device, message) for device, s, message in self._kept if s == stamp)
        place = (stamp.lineage, stamp.view)
        self._kept = [kept for kept in self._kept if (kept[1].lineage, kept[1].view) > place]
        return taken
