"""Notice who has gone: questions, asked directly or through others, and what silence means.

A peer that answers neither us nor those we ask is suspected, and the suspicion is told to others;
when nothing contradicts it for the suspicion time, the peer is dead. Source: SWIM and Lifeguard.
"""

from __future__ import annotations

from collections.abc import Callable

from p2ptrain import limits
from p2ptrain.ids import DeviceId
from p2ptrain.membership.accusation import DEAD, SILENT, SUSPECT, Accusation
from p2ptrain.membership.mesh import Mesh
from p2ptrain.membership.messages import Ack, AskFor, News, Ping, Vouch
from p2ptrain.membership.probing import Question, choose_relays
from p2ptrain.membership.record import MemberRecord
from p2ptrain.membership.standings import LIVE, KnownPeer
from p2ptrain.membership.states import Sign, State

_Step = tuple[float, Callable[[DeviceId, KnownPeer, float], None]]
"""When something is due for a peer, and what."""


class Detector(Mesh):
    """The part of the membership machine that judges silence."""

    _round = 0

    # Asking.

    def _round_targets(self) -> list[DeviceId]:
        """Everybody within reach in a small group; else the next one, and who is suspected.

        A dead peer whose link still stands may only be stopped: it is asked now and then.
        """
        every = round(limits.DEAD_PROBE_INTERVAL_S / limits.PROBE_INTERVAL_S)
        targets = {
            device
            for device, peer in self._linked.items()
            if peer.state in (State.SUSPECT, State.HEARD_OF)
            or (peer.state not in LIVE and self._round % every == 0)
        }
        within_reach = self._within_reach()
        if len(within_reach) > limits.PROBE_ALL_MAX:
            targets.add(self._order.next(within_reach))
        else:
            targets |= within_reach
        return sorted(targets)

    def _within_reach(self) -> set[DeviceId]:
        """Live peers that we have a link with, or that a linked one says it has a link with.

        Whoever is farther away is judged by those nearer to it.
        """
        near = {device for device, peer in self._linked.items() if peer.state in LIVE}
        if self._is_partial():
            for peer in self._linked.values():
                if peer.state in LIVE:
                    near |= peer.links
        return {d for d in near if d in self._peers and self._peers[d].state in LIVE}

    def _ask(self, device: DeviceId, peer: KnownPeer, now: float) -> None:
        """Ask a peer whether it is there: over its link, else through one that has a link."""
        live = peer.state in LIVE
        if live and peer.asked_at_s is None:
            peer.asked_at_s, peer.asked_others = now, False
            self._standings.watched.add(device)
        if peer.linked:
            rank = (-1, -1) if peer.record is None else peer.record.rank
            sequence = self._questions.add(Question(to=device, target=device, sent_at_s=now))
            self._send(device, Ping(sequence=sequence, incarnation=rank[0], version=rank[1]))
        if live and (peer.asked_others or not peer.linked):
            self._ask_through(device, limits.INDIRECT_PROBES if peer.asked_others else 1, now)

    def _ask_through(self, target: DeviceId, count: int, now: float) -> None:
        for relay in choose_relays(target, self._relays(target), count=count, rng=self._rng):
            question = Question(to=relay, target=target, sent_at_s=now)
            sequence = self._questions.add(question)
            self._send(relay, AskFor(sequence=sequence, target=target))

    def _relays(self, but: DeviceId) -> dict[DeviceId, frozenset[DeviceId]]:
        return {
            device: peer.links
            for device, peer in sorted(self._linked.items())
            if peer.state is State.ALIVE and device != but
        }

    def _relay(self, asked: AskFor, asker: DeviceId, now: float) -> None:
        """Ask the target for somebody else; without a link with it the question is lost."""
        target = asked.target
        if target == self._own.device:
            self._send(asker, Vouch(sequence=asked.sequence, target=target))
        elif target in self._linked:
            question = Question(
                to=target,
                target=target,
                sent_at_s=now,
                asker=asker,
                asker_sequence=asked.sequence,
            )
            self._send(target, Ping(sequence=self._questions.add(question)))

    def _take_ack(self, ack: Ack, peer: KnownPeer, sender: DeviceId, now: float) -> None:
        question = self._questions.answered(ack.sequence, by=sender, target=sender)
        if question is None:
            return
        if question.asker is not None:
            self._send(question.asker, Vouch(sequence=question.asker_sequence, target=sender))
            return
        sample = now - question.sent_at_s
        known = peer.round_trip_s
        peer.round_trip_s = sample if known is None else known + 0.125 * (sample - known)

    def _take_vouch(self, vouch: Vouch, sender: DeviceId, now: float) -> None:
        question = self._questions.answered(vouch.sequence, by=sender, target=vouch.target)
        if question is None:
            return
        peer = self._peers.get(vouch.target)
        # Who was found dead since is not asked for any more: its own word must come first.
        if peer is not None and peer.state in LIVE:
            peer.answered()
            self._standings.observe(vouch.target, Sign.VOUCHED, now)
            if peer.counted and not peer.linked:
                self._standings.watched.add(vouch.target)

    # Judging.

    def _next_step(self, peer: KnownPeer) -> _Step | None:
        """What comes due for a peer first; None: nothing, until something is heard or asked."""
        steps: list[_Step] = []
        if peer.state not in LIVE:
            return None
        suspicion = peer.suspicion
        if peer.asked_at_s is not None:
            if not peer.asked_others:
                steps.append((peer.asked_at_s + self._direct_time_s(peer), self._ask_others))
            if suspicion is None or self._own.device not in suspicion.accusers:
                steps.append((peer.asked_at_s + self._answer_time_s(peer), self._accuse))
        if suspicion is not None:
            confirmers = self._standings.count(State.ALIVE)
            due_s = suspicion.due_s(
                members=self._standings.live_count + 1, confirmers=confirmers, scale=self._scale()
            )
            steps.append((due_s, self._bury))
        elif peer.counted and not peer.linked:
            steps.append((peer.unlinked_at_s + limits.CUT_OFF_AFTER_S, self._cut_off))
        return min(steps, key=lambda step: step[0], default=None)

    def _judge_all(self, now: float) -> None:
        """Do what is due for every watched peer, until nothing is."""
        changed = True
        while changed:
            changed = False
            for device in sorted(self._standings.watched):
                peer = self._peers[device]
                step = self._next_step(peer)
                if step is None:
                    self._standings.watched.discard(device)
                elif now >= step[0]:
                    step[1](device, peer, now)
                    changed = True

    def _ask_others(self, device: DeviceId, peer: KnownPeer, now: float) -> None:
        peer.asked_others = True
        self._ask_through(device, limits.INDIRECT_PROBES, now)

    def _accuse(self, device: DeviceId, peer: KnownPeer, now: float) -> None:
        """It answered neither us nor those we asked: suspect it, or confirm the suspicion."""
        self._standings.observe(device, Sign.SILENT, now, reason=_silence(peer, now))
        if peer.suspicion is not None and peer.record is not None:
            peer.suspicion.accusers.update(peer.accusers, (self._own.device,))
            self._spread(self._accusation(peer.record, SUSPECT, SILENT))

    def _bury(self, device: DeviceId, peer: KnownPeer, now: float) -> None:
        self._condemn(device, peer, Sign.EXPIRED, SILENT, now)

    def _cut_off(self, device: DeviceId, peer: KnownPeer, now: float) -> None:
        self._standings.cut_off(device)

    def _condemn(
        self, device: DeviceId, peer: KnownPeer, sign: Sign, kind: str, now: float
    ) -> None:
        """We found a peer dead ourselves: remember in which standing, and tell the others."""
        if sign is Sign.REFUSED:
            reason = "it closed its link and refuses a new one"
        else:
            reason = _silence(peer, now)
        was_live = peer.state in LIVE
        self._standings.observe(device, sign, now, reason=reason, kind=kind)
        if was_live and peer.record is not None:
            peer.verdict = self._accusation(peer.record, DEAD, kind)
            self._spread(peer.verdict)

    def _accusation(self, record: MemberRecord, verdict: str, kind: str) -> Accusation:
        return Accusation(
            device=record.device,
            incarnation=record.incarnation,
            refutations=record.refutations,
            verdict=verdict,
            kind=kind,
            accuser=self._own.device,
        )

    def _spread(self, accusation: Accusation) -> None:
        """Tell the accused first, then others at once, who pass it on."""
        self._rumours.add_accusation(accusation)
        news = News(accusations=(accusation,))
        if accusation.device in self._linked:
            self._send(accusation.device, news)
        others = sorted(device for device in self._linked if device != accusation.device)
        for device in self._rng.sample(others, min(limits.PROBE_ALL_MAX, len(others))):
            self._send(device, news)


def _silence(peer: KnownPeer, now: float) -> str:
    if peer.linked:
        return f"silent for {now - peer.silent_since_s:.1f} s"
    return "it answers nobody we asked"
