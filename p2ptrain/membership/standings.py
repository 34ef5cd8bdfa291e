"""How every known peer stands, what moves it from one state to another, and what is told of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from p2ptrain import limits
from p2ptrain.ids import DeviceId
from p2ptrain.membership.accusation import CUT_OFF, LEFT, RESTARTED, SILENT, Accusation
from p2ptrain.membership.events import (
    MemberDown,
    MembershipEvent,
    MemberSuspected,
    MemberUp,
    SuspicionCleared,
)
from p2ptrain.membership.messages import Held
from p2ptrain.membership.record import MemberRecord
from p2ptrain.membership.states import TRANSITIONS, Sign, State
from p2ptrain.membership.suspicion import Suspicion

LIVE: Final = (State.ALIVE, State.SUSPECT)
THROUGH_OTHERS: Final = "through others, no link"
_ENDS: Final = (Sign.EXPIRED, Sign.CONDEMNED, Sign.LINK_LOST, Sign.REFUSED)
"""What is a leave when the peer had said that it goes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberView:
    """One line of the membership table, as `status` shows it."""

    device: DeviceId
    record: MemberRecord | None
    state: State
    reason: str
    """Why it is in this state, one phrase; empty when alive and linked."""
    linked: bool
    """Whether we have a control link with it."""
    state_s: float
    """Seconds since it came into this state."""
    last_heard_s: float | None
    """Seconds since the last sign of life over its link; None: never heard."""
    round_trip_s: float | None
    """Smoothed time between a ping and its answer; None: none came yet."""
    last_down: str
    """Why it was down the last time, one phrase; empty when it never was."""


@dataclass(slots=True, kw_only=True)
class KnownPeer:
    """What this peer knows of one other."""

    since_s: float
    """In this state since."""
    record: MemberRecord | None = None
    content: int = 0
    """Of the record, see `merge.content_of`."""
    state: State = State.HEARD_OF
    reason: str = "it has not said who it is"
    counted: bool = False
    """MemberUp was told, and no MemberDown since."""
    last_down: str = ""
    linked: bool = False
    links: frozenset[DeviceId] = frozenset()
    """Whom it says it has links with; empty when it did not say."""
    links_told: frozenset[DeviceId] = frozenset()
    """Whom we last told it that we have links with."""
    unlinked_at_s: float = 0.0
    heard_at_s: float | None = None
    silent_since_s: float = 0.0
    """`heard_at_s`, moved forward by the time during which we ourselves did not look."""
    round_trip_s: float | None = None
    asked_at_s: float | None = None
    """When the oldest question was asked that nobody has answered since."""
    asked_others: bool = False
    """Whether that question was put through others, too."""
    accusers: set[DeviceId] = field(default_factory=set)
    """Who has called it silent since it last answered, while we did not believe it."""
    suspicion: Suspicion | None = None
    """In state SUSPECT: since when, and who confirms it."""
    verdict: Accusation | None = None
    """In state DEAD or LEFT: what its record must outrank to be believed alive."""
    told_at_s: float | None = None
    """When it was last told that it is accused."""
    held: Held | None = None
    """Its line in our holdings, until something changes."""

    def shift(self, seconds: float, now: float) -> None:
        """Forget a time in which we ourselves did not look."""
        self.silent_since_s = min(now, self.silent_since_s + seconds)
        self.unlinked_at_s = min(now, self.unlinked_at_s + seconds)
        if self.asked_at_s is not None:
            self.asked_at_s = min(now, self.asked_at_s + seconds)
        if self.suspicion is not None:
            self.suspicion.began_at_s += seconds

    def answered(self) -> None:
        """Nobody waits for an answer any more."""
        self.asked_at_s = None
        self.asked_others = False
        self.accusers.clear()


