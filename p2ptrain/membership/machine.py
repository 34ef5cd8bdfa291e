"""Who is there: probes over the control links, suspicion, and gossip of self-authored records.

First form: everybody probes everybody it has a link to, which is right up to about 16 peers.
Constants and their sources: limits.py; DESIGN section 6.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from p2ptrain import limits
from p2ptrain.errors import LocalProtocolError, RemoteProtocolError
from p2ptrain.ids import DeviceId
from p2ptrain.membership.events import (
    AddressLearned,
    MemberDown,
    MembershipEvent,
    MemberSuspected,
    MemberUp,
    RecordChanged,
    SuspicionCleared,
)
from p2ptrain.membership.merge import is_newer, problem_of
from p2ptrain.membership.messages import Ack, Ping, Records
from p2ptrain.membership.record import MemberRecord
from p2ptrain.membership.states import TRANSITIONS, Sign, State
from p2ptrain.wire.machine import Outgoing


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberView:
    """One line of the membership table, as `status` shows it."""

    device: DeviceId
    record: MemberRecord | None
    state: State
    reason: str
    """Why it is in this state, one phrase; empty when alive."""
    last_heard_s: float | None
    """Seconds since the last sign of life; None: never heard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipStatistics:
    """What a membership machine has done, and how it stands."""

    alive_count: int
    suspect_count: int
    dead_count: int
    probe_count: int
    """Probes sent since the start."""
    death_count: int
    """Deaths and restarts of others told since the start."""
    timeout_scale: float
    """Timeouts are this much longer because this peer was slow lately; 1.0 at rest."""


@dataclass(slots=True, kw_only=True)
class _Peer:
    """What this peer knows of one other."""

    record: MemberRecord | None = None
    state: State = State.HEARD_OF
    reason: str = "known from others, never reached"
    linked: bool = False
    heard_at_s: float | None = None
    silent_since_s: float = 0.0
    """`heard_at_s`, moved forward by the time during which we ourselves did not look."""
    round_trip_s: float = 0.0
    probes: dict[int, float] | None = None
    """Unanswered probes: sequence -> sent at."""


