"""Spread what is known by gossip and comparison: records, accusations, their contradictions.

Whoever learns something passes it on a few times (`gossip.Rumours`); besides, two peers compare
all they hold when their link comes up and now and then. Accusations never overrule what is heard
over a link: then they are taken to the accused, who contradicts them in its own record.
"""

from __future__ import annotations

from dataclasses import replace

from p2ptrain import limits
from p2ptrain.errors import RemoteProtocolError
from p2ptrain.ids import DeviceId
from p2ptrain.membership.accusation import DEAD, SILENT, Accusation
from p2ptrain.membership.detector import Detector
from p2ptrain.membership.events import AddressLearned, MemberWasAway, RecordChanged
from p2ptrain.membership.merge import content_of, is_newer, problem_of
from p2ptrain.membership.messages import Ack, Held, Holdings, Linked, News, Ping
from p2ptrain.membership.record import MemberRecord
from p2ptrain.membership.standings import LIVE, KnownPeer
from p2ptrain.membership.states import Sign, State


class Exchange(Detector):
    """The part of the membership machine that tells and listens."""

    _gossip_at_s: float | None = None
    _push_at_s: float | None = None
    _hint_at_s = 0.0
    _hints_left = limits.LINK_PEERS_WANTED

    # The own record.

    def _publish(self, own: MemberRecord) -> None:
        self._own = own
        for device in self._linked:
            self._send(device, News(records=(own,)))

    def _outrun(self, rank: tuple[int, int]) -> None:
        """A newer record of ours is from an earlier life with a faster clock: outrun it."""
        if rank <= self._own.rank:
            return
        if rank[0] >= limits.INCARNATION_MAX:
            raise RemoteProtocolError("nobody may use up the incarnations")
        self._publish(replace(self._own, incarnation=rank[0] + 1, version=0, refutations=0))

    def _contradict(self, accusation: Accusation, sender: DeviceId) -> None:
        """Somebody holds us silent or dead: say in our own record that we are not."""
        own = self._own
        if accusation.standing < own.standing:
            self._send(sender, News(records=(own,)))
        elif accusation.incarnation > own.incarnation:
            self._outrun((accusation.incarnation, 0))
        else:
            refutations = accusation.refutations + 1
            self._publish(replace(own, version=own.version + 1, refutations=refutations))

    def _answer(self, ping: Ping, sender: DeviceId) -> None:
        self._outrun((ping.incarnation, ping.version))
        known = (ping.incarnation, ping.version) == self._own.rank
        self._send(sender, Ack(sequence=ping.sequence, record=None if known else self._own))

    # Records of others.

    def _merge(self, record: MemberRecord, now: float, *, accused: bool = False) -> None:
        """Keep a record that another peer sent if it is newer than the one held.

        Args:
            accused: An accusation came with it; without one the sender holds its author alive.
        """
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
        peer = self._standings.know(record.device, now)
        if peer is None:
            return
        peer.record, peer.content, peer.held = record, content_of(record), None
        self._judge_word(record, held, peer, now, accused)
        self._tell_shell(record, held, peer)
        self._pass_on(record, held)

    def _defend_own(self, rumour: MemberRecord) -> None:
        if is_newer(rumour, self._own):
            problem = problem_of(rumour)
            if problem is not None:
                raise RemoteProtocolError(problem)
            self._outrun((rumour.incarnation, rumour.version + 1))

    def _judge_word(
        self, record: MemberRecord, held: MemberRecord | None, peer: KnownPeer, now: float,
        accused: bool,
    ) -> None:  # fmt: skip
        """What a new record means for its author's standing."""
        if held is None:
            self._order.add(record.device)
        elif record.incarnation > held.incarnation:
            self._standings.restarted(record.device, now)
        first_word = peer.state is State.HEARD_OF and not peer.linked and not accused
        if first_word or self._outranks(record, peer):
            self._standings.observe(record.device, Sign.TOLD, now)

    def _outranks(self, record: MemberRecord, peer: KnownPeer) -> bool:
        """Whether a peer's own word is newer than what is held against it."""
        if peer.state is State.SUSPECT:
            return peer.suspicion is not None and record.standing > peer.suspicion.standing
        if peer.state in (State.DEAD, State.LEFT) and not record.leaving:
            return peer.verdict is None or record.standing > peer.verdict.standing
        return False

    def _tell_shell(self, record: MemberRecord, held: MemberRecord | None, peer: KnownPeer) -> None:
        same_life = held is not None and held.incarnation == record.incarnation
        if held is not None and same_life and record.away_count > held.away_count:
            peer.last_down = f"suspended for {record.away_s:.0f} s"
            away = MemberWasAway(device=record.device, away_s=record.away_s)
            self._standings.tell(away)
        if peer.counted:
            self._standings.tell(RecordChanged(record=record))
        moved = held is None or held.addresses != record.addresses
        if moved and not peer.linked and peer.state in LIVE:
            self._hint(record)

    def _pass_on(self, record: MemberRecord, held: MemberRecord | None) -> None:
        """Where everybody has a link with everybody, only what clears its author is urgent."""
        urgent = held is None or record.standing != held.standing
        if self._is_partial() or urgent or record.leaving:
            self._rumours.add_record(record)

    def _hint(self, record: MemberRecord) -> None:
        """Ask the shell to dial a peer, while we want more links."""
        if (
            record.addresses
            and self._hints_left > 0
            and len(self._linked) < limits.LINK_PEERS_WANTED
        ):
            self._hints_left -= 1
            learned = AddressLearned(device=record.device, addresses=record.addresses)
            self._standings.tell(learned)

    def _hint_addresses(self, now: float) -> None:
        """Now and then name a few live peers to dial, so that the mesh stays close."""
        if now < self._hint_at_s:
            return
        self._hint_at_s = now + limits.ADDRESS_HINT_INTERVAL_S
        self._hints_left = max(0, limits.LINK_PEERS_WANTED - len(self._linked))
        if not self._hints_left or not self._is_partial():
            return
        far = [peer.record for _, peer in self._standings.live() if not peer.linked]
        for record in self._rng.sample(far, min(limits.ADDRESS_HINTS_MAX, len(far))):
            if record is not None:
                self._hint(record)

    # Accusations.

    def _take_news(self, news: News, sender: DeviceId, now: float) -> None:
        accused = {accusation.device for accusation in news.accusations}
        for record in news.records:
            self._merge(record, now, accused=record.device in accused)
        for accusation in news.accusations:
            self._take_accusation(accusation, sender, now)

    def _take_accusation(self, accusation: Accusation, sender: DeviceId, now: float) -> None:
        """Weigh what is said against a member, by standing and by what we hear ourselves."""
        if accusation.device == self._own.device:
            self._contradict(accusation, sender)
            return
        peer = self._peers.get(accusation.device)
        if peer is None or peer.record is None:
            return
        heard = peer.linked and peer.state is State.ALIVE
        if accusation.standing < peer.record.standing:
            self._send(sender, News(records=(peer.record,)))  # it is refuted
        elif peer.state in (State.DEAD, State.LEFT):
            self._keep_verdict(accusation, peer)
        elif accusation.verdict == DEAD and not heard:
            self._believe_dead(accusation, peer, now)
        elif heard and self._is_fresh(peer, now):
            peer.accusers.add(accusation.accuser)  # counts if we hear nothing from now on
            self._tell_accused(accusation, peer, now)
        elif peer.state in LIVE:
            self._believe_silent(accusation, peer, now)

    def _keep_verdict(self, accusation: Accusation, peer: KnownPeer) -> None:
        held = peer.verdict
        if accusation.verdict == DEAD and (held is None or accusation.standing > held.standing):
            peer.verdict, peer.held = accusation, None

    def _believe_dead(self, accusation: Accusation, peer: KnownPeer, now: float) -> None:
        self._standings.observe(
            accusation.device,
            Sign.CONDEMNED,
            now,
            reason=f"{self._name(accusation.accuser)} found it dead",
            kind=accusation.kind,
        )
        peer.verdict = accusation
        self._rumours.add_accusation(accusation)

    def _believe_silent(self, accusation: Accusation, peer: KnownPeer, now: float) -> None:
        """Suspect it too; a linked one is asked at once, so that we can confirm or deny."""
        if peer.state is State.ALIVE:
            reason = f"no answer to {self._name(accusation.accuser)}"
            self._standings.observe(accusation.device, Sign.ACCUSED, now, reason=reason)
            if peer.linked:
                self._tell_accused(accusation, peer, now)
                self._ask(accusation.device, peer, now)
        suspicion = peer.suspicion
        if suspicion is None or accusation.verdict == DEAD:
            return
        suspicion.standing = max(suspicion.standing, accusation.standing)
        wanted = len(suspicion.accusers) <= limits.CONFIRMATIONS_WANTED
        if wanted and accusation.accuser not in suspicion.accusers:
            suspicion.accusers.add(accusation.accuser)
            self._rumours.add_accusation(accusation)

    def _is_fresh(self, peer: KnownPeer, now: float) -> bool:
        """Whether we have just heard it ourselves: then nobody needs to tell us."""
        recent_s = limits.PROBE_INTERVAL_S * self._scale() + self._answer_time_s(peer)
        return now - peer.silent_since_s <= recent_s

    def _tell_accused(self, accusation: Accusation, peer: KnownPeer, now: float) -> None:
        told_at_s = peer.told_at_s
        if told_at_s is None or now - told_at_s >= limits.ACCUSED_TOLD_EVERY_S:
            peer.told_at_s = now
            self._send(accusation.device, News(accusations=(accusation,)))

    def _name(self, device: DeviceId) -> str:
        peer = self._peers.get(device)
        return device[:8] if peer is None or peer.record is None else peer.record.name

    # Rounds.

    def _gossip_round(self, now: float) -> None:
        listeners = sorted(d for d, peer in self._linked.items() if peer.state in LIVE)
        self._gossip_at_s = None
        if not listeners or not self._rumours:
            return
        chosen = self._rng.sample(listeners, min(limits.GOSSIP_FANOUT, len(listeners)))
        members = self._standings.live_count + 1
        news = self._rumours.take(listeners=len(chosen), members=members)
        for device in chosen:
            self._send(device, news)
        self._start_gossip(now)

    def _start_gossip(self, now: float) -> None:
        if self._rumours and self._gossip_at_s is None and self._linked:
            self._gossip_at_s = now + limits.GOSSIP_INTERVAL_S

    def _push_round(self, now: float) -> None:
        self._push_at_s = now + limits.PUSH_PULL_INTERVAL_S * self._rng.uniform(0.9, 1.1)
        alive = sorted(d for d, peer in self._linked.items() if peer.state is State.ALIVE)
        if alive:
            holdings = Holdings(held=self._holdings(), reply_wanted=True)
            self._send(self._rng.choice(alive), holdings)

    def _tell_links(self) -> None:
        """Say whom we can ask for others, to everybody while some live member has no link with
        us, and to those who asked by telling theirs; again when it changed."""
        linked = frozenset(self._linked)
        partial = self._is_partial()
        message: Linked | None = None
        for device, peer in self._linked.items():
            if (partial or peer.links) and peer.links_told != linked:
                peer.links_told = linked
                message = message or Linked(devices=tuple(sorted(linked))[: limits.LINK_PEERS_MAX])
                self._send(device, message)

    # Holdings.

    def _holdings(self) -> tuple[Held, ...]:
        """Our own line goes too; so does the addressee's: restarted, it must outrun it."""
        lines = [_line(self._own, content_of(self._own), None)]
        for _, peer in sorted(self._peers.items()):
            if peer.held is None and peer.record is not None:
                peer.held = _line(peer.record, peer.content, peer.verdict)
            if peer.held is not None:
                lines.append(peer.held)
        return tuple(lines)

    def _take_holdings(self, holdings: Holdings, sender: DeviceId, now: float) -> None:
        """Send what is newer here, and ask for what is newer there when that is wanted."""
        lacking = False
        newer: dict[DeviceId, MemberRecord] = {}
        verdicts: list[Accusation] = []
        for line in holdings.held:
            if line.device == self._own.device:
                self._compare_own(line, sender, newer)
                continue
            peer = self._peers.get(line.device)
            if peer is None or peer.record is None:
                lacking = True
                continue
            theirs, ours = (line.incarnation, line.version), peer.record.rank
            differs = theirs == ours and line.content != peer.content
            lacking = lacking or theirs > ours or differs
            if theirs < ours or differs:
                newer[line.device] = peer.record
            if line.dead is not None:
                self._take_accusation(_accusation_in(line, line.dead, sender), sender, now)
            elif peer.verdict is not None:
                verdicts.append(peer.verdict)
        self._add_unnamed(holdings, newer)
        self._send_news(sender, newer, verdicts)
        if lacking and holdings.reply_wanted:
            self._send(sender, Holdings(held=self._holdings()))

    def _add_unnamed(self, holdings: Holdings, newer: dict[DeviceId, MemberRecord]) -> None:
        """What the sender of holdings has never heard of."""
        named = {line.device for line in holdings.held}
        if self._own.device not in named:
            newer[self._own.device] = self._own
        for device, peer in self._peers.items():
            if device not in named and peer.record is not None:
                newer[device] = peer.record

    def _compare_own(
        self, line: Held, sender: DeviceId, newer: dict[DeviceId, MemberRecord]
    ) -> None:
        rank = (line.incarnation, line.version)
        if rank == self._own.rank and line.content != content_of(self._own):
            rank = (line.incarnation, line.version + 1)  # another life that began in this second
        self._outrun(rank)
        if rank < self._own.rank:
            newer[self._own.device] = self._own
        if line.dead is not None:
            self._contradict(_accusation_in(line, line.dead, sender), sender)

    def _send_news(
        self, to: DeviceId, newer: dict[DeviceId, MemberRecord], verdicts: list[Accusation]
    ) -> None:
        """Records in bounded messages, each dead one beside the reason; then further deaths."""
        records = [record for _, record in sorted(newer.items())]
        size = limits.RECORDS_PER_MESSAGE_MAX
        for start in range(0, len(records), size):
            part = records[start : start + size]
            known = [self._peers[r.device] for r in part if r.device in self._peers]
            dead = tuple(peer.verdict for peer in known if peer.verdict is not None)
            self._send(to, News(records=tuple(part), accusations=dead))
        rest = [verdict for verdict in verdicts if verdict.device not in newer]
        size = limits.ACCUSATIONS_PER_MESSAGE_MAX
        for start in range(0, len(rest), size):
            self._send(to, News(accusations=tuple(rest[start : start + size])))


def _line(record: MemberRecord, content: int, dead: Accusation | None) -> Held:
    return Held(
        device=record.device,
        incarnation=record.incarnation,
        version=record.version,
        content=content,
        dead=None if dead is None else dead.refutations,
    )


def _accusation_in(line: Held, refutations: int, accuser: DeviceId) -> Accusation:
    return Accusation(
        device=line.device,
        incarnation=line.incarnation,
        refutations=refutations,
        verdict=DEAD,
        kind=SILENT,
        accuser=accuser,
    )