class Standings:
    """All known peers by device id; the only place where a peer changes its state."""

    def __init__(self) -> None:
        self.peers: dict[DeviceId, KnownPeer] = {}
        self.linked: dict[DeviceId, KnownPeer] = {}
        self.watched: set[DeviceId] = set()
        """Peers that something may become due for."""
        self.down_count = 0
        self._counts: Counter[State] = Counter()
        self._events: list[MembershipEvent] = []

    def events(self) -> list[MembershipEvent]:
        """Drain the events, in order."""
        drained, self._events = self._events, []
        return drained

    def tell(self, event: MembershipEvent) -> None:
        """Append an event."""
        self._events.append(event)

    def count(self, state: State) -> int:
        """How many others are in a state."""
        return self._counts[state]

    @property
    def live_count(self) -> int:
        """Others that count as there, linked or not."""
        return self._counts[State.ALIVE] + self._counts[State.SUSPECT]

    def live(self) -> Iterator[tuple[DeviceId, KnownPeer]]:
        """Others that count as there, by device id."""
        return ((d, peer) for d, peer in sorted(self.peers.items()) if peer.state in LIVE)

    def know(self, device: DeviceId, now: float) -> KnownPeer | None:
        """The peer of that id, made if need be; None when there is no room for one more."""
        peer = self.peers.get(device)
        if peer is None:
            if len(self.peers) >= limits.MEMBERS_KNOWN_MAX and not self._forget_one():
                return None
            peer = self.peers[device] = KnownPeer(since_s=now)
            self._counts[State.HEARD_OF] += 1
        return peer

    def _forget_one(self) -> bool:
        """Make room: whoever is gone for longest is forgotten."""
        gone = [
            (peer.since_s, device)
            for device, peer in self.peers.items()
            if peer.state in (State.DEAD, State.LEFT) and not peer.linked
        ]
        if not gone:
            return False
        self.forget(min(gone)[1])
        return True

    def forget(self, device: DeviceId) -> None:
        """Know nothing of a peer any more."""
        self._counts[self.peers.pop(device).state] -= 1
        self.watched.discard(device)

    def observe(
        self, device: DeviceId, sign: Sign, now: float, *, reason: str = "", kind: str = SILENT
    ) -> None:
        """Move a peer along the table, and tell the shell what it should know."""
        peer = self.peers[device]
        if sign in _ENDS and peer.record is not None and peer.record.leaving:
            sign, reason, kind = Sign.GONE, "left", LEFT
        before, after = peer.state, TRANSITIONS[peer.state, sign]
        if after is not before:
            self._enter(peer, after, reason, now)
            if after is State.SUSPECT:
                self.watched.add(device)
        if after is State.ALIVE and sign is Sign.HEARD and not peer.counted:
            self._up(peer)
        elif peer.counted and after is not before:
            self._tell_change(device, peer, kind)

    def _enter(self, peer: KnownPeer, state: State, reason: str, now: float) -> None:
        self._counts[peer.state] -= 1
        self._counts[state] += 1
        peer.state, peer.since_s, peer.reason = state, now, reason
        peer.suspicion, peer.held = None, None
        if state is State.SUSPECT and peer.record is not None:
            peer.suspicion = Suspicion(began_at_s=now, standing=peer.record.standing)
        else:
            peer.answered()
        if state is State.ALIVE:
            peer.verdict = None

    def _up(self, peer: KnownPeer) -> None:
        if peer.record is not None:
            peer.counted = True
            self.tell(MemberUp(record=peer.record))

    def _tell_change(self, device: DeviceId, peer: KnownPeer, kind: str) -> None:
        if peer.state is State.SUSPECT:
            self.tell(MemberSuspected(device=device, reason=peer.reason))
        elif peer.state is State.ALIVE:
            self.tell(SuspicionCleared(device=device))
        else:
            self._down(device, peer, peer.reason, kind)

    def cut_off(self, device: DeviceId) -> None:
        """Others reach a peer and we do not: it is there, but not for us."""
        peer = self.peers[device]
        if peer.counted:
            self._down(device, peer, "there is no link with it, others reach it", CUT_OFF)

    def restarted(self, device: DeviceId, now: float) -> None:
        """Its record is that of a newer process."""
        self.observe(device, Sign.RESTARTED, now, reason="it restarted", kind=RESTARTED)

    def _down(self, device: DeviceId, peer: KnownPeer, reason: str, kind: str) -> None:
        peer.counted, peer.last_down = False, reason
        self.down_count += 1
        self.tell(MemberDown(device=device, reason=reason, kind=kind))

    def views(self, now: float) -> tuple[MemberView, ...]:
        """Every other peer, by device id."""
        return tuple(_view(d, peer, now) for d, peer in sorted(self.peers.items()))


def _view(device: DeviceId, peer: KnownPeer, now: float) -> MemberView:
    reason = peer.reason
    if peer.state is State.ALIVE:
        reason = "" if peer.linked else THROUGH_OTHERS
    return MemberView(
        device=device,
        record=peer.record,
        state=peer.state,
        reason=reason,
        linked=peer.linked,
        state_s=max(0.0, now - peer.since_s),
        last_heard_s=None if peer.heard_at_s is None else max(0.0, now - peer.heard_at_s),
        round_trip_s=peer.round_trip_s,
        last_down=peer.last_down,
    )
