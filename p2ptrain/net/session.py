"""What binds the links with one process of one peer together, from the first to the end."""

from __future__ import annotations

import trio

from p2ptrain.ids import DeviceId
from p2ptrain.net.connection import Connection
from p2ptrain.net.tls_link import LinkBroken
from p2ptrain.wire.hello import LINK_KINDS, Hello


class Session:
    """The links with one process of one peer, from the first connection to the end."""

    def __init__(self, device: DeviceId, after: trio.Event | None) -> None:
        self.device = device
        self.after = after
        """Set when the previous session's LinkDown was reported."""
        self.slots: dict[str, Connection] = {}
        self.instance: int | None = None
        self.up = trio.Event()
        self.was_announced = False
        self.over: LinkBroken | None = None
        self.finished = trio.Event()

    @property
    def complete(self) -> bool:
        return all(k in self.slots and self.slots[k].ready for k in LINK_KINDS)

    def renewable(self, theirs: Hello) -> Connection | None:
        """The connection that this HELLO may renew: up, dialled by the same process, settled."""
        connection = self.slots.get(theirs.kind)
        if connection is None or self.over is not None or not self.was_announced:
            return None
        same = self.instance == theirs.instance and not connection.dialled_here
        return connection if same and connection.can_renew and connection.settled else None
