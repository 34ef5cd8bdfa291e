"""What every part of the membership machine works on: the own record, the others, our slowness."""

from __future__ import annotations

import random

from p2ptrain import limits
from p2ptrain.ids import DeviceId
from p2ptrain.membership.gossip import Rumours
from p2ptrain.membership.messages import MembershipMessage
from p2ptrain.membership.probing import ProbeOrder, Questions
from p2ptrain.membership.record import MemberRecord
from p2ptrain.membership.standings import KnownPeer, Standings
from p2ptrain.wire.machine import Outgoing


class Mesh:
    """The state that detecting and gossiping share."""

    def __init__(self, *, own: MemberRecord, rng: random.Random) -> None:
        self._own = own
        self._rng = rng
        self._standings = Standings()
        self._peers = self._standings.peers
        self._linked = self._standings.linked
        self._questions = Questions()
        self._order = ProbeOrder(rng)
        self._rumours = Rumours()
        self._lag_s = 0.0
        self._lag_at_s = 0.0
        self._outgoing: list[Outgoing] = []

    @property
    def own(self) -> MemberRecord:
        """This peer's own record, as last published."""
        return self._own

    def _send(self, to: DeviceId, message: MembershipMessage) -> None:
        self._outgoing.append(Outgoing(to=to, message=message))

    def _is_partial(self) -> bool:
        """Whether some live member has no link with us: then others ask and tell for us."""
        return self._standings.live_count > len(self._linked)

    def lag(self, seconds: float, now: float) -> None:
        """The driver woke `seconds` late: silence in that time says nothing about others.

        For a while all timeouts are scaled up (Lifeguard's local health): a busy peer suspects
        nobody because it was slow itself. From LAG_FORGIVEN_S on the others' clocks are moved
        forward, too; not for less, or a peer that is always a little late never ends a wait.
        """
        if seconds < limits.LAG_NOTICED_S:
            return
        self._lag_s = min(limits.LAG_SCALE_MAX - 1.0, max(seconds, self._remaining_lag(now)))
        self._lag_at_s = now
        for peer in self._peers.values() if seconds >= limits.LAG_FORGIVEN_S else ():
            peer.shift(seconds, now)

    def _remaining_lag(self, now: float) -> float:
        age_s = max(0.0, now - self._lag_at_s)
        return self._lag_s * float(0.5 ** (age_s / limits.LAG_HALF_LIFE_S))

    def _recover(self, now: float) -> None:
        """Once the lag has worn off, the timeouts are the usual ones again."""
        if self._remaining_lag(now) < limits.LAG_NOTICED_S:
            self._lag_s = 0.0

    def _scale(self) -> float:
        """Multiplies the timeouts; taken at the last lag, so that a deadline stays put."""
        return 1.0 + self._lag_s

    def _direct_time_s(self, peer: KnownPeer) -> float:
        """How long a peer may take to answer a ping."""
        slow_s = 4.0 * (peer.round_trip_s or 0.0)
        timeout_s = min(max(limits.PROBE_TIMEOUT_S, slow_s), limits.PROBE_TIMEOUT_MAX_S)
        return timeout_s * self._scale()

    def _answer_time_s(self, peer: KnownPeer) -> float:
        """How long a question may take, asked directly and then through others."""
        return 2.0 * self._direct_time_s(peer)