class Membership:
    """The membership machine of one peer; see `p2ptrain.wire.machine` for the verbs."""

    def __init__(self, *, own: MemberRecord, rng: random.Random) -> None:
        self._own = own
        self._rng = rng
        self._peers: dict[DeviceId, _Peer] = {}
        self._sequence = 0
        self._round = 0
        self._death_count = 0
        self._probe_at_s: float | None = None
        self._push_at_s: float | None = None
        self._lag_s = 0.0
        self._lag_at_s = 0.0
        self._outgoing: list[Outgoing] = []
        self._events: list[MembershipEvent] = []

    # What the shell reads.

    @property
    def own(self) -> MemberRecord:
        """This peer's own record, as last published."""
        return self._own

    def members(self, now: float) -> tuple[MemberView, ...]:
        """Every other peer known here, by device id."""
        return tuple(
            MemberView(
                device=device,
                record=peer.record,
                state=peer.state,
                reason="" if peer.state is State.ALIVE else peer.reason,
                last_heard_s=None if peer.heard_at_s is None else max(0.0, now - peer.heard_at_s),
            )
            for device, peer in sorted(self._peers.items())
        )

    def alive(self) -> tuple[DeviceId, ...]:
        """Other peers that count as there: alive or only suspected, sorted."""
        there = (State.ALIVE, State.SUSPECT)
        return tuple(sorted(d for d, peer in self._peers.items() if peer.state in there))

    def record_of(self, device: DeviceId) -> MemberRecord | None:
        """The newest record of a device that reached us, or None."""
        if device == self._own.device:
            return self._own
        peer = self._peers.get(device)
        return None if peer is None else peer.record

    def statistics(self) -> MembershipStatistics:
        """Counts since the start, and the present scale of the timeouts."""
        states = [peer.state for peer in self._peers.values()]
        return MembershipStatistics(
            alive_count=states.count(State.ALIVE),
            suspect_count=states.count(State.SUSPECT),
            dead_count=states.count(State.DEAD),
            probe_count=self._sequence,
            death_count=self._death_count,
            timeout_scale=self._scale(),
        )

    # Inputs.

    def update_own(self, **changes: Any) -> MemberRecord:  # Any: fields of MemberRecord
        """Change fields of the own record and tell everybody linked; no change, no message.

        Raises:
            LocalProtocolError: the record would be larger than others accept.
        """
        changed = replace(self._own, **changes)
        if changed == self._own:
            return self._own
        changed = replace(changed, version=self._own.version + 1)
        problem = problem_of(changed)
        if problem is not None:
            raise LocalProtocolError(problem)
        self._publish(changed)
        return changed

    def link_up(self, device: DeviceId, now: float) -> None:
        """A control link to `device` is authenticated: exchange records and probe at once."""
        if device == self._own.device:
            raise LocalProtocolError("a peer has no link to itself")
        peer = self._peers.setdefault(device, _Peer())
        peer.linked = True
        peer.silent_since_s = now
        peer.probes = {}
        self._start_timers(now)
        self._push_all(device, reply_wanted=False)
        self._probe(device, peer, now)

    def link_down(self, device: DeviceId, refused: bool, now: float) -> None:
        """The control link is gone; `refused`: closed by the other side and a re-dial refused.

        The shell calls it once with False when the link breaks, and again with True when the
        machine at the other end refuses a new connection.
        """
        peer = self._peers.get(device)
        if peer is None:
            return
        peer.linked = False
        peer.probes = {}
        if refused:
            self._observe(device, Sign.REFUSED, "it closed its link and refuses a new one")
        else:
            self._observe(device, Sign.LINK_LOST, "its link broke")

    def heard(self, device: DeviceId, now: float) -> None:
        """Any sign of life over a link, such as a data frame, counts as an answer."""
        peer = self._peers.get(device)
        if peer is None or not peer.linked:
            return
        peer.heard_at_s = peer.silent_since_s = now
        if peer.record is not None:
            self._observe(device, Sign.HEARD, "")

    def lag(self, seconds: float, now: float) -> None:
        """The driver woke `seconds` late: silence in that time says nothing about others.

        Their clocks are moved forward by it, and for a while all timeouts are scaled up
        (Lifeguard's local health): a busy peer suspects nobody because it was slow itself.
        """
        if seconds < limits.LAG_NOTICED_S:
            return
        worst_s = (limits.LAG_SCALE_MAX - 1.0) * limits.PROBE_TIMEOUT_S
        self._lag_s = min(worst_s, max(seconds, self._remaining_lag(now)))
        self._lag_at_s = now
        for peer in self._peers.values():
            peer.silent_since_s = min(now, peer.silent_since_s + seconds)

    def receive(self, message: object, sender: DeviceId, now: float) -> None:
        """Take a Ping, Ack or Records from a linked peer; others' late messages are dropped.

        Raises:
            RemoteProtocolError: a malformed record; the caller drops the link.
            LocalProtocolError: not a membership message; the caller's dispatch is wrong.
        """
        peer = self._peers.get(sender)
        if peer is None or not peer.linked:
            return
        match message:
            case Ping():
                self._answer(message, sender)
            case Ack():
                self._take_ack(message, peer, sender, now)
            case Records():
                for record in message.records:
                    self._merge(record)
                if message.reply_wanted:
                    self._push_all(sender, reply_wanted=False)
            case _:
                raise LocalProtocolError(f"{type(message).__name__} is no membership message")
        self.heard(sender, now)

    def tick(self, now: float) -> None:
        """Probe, push and judge silence, as far as due."""
        if self._probe_at_s is not None and now >= self._probe_at_s:
            self._probe_round(now)
        if self._push_at_s is not None and now >= self._push_at_s:
            self._push_round(now)
        if self._remaining_lag(now) < limits.LAG_NOTICED_S:
            self._lag_s = 0.0
        for device, peer in self._peers.items():
            self._judge(device, peer, now)

    # Outputs.

    def deadline(self) -> float | None:
        """The next probe round, push or judgement."""
        times = [t for t in (self._probe_at_s, self._push_at_s) if t is not None]
        times.extend(
            due for peer in self._peers.values() if (due := self._judge_at(peer)) is not None
        )
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
        drained, self._events = self._events, []
        return drained

    # Probing.

    def _start_timers(self, now: float) -> None:
        if self._probe_at_s is None:
            self._probe_at_s = now + limits.PROBE_INTERVAL_S
            self._push_at_s = now + limits.PUSH_PULL_INTERVAL_S * self._rng.uniform(0.5, 1.0)

    def _probe_round(self, now: float) -> None:
        # Jitter keeps the peers of a group from probing in step.
        self._probe_at_s = now + limits.PROBE_INTERVAL_S * self._rng.uniform(0.9, 1.1)
        self._round += 1
        every = round(limits.DEAD_PROBE_INTERVAL_S / limits.PROBE_INTERVAL_S)
        for device, peer in self._peers.items():
            # A dead peer whose link still stands may only be stopped: ask now and then.
            if peer.linked and (peer.state is not State.DEAD or self._round % every == 0):
                self._probe(device, peer, now)

    def _probe(self, device: DeviceId, peer: _Peer, now: float) -> None:
        self._sequence += 1
        probes = peer.probes if peer.probes is not None else {}
        while len(probes) >= limits.SUSPECT_TIMEOUT_S:
            del probes[min(probes)]
        probes[self._sequence] = now
        peer.probes = probes
        held = peer.record
        self._send(
            device,
            Ping(sequence=self._sequence)
            if held is None
            else Ping(sequence=self._sequence, incarnation=held.incarnation, version=held.version),
        )

    def _answer(self, ping: Ping, sender: DeviceId) -> None:
        own = self._own
        known = (ping.incarnation, ping.version) == (own.incarnation, own.version)
        self._send(sender, Ack(sequence=ping.sequence, record=None if known else own))

    def _take_ack(self, ack: Ack, peer: _Peer, sender: DeviceId, now: float) -> None:
        if ack.record is not None:
            if ack.record.device != sender:
                raise RemoteProtocolError("an ack carries the record of another device")
            self._merge(ack.record)
        sent_at_s = (peer.probes or {}).pop(ack.sequence, None)
        if sent_at_s is not None:
            sample = now - sent_at_s
            peer.round_trip_s += (sample - peer.round_trip_s) * (
                0.125 if peer.round_trip_s else 1.0
            )

    # Judging silence.

    def _remaining_lag(self, now: float) -> float:
        age_s = max(0.0, now - self._lag_at_s)
        return self._lag_s * float(0.5 ** (age_s / limits.LAG_HALF_LIFE_S))

    def _scale(self) -> float:
        """Multiplies the timeouts; taken at the last lag, so that a deadline stays put."""
        return 1.0 + self._lag_s / limits.PROBE_TIMEOUT_S

    def _silent_after_s(self, peer: _Peer) -> float:
        timeout_s = max(limits.PROBE_TIMEOUT_S, 4.0 * peer.round_trip_s)
        whole_s = limits.SUSPECT_TIMEOUT_S
        return min(limits.PROBE_INTERVAL_S + timeout_s, whole_s) * self._scale()

    def _judge_at(self, peer: _Peer) -> float | None:
        if peer.state is State.ALIVE:
            return peer.silent_since_s + self._silent_after_s(peer)
        if peer.state is State.SUSPECT:
            return peer.silent_since_s + limits.SUSPECT_TIMEOUT_S * self._scale()
        return None

    def _judge(self, device: DeviceId, peer: _Peer, now: float) -> None:
        due_s = self._judge_at(peer)
        while due_s is not None and now >= due_s:
            silence_s = now - peer.silent_since_s
            sign = Sign.SILENT if peer.state is State.ALIVE else Sign.EXPIRED
            self._observe(device, sign, f"silent for {silence_s:.1f} s")
            due_s = self._judge_at(peer)

    def _observe(self, device: DeviceId, sign: Sign, reason: str) -> None:
        peer = self._peers[device]
        before, after = peer.state, TRANSITIONS[peer.state, sign]
        peer.state = after
        if after is before:
            return
        peer.reason = reason
        if after is State.DEAD:
            self._death_count += 1
            self._events.append(MemberDown(device=device, reason=reason))
        elif after is State.SUSPECT:
            self._events.append(MemberSuspected(device=device, reason=reason))
        elif before is State.SUSPECT:
            self._events.append(SuspicionCleared(device=device))
        elif peer.record is not None:
            self._events.append(MemberUp(record=peer.record))

    # Records.

    def _publish(self, own: MemberRecord) -> None:
        self._own = own
        for device, peer in self._peers.items():
            if peer.linked:
                self._send(device, Records(records=(own,)))

    def _push_round(self, now: float) -> None:
        self._push_at_s = now + limits.PUSH_PULL_INTERVAL_S * self._rng.uniform(0.9, 1.1)
        linked = sorted(d for d, p in self._peers.items() if p.linked and p.state is State.ALIVE)
        if linked:
            self._push_all(self._rng.choice(linked), reply_wanted=True)

    def _push_all(self, to: DeviceId, *, reply_wanted: bool) -> None:
        # The addressee's own record goes too: restarted with a slow clock, it must outrun it.
        held = [peer.record for _, peer in sorted(self._peers.items()) if peer.record]
        records = (self._own, *held)
        size = limits.RECORDS_PER_MESSAGE_MAX
        for start in range(0, len(records), size):
            last = start + size >= len(records)
            self._send(
                to,
                Records(records=records[start : start + size], reply_wanted=reply_wanted and last),
            )

    def _merge(self, record: MemberRecord) -> None:
        """Keep a record that another peer sent if it is newer than the one held."""
        if record.device == self._own.device:
            self._defend_own(record)
            return
        peer = self._peers.get(record.device)
        held = None if peer is None else peer.record
        if not is_newer(record, held):
            return
        problem = problem_of(record)
        if problem is not None:
            raise RemoteProtocolError(problem)
        if peer is None:
            if len(self._peers) >= limits.MEMBERS_KNOWN_MAX:
                return
            peer = self._peers.setdefault(record.device, _Peer())
        peer.record = record
        self._tell_change(record, held, peer)

    def _tell_change(self, record: MemberRecord, held: MemberRecord | None, peer: _Peer) -> None:
        if held is not None and record.incarnation > held.incarnation:
            self._observe(record.device, Sign.RESTARTED, "it restarted")
        if peer.state in (State.ALIVE, State.SUSPECT):
            self._events.append(RecordChanged(record=record))
        if not peer.linked and (held is None or held.addresses != record.addresses):
            self._events.append(AddressLearned(device=record.device, addresses=record.addresses))

    def _defend_own(self, rumour: MemberRecord) -> None:
        """A newer record of ours is from an earlier life with a faster clock: outrun it."""
        if not is_newer(rumour, self._own):
            return
        problem = problem_of(rumour)
        if problem is not None or rumour.incarnation >= limits.INCARNATION_MAX:
            raise RemoteProtocolError(problem or "nobody may use up the incarnations")
        self._publish(replace(self._own, incarnation=rumour.incarnation + 1, version=0))

    def _send(self, to: DeviceId, message: object) -> None:
        self._outgoing.append(Outgoing(to=to, message=message))
