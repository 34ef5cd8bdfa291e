"""Trust in a running peer: who is kept out, and certificates that stay valid by themselves.

The deciding is in `trust`; this drives the gossip machine, lets revocations take effect once they
are on disk, and is the only task that replaces what links show.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, cast

import trio

from p2ptrain import limits
from p2ptrain.errors import RemoteProtocolError, TrustError
from p2ptrain.ids import DeviceId
from p2ptrain.net.renew import Wanted
from p2ptrain.net.tls_link import CLOCKS_DIFFER, concerns_root
from p2ptrain.runtime.credentials.credential_keeper import (
    CredentialKeeper,
    KeeperHooks,
    issuers_among,
)
from p2ptrain.runtime.credentials.revoking import RevokeRequest, sign_revocation
from p2ptrain.runtime.credentials.trust_reports import Known as KnownMembers
from p2ptrain.runtime.credentials.trust_reports import RevocationReport
from p2ptrain.runtime.driver import Driver
from p2ptrain.store.granting import live_issuer
from p2ptrain.store.groups import Group, find_issuer
from p2ptrain.store.trust_log import (
    append_statements,
    read_revoked,
    read_roots,
    read_roster,
    save_roster,
)
from p2ptrain.trust.chains import (
    MemberChain,
    check_in_date,
    key_fingerprint,
    member_chain,
    read_chain,
)
from p2ptrain.trust.credentials import Chain, Credentials, Objection
from p2ptrain.trust.gossip import (
    ChainLearned,
    RevocationLearned,
    RootRotated,
    Statement,
    TrustGossip,
)
from p2ptrain.trust.gossip_messages import (
    ChainShown,
    Known,
    RenewAnswered,
    RenewAsked,
    Summary,
)
from p2ptrain.trust.renewal import RenewalGranted, renew
from p2ptrain.trust.revocation import Revocation, RevokedKeys
from p2ptrain.trust.roster import Roster
from p2ptrain.trust.rotation import Rotation
from p2ptrain.wire.hello import REFUSE_CERTIFICATE, REFUSE_DATES, REFUSE_REVOKED

TRUST_MESSAGES: Final = (
    Summary,
    Known,
    ChainShown,
    Revocation,
    Rotation,
    RenewAsked,
    RenewAnswered,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustHooks:
    """What trust needs of the peer."""

    send: Callable[[DeviceId, object], None]
    """Queue a message for a linked peer; may drop it."""
    use: Callable[[Credentials], None]
    """Show these from the next handshake on."""
    dial: Callable[[Sequence[str]], None]
    """Dial these now, and all that were refused a moment ago."""
    refusals: Callable[[], dict[str, str]]
    """Addresses whose last dial was refused, and why."""
    expel: Callable[[DeviceId, str], None]
    """Close the links with a peer and count it as gone, now."""
    violation: Callable[[DeviceId, RemoteProtocolError], None]


class TrustService:
    """Everything about trust that goes on while a peer runs; `run` owns its tasks."""

    def __init__(self, group: Group, hooks: TrustHooks, *, rng: random.Random) -> None:
        """Raises TrustError when a log on disk is damaged: a peer must not run without it."""
        self._hooks = hooks
        self._keeper = CredentialKeeper(group, self._keeper_hooks())
        self._ahead_s: dict[DeviceId, float] = {}
        self._requests = itertools.count(1)
        self._answers: dict[int, trio.MemorySendChannel[RenewAnswered]] = {}
        roots = read_roots(group.folder, group.root, group.id)
        self._effective = read_revoked(group.folder, roots, group.id)
        self._shown: dict[DeviceId, MemberChain] = {}
        self._roster_changed = trio.Event()
        self._took_effect = trio.Event()
        self._rotated = {rotation.id for rotation in roots.rotations}
        self._machine = Driver(
            TrustGossip(
                gid=group.id,
                roots=roots,
                revoked=RevokedKeys(self._effective.statements),
                roster=read_roster(group.folder, roots, group.id),
                rng=rng,
            ),
            send=hooks.send,
            on_event=self._event,
            on_violation=hooks.violation,
            persist=self._persist,
        )

    @property
    def group(self) -> Group:
        """The membership as it is now."""
        return self._keeper.group

    @property
    def away(self) -> bool:
        """Whether no member would let us in yet: certificates or clock are out of date."""
        return self._keeper.away

    @property
    def notices(self) -> tuple[str, ...]:
        """What a person should know about trust on this device, one sentence each."""
        statement = self.revoked_by
        if statement is None:
            return self._keeper.notices
        return (f"this device was revoked: {statement.reason}",)

    def now(self) -> float:
        """The time to put into certificates: the clock's, or one that an issuer vouched for."""
        return self._keeper.now()

    def look(self) -> None:
        """Something was refused: look soon whether our certificates or roots explain it."""
        self._keeper.poke()

    def hint(self, address: str) -> None:
        """A member may be at host:port: asked for the time or a renewal where that is needed."""
        self._keeper.hint(address)

    @property
    def revoked_by(self) -> Revocation | None:
        """The statement that puts this device itself out of the group, if there is one."""
        return self._effective.against([key_fingerprint(c) for c in self.group.chain])

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Spread and take in what is said about trust, and keep our certificates valid.

        Ends when it is cancelled.
        """
        async with trio.open_nursery() as nursery:
            await nursery.start(self._machine.run)
            self._machine.call(TrustGossip.show, self._own())
            if not self._keeper.away:
                await self._keeper.look()
            nursery.start_soon(self._keeper.run)
            nursery.start_soon(self._save_roster)
            task_status.started()

    # What links ask and tell.

    def objection(self, chain: Chain) -> Objection | None:
        """Why a chain that TLS verified is refused all the same; None: it is not."""
        try:
            read = self._read(chain[:-1])
        except TrustError as error:  # OpenSSL is content with less than we are
            return Objection(refusal=REFUSE_CERTIFICATE, reason=error.message)
        statement = self._effective.against(read.keys)
        if statement is not None:
            return Objection(refusal=REFUSE_REVOKED, reason=_explained(statement, read))
        if self._keeper.clock_is_vouched:
            # TLS did not look at dates, which our clock cannot judge.
            try:
                check_in_date(read.certificates, now=self.now())
            except TrustError as error:
                return Objection(refusal=REFUSE_DATES, reason=error.message)
        self._remember(read)
        return None

    def _remember(self, chain: MemberChain) -> None:
        """Keep what was shown while its links may live: whom to expel is decided by it."""
        if len(self._shown) >= limits.ROSTER_MAX and chain.device not in self._shown:
            idle = next((d for d in self._shown if d not in self._ahead_s), None)
            self._shown.pop(next(iter(self._shown)) if idle is None else idle)
        self._shown[chain.device] = chain

    def link_up(self, device: DeviceId, clock_ahead_s: float, now: float) -> None:
        """A peer is up: learn its certificates and compare what both know."""
        self._ahead_s[device] = clock_ahead_s
        self._keeper.poke()
        self._machine.call(TrustGossip.link_up, device, now)
        chain = self._shown.get(device)
        if chain is None:
            return
        against = self._effective.against(chain.keys)
        if against is not None:  # took effect while HELLO was on its way
            self._hooks.expel(device, _explained(against, chain))
        else:
            self._machine.call(TrustGossip.show, chain)

    def link_down(self, device: DeviceId) -> None:
        """A peer is down; it may be on its way back already, so what it showed is kept."""
        self._machine.call(TrustGossip.link_down, device)
        self._ahead_s.pop(device, None)

    async def deliver(self, sender: DeviceId, message: object) -> None:
        """Take one of TRUST_MESSAGES."""
        match message:
            case RenewAsked():
                await self._answer_renewal(sender, message)
            case RenewAnswered(request=request):
                waiting = self._answers.pop(request, None)
                if waiting is not None:
                    waiting.send_nowait(message)
                await trio.lowlevel.checkpoint()
            case _:
                await self._machine.deliver(sender, message)

    # What people ask.

    async def revoke(self, request: RevokeRequest) -> RevocationReport:
        """Put a member out, durably; its links here are closed when this returns.

        Raises:
            NotFound, ConfigError, TrustError: see `sign_revocation`; nothing was done.
        """
        signed = await trio.to_thread.run_sync(sign_revocation, self._known(), request)
        told = len(self._ahead_s)
        self._machine.call(TrustGossip.state_revocation, signed.statement)
        while signed.statement.id not in self._effective:
            await self._took_effect.wait()
        return signed.report(told=told)

    async def leave(self) -> None:
        """Void our own keys, durably; who was admitted by us stays. Without the right to admit
        nothing can be said: the others see this device go, and its leaf runs out."""
        if find_issuer(self.group) is not None and self.revoked_by is None:
            await self.revoke(
                RevokeRequest(device=self.group.device, reason="left the group", keep_all=True)
            )

    async def rotate(self, rotation: Rotation) -> int:
        """Spread a root's successor once it is durable; how many members heard of it at once.

        Raises:
            TrustError: the root did not sign it.
        """
        told = len(self._ahead_s)
        self._machine.call(TrustGossip.state_rotation, rotation)
        while rotation.id not in self._rotated:
            await self._took_effect.wait()
        return told

    def _known(self) -> KnownMembers:
        """What is known now, which may not be on disk yet; a copy, for use in a thread."""
        machine = self._machine.machine
        return KnownMembers(
            group=self.group,
            roster=Roster(machine.roster.chains),
            revoked=RevokedKeys(machine.revoked.statements),
        )

    # What the machine says.

    async def _persist(self, records: Sequence[object]) -> None:
        statements = cast(Sequence[Statement], records)
        await trio.to_thread.run_sync(append_statements, self.group.folder, statements)

    def _event(self, event: object) -> None:
        match event:
            case RevocationLearned(statement=statement):
                self._take_effect(statement)
            case RootRotated(rotation=rotation):
                self._rotated.add(rotation.id)
                self._keeper.poke()
                self._tell_effect()
            case ChainLearned():
                self._roster_changed.set()

    def _take_effect(self, statement: Revocation) -> None:
        self._effective.add(statement)
        for device, chain in list(self._shown.items()):
            against = self._effective.against(chain.keys)
            if against is not None:
                self._hooks.expel(device, _explained(against, chain))
                del self._shown[device]
        self._keeper.poke()
        self._tell_effect()

    def _tell_effect(self) -> None:
        self._took_effect.set()
        self._took_effect = trio.Event()

    # Certificates: ours from others, others' from us.

    def _keeper_hooks(self) -> KeeperHooks:
        return KeeperHooks(
            use=self._hooks.use,
            shown=lambda chain: self._machine.call(TrustGossip.show, chain),
            rotated=self.rotate,
            ask=self._ask_linked,
            date_refusals=self._date_refusals,
            root_refusals=self._root_refusals,
            linked_ahead_s=lambda: tuple(self._ahead_s.values()),
            came_back=self._hooks.dial,
        )

    async def _ask_linked(
        self, wanted: Wanted, take: Callable[[RenewalGranted], Awaitable[bool]]
    ) -> bool | None:
        able = issuers_among(tuple(self._ahead_s), self._shown)
        for device in able:
            granted = await self._ask_one(device, wanted)
            if granted is not None and await take(granted):
                return True
        return False if able else None

    async def _ask_one(self, device: DeviceId, wanted: Wanted) -> RenewalGranted | None:
        request = next(self._requests)
        send, receive = trio.open_memory_channel[RenewAnswered](1)
        self._answers[request] = send
        asked = RenewAsked(
            request=request, device_csr=wanted.device_csr, issuer_csr=wanted.issuer_csr
        )
        self._hooks.send(device, asked)
        try:
            with trio.move_on_after(limits.RENEW_ANSWER_S):
                answer = await receive.receive()
                if answer.issuers:
                    return RenewalGranted(issuers=answer.issuers, leaf=answer.leaf)
        finally:
            self._answers.pop(request, None)
        return None

    async def _answer_renewal(self, sender: DeviceId, asked: RenewAsked) -> None:
        """Certify a linked member's keys again, or answer that somebody else must."""
        chain = self._shown.get(sender)
        answer = RenewAnswered(request=asked.request)
        if chain is not None:
            renewing = partial(_renew, self.group, chain, asked, self.now())
            granted = await trio.to_thread.run_sync(renewing)
            if granted is not None:
                answer = replace(answer, issuers=granted.issuers, leaf=granted.leaf)
        self._hooks.send(sender, answer)

    def _date_refusals(self) -> tuple[str, ...]:
        return tuple(
            address
            for address, reason in self._hooks.refusals().items()
            if "not yet valid" in reason and reason.endswith(CLOCKS_DIFFER)
        )

    def _root_refusals(self) -> tuple[str, ...]:
        return tuple(a for a, why in self._hooks.refusals().items() if concerns_root(why))

    async def _save_roster(self) -> None:
        try:
            await self._save_roster_when_changed()
        finally:
            if self._roster_changed.is_set():
                with contextlib.suppress(OSError):
                    save_roster(self.group.folder, self._machine.machine.roster)

    async def _save_roster_when_changed(self) -> None:
        while True:
            await self._roster_changed.wait()
            self._roster_changed = trio.Event()
            roster = Roster(self._machine.machine.roster.chains)
            with contextlib.suppress(OSError):  # heard of again; a full disk is told elsewhere
                await trio.to_thread.run_sync(save_roster, self.group.folder, roster)
            if self._machine.machine.roots.rotations:
                self._keeper.poke()  # an old root may not be needed any more

    def _own(self) -> MemberChain:
        roots = self._machine.machine.roots
        return member_chain(self.group.chain, gid=self.group.id, roots=roots.ever)

    def _read(self, chain: Chain) -> MemberChain:
        return read_chain(chain, gid=self.group.id, roots=self._machine.machine.roots.ever)


def _explained(statement: Revocation, chain: MemberChain) -> str:
    if chain.device == statement.device:
        return f"{chain.name} was revoked: {statement.reason}"
    return f"{chain.name} was admitted by {statement.name}, which was revoked: {statement.reason}"


def _renew(
    group: Group, chain: MemberChain, asked: RenewAsked, now: float
) -> RenewalGranted | None:
    try:
        issuer = live_issuer(group)
        check_in_date(issuer.chain, now=now)
        return renew(
            issuer,
            chain,
            gid=group.id,
            device_csr=asked.device_csr,
            issuer_csr=asked.issuer_csr,
            now=now,
        )
    except TrustError:
        return None
