"""Who is there: probes over the control links, suspicion, and gossip of self-authored records.

SWIM with Lifeguard's suspicion over a partial mesh: a peer keeps links with some of the others,
asks the rest through common neighbours, and hears of everything by gossip. What it hears over a
link itself counts for more than what others say. Constants and sources: limits.py, DESIGN
section 6; the course of a message: PROTOCOL.md section 4.1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from p2ptrain import limits
from p2ptrain.errors import LocalProtocolError, RemoteProtocolError
from p2ptrain.ids import DeviceId
from p2ptrain.membership.accusation import REFUSED, SILENT
from p2ptrain.membership.events import MembershipEvent
from p2ptrain.membership.exchange import Exchange
from p2ptrain.membership.merge import problem_of
from p2ptrain.membership.messages import Ack, AskFor, Holdings, Linked, News, Ping, Vouch
from p2ptrain.membership.record import MemberRecord
from p2ptrain.membership.standings import KnownPeer, MemberView
from p2ptrain.membership.states import Sign, State
from p2ptrain.wire.machine import Outgoing

__all__ = ["MemberView", "Membership", "MembershipStatistics"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipStatistics:
    """What a membership machine has done, and how it stands."""

    alive_count: int
    suspect_count: int
    dead_count: int
    probe_count: int
    """Questions sent since the start, those asked for others included."""
    death_count: int
    """Peers told to be down since the start, restarts and leaves included."""
    timeout_scale: float
    """Timeouts are this much longer because this peer was slow lately; 1.0 at rest."""


class Membership(Exchange):
    """The membership machine of one peer; see `p2ptrain.wire.machine` for the verbs."""

    _probe_at_s: float | None = None

    # What the shell reads.

    def members(self, now: float) -> tuple[MemberView, ...]:
        """Every other peer known here, linked or not, by device id."""
        return self._standings.views(now)

    def alive(self) -> tuple[DeviceId, ...]:
        """Other peers that count as there and can be talked to, sorted.

        Exactly those that were up (MemberUp) and not down since; a suspected one still counts.
        """
        return tuple(sorted(d for d, peer in self._peers.items() if peer.counted))

    def state_of(self, device: DeviceId) -> State | None:
        """How another peer stands; None: nothing is known of it."""
        peer = self._peers.get(device)
        return None if peer is None else peer.state

    def record_of(self, device: DeviceId) -> MemberRecord | None:
        """The newest record of a device that reached us, or None."""
        if device == self._own.device:
            return self._own
        peer = self._peers.get(device)
        return None if peer is None else peer.record

    def statistics(self) -> MembershipStatistics:
        """Counts since the start, and the present scale of the timeouts."""
        return MembershipStatistics(
            alive_count=self._standings.count(State.ALIVE),
            suspect_count=self._standings.count(State.SUSPECT),
            dead_count=self._standings.count(State.DEAD),
            probe_count=self._questions.count,
            death_count=self._standings.down_count,
            timeout_scale=self._scale(),
        )

    # Inputs.

    def update_own(self, **changes: Any) -> MemberRecord:  # Any: fields of MemberRecord
        """Change fields of the own record and tell everybody linked; no change, no message.

        `leaving=True` makes this peer's end a leave for the others; taking it back is a
        refutation, so that who holds it gone already believes it again.

        Raises:
            LocalProtocolError: the record would be larger than others accept.
        """
        changed = replace(self._own, **changes)
        if changed == self._own:
            return self._own
        refutations = self._own.refutations + (self._own.leaving and not changed.leaving)
        changed = replace(changed, version=self._own.version + 1, refutations=refutations)
        problem = problem_of(changed)
        if problem is not None:
            raise LocalProtocolError(problem)
        self._publish(changed)
        return changed

    def away(self, seconds: float, now: float) -> None:
        """This machine was suspended and is back: say so, and blame nobody for the silence.

        The clock that `now` comes from stands still meanwhile. What others hold against us by
        now is contradicted at once.
        """
        for peer in self._peers.values():
            peer.answered()
            peer.silent_since_s = now
            if peer.suspicion is not None:
                peer.suspicion.began_at_s = now
        own = self._own
        self._publish(
            replace(
                own,
                version=own.version + 1,
                refutations=own.refutations + 1,
                away_count=own.away_count + 1,
                away_s=max(0.0, seconds),
            )
        )

    def link_up(self, device: DeviceId, now: float) -> None:
        """A control link to `device` is authenticated: compare records and probe at once."""
        if device == self._own.device:
            raise LocalProtocolError("a peer has no link to itself")
        peer = self._standings.know(device, now)
        if peer is None:
            return
        peer.linked = True
        self._linked[device] = peer
        peer.silent_since_s = now
        peer.links = peer.links_told = frozenset()
        peer.answered()
        self._start_timers(now)
        self._send(device, News(records=(self._own,)))
        if len(self._peers) > 1 or peer.record is not None:
            self._send(device, Holdings(held=self._holdings()))
        self._ask(device, peer, now)

    def link_down(self, device: DeviceId, refused: bool, now: float) -> None:
        """The control link is gone; `refused`: closed by the other side and a re-dial refused.

        The shell calls it once with False when the link breaks, and again with True when the
        machine at the other end refuses a new connection.
        """
        peer = self._peers.get(device)
        if peer is None or not (refused or peer.linked):
            return
        if peer.linked:
            peer.unlinked_at_s = now
            peer.linked = False
            del self._linked[device]
        if peer.record is None:
            self._standings.forget(device)
            return
        if refused:
            self._condemn(device, peer, Sign.REFUSED, REFUSED, now)
        elif peer.record.leaving:
            self._condemn(device, peer, Sign.LINK_LOST, SILENT, now)
        else:
            self._lose_link(device, peer, now)
        if peer.counted:
            self._standings.watched.add(device)
        self._judge_all(now)
        self._start_gossip(now)

    def _lose_link(self, device: DeviceId, peer: KnownPeer, now: float) -> None:
        """Suspect it, ask others at once, and give it the time of a question beforehand."""
        self._standings.observe(device, Sign.LINK_LOST, now, reason="its link broke")
        self._ask(device, peer, now)
        if peer.suspicion is not None:
            peer.suspicion.began_at_s = now + self._answer_time_s(peer)

    def heard(self, device: DeviceId, now: float) -> None:
        """Any sign of life over a link, such as a data frame, counts as an answer."""
        peer = self._linked.get(device)
        if peer is None:
            return
        peer.heard_at_s = peer.silent_since_s = now
        peer.answered()
        if peer.record is None:
            return
        verdict = peer.verdict
        self._standings.observe(device, Sign.HEARD, now)
        if verdict is not None:
            # Those without a link believe only its own word: give it the reason to speak.
            self._send(device, News(accusations=(verdict,)))

    def receive(self, message: object, sender: DeviceId, now: float) -> None:
        """Take one membership message from a linked peer; others' late messages are dropped.

        Raises:
            RemoteProtocolError: a malformed record or claim; the caller drops the link.
            LocalProtocolError: not a membership message; the caller's dispatch is wrong.
        """
        peer = self._linked.get(sender)
        if peer is None:
            return
        match message:
            case Ping():
                self._answer(message, sender)
            case Ack():
                self._take_record(message, sender, now)
                self._take_ack(message, peer, sender, now)
            case AskFor():
                self._relay(message, sender, now)
            case Vouch():
                self._take_vouch(message, sender, now)
            case News():
                self._take_news(message, sender, now)
            case Holdings():
                self._take_holdings(message, sender, now)
            case Linked():
                peer.links = frozenset(message.devices)
            case _:
                raise LocalProtocolError(f"{type(message).__name__} is no membership message")
        self.heard(sender, now)
        self._judge_all(now)
        self._start_gossip(now)

    def _take_record(self, ack: Ack, sender: DeviceId, now: float) -> None:
        if ack.record is not None:
            if ack.record.device != sender:
                raise RemoteProtocolError("an ack carries the record of another device")
            self._merge(ack.record, now)

    def tick(self, now: float) -> None:
        """Probe, gossip, compare and judge silence, as far as due."""
        if self._probe_at_s is not None and now >= self._probe_at_s:
            self._probe_round(now)
        if self._gossip_at_s is not None and now >= self._gossip_at_s:
            self._gossip_round(now)
        if self._push_at_s is not None and now >= self._push_at_s:
            self._push_round(now)
        self._recover(now)
        self._judge_all(now)
        self._start_gossip(now)

    # Outputs.

    def deadline(self) -> float | None:
        """The next probe round, gossip, push or judgement."""
        rounds = (self._probe_at_s, self._gossip_at_s, self._push_at_s)
        times = [t for t in rounds if t is not None]
        for device in self._standings.watched:
            step = self._next_step(self._peers[device])
            if step is not None:
                times.append(step[0])
        return min(times, default=None)

    def writes(self) -> tuple[object, ...]:
        """Membership keeps nothing on disk."""
        return ()

    def outgoing(self) -> list[Outgoing]:
        """Drain the messages to send."""
        drained, self._outgoing = self._outgoing, []
        return drained

    def events(self) -> list[MembershipEvent]:
        """Drain the events, in order."""
        return self._standings.events()

    # Rounds.

    def _start_timers(self, now: float) -> None:
        if self._probe_at_s is None:
            self._probe_at_s = now + limits.PROBE_INTERVAL_S
            self._push_at_s = now + limits.PUSH_PULL_INTERVAL_S * self._rng.uniform(0.5, 1.0)

    def _probe_round(self, now: float) -> None:
        # Jitter keeps the peers of a group from probing in step.
        self._probe_at_s = now + limits.PROBE_INTERVAL_S * self._rng.uniform(0.9, 1.1)
        self._round += 1
        self._questions.forget(now - limits.QUESTION_KEPT_S)
        for device in self._round_targets():
            self._ask(device, self._peers[device], now)
        self._tell_links()
        self._hint_addresses(now)
