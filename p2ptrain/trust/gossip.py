"""The machine that spreads revocations, root rotations and members' certificates.

Each set only grows, or keeps the newest of each device, so whatever the order in which things
arrive all peers end up with the same. A statement goes to every linked peer as soon as it is
durable here; besides, peers compare hashes when a link comes up and every 10 s with one of them.
PROTOCOL.md section 7.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

from p2ptrain import limits
from p2ptrain.errors import LocalProtocolError, RemoteProtocolError, TrustError
from p2ptrain.ids import DeviceId, GroupId
from p2ptrain.trust.chains import MemberChain, UnknownRoot, read_chain
from p2ptrain.trust.gossip_messages import ChainShown, Known, Summary
from p2ptrain.trust.revocation import Revocation, RevokedKeys, check_revocation
from p2ptrain.trust.roster import Roster
from p2ptrain.trust.rotation import Roots, Rotation
from p2ptrain.wire.machine import Outgoing


@dataclass(frozen=True, slots=True, kw_only=True)
class RevocationLearned:
    """A statement is durable here and takes effect now."""

    statement: Revocation


@dataclass(frozen=True, slots=True, kw_only=True)
class RootRotated:
    """A new root is durable here and is trusted from now on."""

    rotation: Rotation


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainLearned:
    """A member shows certificates that are newer than those known."""

    chain: MemberChain


TrustEvent = RevocationLearned | RootRotated | ChainLearned
Statement = Revocation | Rotation


class TrustGossip:
    """What one peer knows about trust; see `p2ptrain.wire.machine` for the verbs."""

    def __init__(
        self,
        *,
        gid: GroupId,
        roots: Roots,
        revoked: RevokedKeys,
        roster: Roster,
        rng: random.Random,
    ) -> None:
        self._gid = gid
        self._rng = rng
        self.roots = roots
        self.revoked = revoked
        self.roster = roster
        self._linked: set[DeviceId] = set()
        self._sync_at_s: float | None = None
        self._writes: list[Statement] = []
        self._outgoing: list[Outgoing] = []
        self._events: list[TrustEvent] = []

    # Inputs.

    def link_up(self, device: DeviceId, now: float) -> None:
        """A control link is authenticated: compare what both sides know."""
        self._linked.add(device)
        if self._sync_at_s is None:
            self._sync_at_s = now + limits.TRUST_SYNC_INTERVAL_S * self._rng.uniform(0.5, 1.0)
        self._send(device, self._summary())

    def link_down(self, device: DeviceId) -> None:
        """The link is gone."""
        self._linked.discard(device)

    def state_revocation(self, statement: Revocation) -> None:
        """Spread a statement that was made here; TrustError when it does not hold."""
        self._take_revocation(statement)

    def state_rotation(self, rotation: Rotation) -> None:
        """Spread a rotation that was made here; TrustError when it does not hold."""
        self._take_rotation(rotation)

    def show(self, chain: MemberChain) -> None:
        """Spread our own certificates when they are new."""
        self._take_chain(chain)

    def receive(self, message: object, sender: DeviceId, now: float) -> None:
        """Take what a peer says; its link may not have been told of yet, or not any more.

        Raises:
            RemoteProtocolError: a statement that does not hold; the caller drops the link.
            LocalProtocolError: not a message of this machine; the caller's dispatch is wrong.
        """
        try:
            self._take(message, sender)
        except UnknownRoot:
            # It overtook a rotation that is on its way to us: compared, it comes again behind it.
            self._send(sender, self._summary())
        except TrustError as error:
            raise RemoteProtocolError(f"a peer spreads what does not hold: {error}") from error

    def tick(self, now: float) -> None:
        """Compare with one linked peer when that is due."""
        if self._sync_at_s is None or now < self._sync_at_s:
            return
        self._sync_at_s = now + limits.TRUST_SYNC_INTERVAL_S * self._rng.uniform(0.9, 1.1)
        if self._linked:
            self._send(self._rng.choice(sorted(self._linked)), self._summary())

    # Outputs.

    def deadline(self) -> float | None:
        """The next comparison."""
        return self._sync_at_s

    def writes(self) -> Sequence[object]:
        """Drain the statements to make durable."""
        drained, self._writes = self._writes, []
        return drained

    def outgoing(self) -> Sequence[Outgoing]:
        """Drain the messages to send."""
        drained, self._outgoing = self._outgoing, []
        return drained

    def events(self) -> Sequence[TrustEvent]:
        """Drain what takes effect now."""
        drained, self._events = self._events, []
        return drained

    # What is taken in.

    def _take(self, message: object, sender: DeviceId) -> None:
        match message:
            case Summary(digest=digest):
                if digest != self._summary().digest:
                    self._send(sender, self._known(reply_wanted=True))
            case Known():
                self._answer(message, sender)
            case Revocation():
                self._take_revocation(message, sender)
            case Rotation():
                self._take_rotation(message, sender)
            case ChainShown(certificates=certificates):
                chain = read_chain(certificates, gid=self._gid, roots=self.roots.ever)
                self._take_chain(chain, sender)
            case _:
                raise LocalProtocolError(f"{type(message).__name__} is no message about trust")

    def _take_revocation(self, statement: Revocation, sender: DeviceId | None = None) -> None:
        if statement.id in self.revoked:
            return
        if len(self.revoked) >= limits.REVOCATIONS_MAX:
            raise TrustError("this group has more revocations than p2ptrain can hold")
        check_revocation(statement, gid=self._gid, roots=self.roots.ever)
        self.revoked.add(statement)
        self._writes.append(statement)
        self._events.append(RevocationLearned(statement=statement))
        self._spread(statement, sender)

    def _take_rotation(self, rotation: Rotation, sender: DeviceId | None = None) -> None:
        if rotation.number > len(self.roots.rotations) + 1:
            return  # those before it come with the next comparison
        if self.roots.add(rotation):
            self._writes.append(rotation)
            self._events.append(RootRotated(rotation=rotation))
            self._spread(rotation, sender)

    def _take_chain(self, chain: MemberChain, sender: DeviceId | None = None) -> None:
        if self.roster.add(chain):
            self._events.append(ChainLearned(chain=chain))
            self._spread(ChainShown(certificates=chain.to_der()), sender)

    def _answer(self, known: Known, sender: DeviceId) -> None:
        """Send what the other side lacks, and say what we hold if it asks."""
        for rotation in self.roots.rotations[max(0, known.rotations) :]:
            self._send(sender, rotation)
        theirs = set(known.revocations)
        for statement in self.revoked.statements:
            if statement.id not in theirs:
                self._send(sender, statement)
        digests = self.roster.digests
        for chain in self.roster.chains:
            if known.chains.get(chain.device) != digests[chain.device]:
                self._send(sender, ChainShown(certificates=chain.to_der()))
        if known.reply_wanted:
            self._send(sender, self._known(reply_wanted=False))

    # What is said.

    def _summary(self) -> Summary:
        known = self._known(reply_wanted=False)
        parts = [known.rotations, sorted(known.revocations), sorted(known.chains.items())]
        return Summary(digest=hashlib.sha256(json.dumps(parts).encode()).hexdigest())

    def _known(self, *, reply_wanted: bool) -> Known:
        return Known(
            rotations=len(self.roots.rotations),
            revocations=tuple(statement.id for statement in self.revoked.statements),
            chains=self.roster.digests,
            reply_wanted=reply_wanted,
        )

    def _spread(self, message: object, sender: DeviceId | None) -> None:
        for device in sorted(self._linked - {sender}):
            self._send(device, message)

    def _send(self, device: DeviceId | None, message: object) -> None:
        if device is not None:
            self._outgoing.append(Outgoing(to=device, message=message))
