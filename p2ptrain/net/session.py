"""What binds the links with one process of one peer together, from the first to the end."""

from __future__ import annotations

from collections.abc import Callable

import trio

from p2ptrain.errors import PeerLost
from p2ptrain.ids import DeviceId, short
from p2ptrain.net.connection import Connection
from p2ptrain.net.link_reports import LinkTotals
from p2ptrain.net.tls_link import LinkBroken
from p2ptrain.wire.arbitration import Standing
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


class SessionTable:
    """At most one session per peer: who has which place, and what becomes of whom it is taken from.

    Which of two connections may have a place is decided in wire/arbitration.py, not here.
    """

    def __init__(self, *, on_end: Callable[[Session, LinkBroken], None]) -> None:
        """`on_end` is called once for each session that ends; it calls `reported` in the end."""
        self._on_end = on_end
        self._sessions: dict[DeviceId, Session] = {}
        self._finished: dict[DeviceId, trio.Event] = {}
        self._changed = trio.Event()
        self._past = LinkTotals()

    def __len__(self) -> int:
        return len(self._sessions)

    def __contains__(self, device: DeviceId) -> bool:
        return device in self._sessions

    def get(self, device: DeviceId) -> Session | None:
        """The session with a peer, also one that is not complete yet."""
        return self._sessions.get(device)

    def live(self, device: DeviceId) -> Session:
        """The session with a peer that was announced; PeerLost when there is none."""
        session = self._sessions.get(device)
        if session is None or not session.was_announced or session.over is not None:
            raise PeerLost(f"there is no link with peer {short(device)}")
        return session

    def announced(self) -> tuple[DeviceId, ...]:
        """Peers whose links were reported to be up, sorted."""
        return tuple(sorted(d for d, s in self._sessions.items() if s.was_announced))

    def totals(self) -> LinkTotals:
        """Bytes of all connections, those of former sessions included."""
        sessions = self._sessions.values()
        connections = [each for session in sessions for each in session.slots.values()]
        return LinkTotals(self._past, connections)

    def standing(self, device: DeviceId, kind: str, instance: int | None) -> Standing:
        """Who has the place of a connection of this kind now."""
        session = self._sessions.get(device)
        if session is None:
            return Standing.NONE
        if instance is not None and session.instance not in (None, instance):
            return Standing.OTHER_INSTANCE
        return Standing.SAME_INSTANCE if kind in session.slots else Standing.NONE

    def has(self, device: DeviceId, kind: str) -> bool:
        """Whether a connection of this kind has its place, whichever process it is with."""
        return self.standing(device, kind, None) is not Standing.NONE

    def reserve(self, connection: Connection, theirs: Hello | None) -> Session:
        """Give a connection its place; whatever had it, or another process, is over."""
        device = connection.device
        session = self._sessions.get(device)
        instance = None if theirs is None else theirs.instance
        standing = self.standing(device, connection.kind, instance)
        if session is not None and standing is not Standing.NONE:
            restarted = standing is Standing.OTHER_INSTANCE
            reason = "the peer was restarted" if restarted else "the peer dialled again"
            self.end(session, LinkBroken(reason, closed_by_peer=True))
            session = None
        if session is None:
            session = Session(device, self._finished.get(device))
            self._sessions[device] = session
        session.slots[connection.kind] = connection
        return session

    def drop(self, session: Session, connection: Connection, error: BaseException) -> None:
        """A connection whose place was reserved did not come about: its session is over."""
        if session.over is None and session.slots.get(connection.kind) is connection:
            broken = error if isinstance(error, LinkBroken) else LinkBroken("the dial failed")
            self.end(session, broken)

    def end(self, session: Session, why: LinkBroken) -> None:
        """Forget a session and close its links; `on_end` follows."""
        if session.over is not None:
            return
        session.over = why
        if self._sessions.get(session.device) is session:
            del self._sessions[session.device]
        self._finished[session.device] = session.finished
        for connection in session.slots.values():
            self._past.add(connection)
            connection.scope.cancel()
            if not connection.ready:
                connection.close()
        self._changed.set()
        self._changed = trio.Event()
        self._on_end(session, why)

    def reported(self, session: Session) -> None:
        """The end of a session was told to whoever had to know: the next may be announced."""
        session.finished.set()
        if self._finished.get(session.device) is session.finished:
            del self._finished[session.device]

    def stop(self, why: LinkBroken) -> None:
        """Nothing is announced or ended any more: links no longer run."""
        for session in self._sessions.values():
            session.over = why

    async def wait_missing(self, device: DeviceId) -> bool:
        """Wait until there is no session with this device; False when there was none.

        A session that stays incomplete ends after LINK_PAIR_TIMEOUT_S, so this ends too.
        """
        waited = False
        while device in self._sessions:
            waited = True
            await self._changed.wait()
        return waited
