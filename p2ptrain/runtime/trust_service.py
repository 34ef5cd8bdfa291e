"""Trust in a running peer: who is kept out, and certificates that stay valid by themselves.

The deciding is in `trust`; this drives the gossip machine, lets revocations take effect once they
are on disk, and is the only task that replaces what links show.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, cast

import trio
from cryptography import x509

from p2ptrain import limits
from p2ptrain.errors import RemoteProtocolError, TrustError
from p2ptrain.ids import DeviceId
from p2ptrain.runtime.driver import Driver
from p2ptrain.runtime.revoking import RevokeRequest, sign_revocation
from p2ptrain.runtime.trust_reports import Known as KnownMembers
from p2ptrain.runtime.trust_reports import RevocationReport
from p2ptrain.store.groups import Group, refresh
from p2ptrain.store.trust_log import (
    append_statements,
    read_revoked,
    read_roots,
    read_roster,
    save_roster,
)
from p2ptrain.trust import certificates as certs
from p2ptrain.trust.chains import MemberChain, key_fingerprint, member_chain, read_chain
from p2ptrain.trust.credentials import Chain, Credentials, Objection
from p2ptrain.trust.gossip import (
    ChainLearned,
    RevocationLearned,
    RootRotated,
    Statement,
    TrustGossip,
)
from p2ptrain.trust.gossip_messages import ChainShown, Known, Summary
from p2ptrain.trust.revocation import Revocation, RevokedKeys
from p2ptrain.trust.roster import Roster
from p2ptrain.trust.rotation import Rotation
from p2ptrain.wire.hello import REFUSE_REVOKED

TRUST_MESSAGES: Final = (Summary, Known, ChainShown, Revocation, Rotation)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustHooks:
    """What trust needs of the peer."""

    send: Callable[[DeviceId, object], None]
    """Queue a message for a linked peer; may drop it."""
    use: Callable[[Credentials], None]
    """Show these from the next handshake on."""
    expel: Callable[[DeviceId, str], None]
    """Close the links with a peer and count it as gone, now."""
    violation: Callable[[DeviceId, RemoteProtocolError], None]


class TrustService:
    """Everything about trust that goes on while a peer runs; `run` owns its tasks."""

    def __init__(self, group: Group, hooks: TrustHooks, *, rng: random.Random) -> None:
        """Raises TrustError when a log on disk is damaged: a peer must not run without it."""
        self._group = group
        self._hooks = hooks
        roots = read_roots(group.folder, group.root, group.id)
        self._effective = read_revoked(group.folder, roots, group.id)
        self._shown: dict[DeviceId, Chain] = {}
        self._stale = trio.Event()
        self._took_effect = trio.Event()
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
        return self._group

    @property
    def revoked_by(self) -> Revocation | None:
        """The statement that puts this device itself out of the group, if there is one."""
        return self._effective.against([key_fingerprint(c) for c in self._group.chain])

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Spread and take in what is said about trust, and keep our certificates valid.

        Ends when it is cancelled.
        """
        async with trio.open_nursery() as nursery:
            await nursery.start(self._machine.run)
            self._show_own()
            nursery.start_soon(self._keep_credentials)
            task_status.started()

    # What links ask and tell.

    def objection(self, chain: Chain) -> Objection | None:
        """Why a chain that TLS verified is refused all the same; None: it is not."""
        read = [certs.certificate_from_der(der) for der in chain[:-1]]
        statement = self._effective.against([key_fingerprint(c) for c in read])
        if statement is not None:
            return Objection(refusal=REFUSE_REVOKED, reason=self._explained(statement, read[0]))
        device = certs.certificate_device(read[0])
        while len(self._shown) >= limits.ROSTER_MAX and device not in self._shown:
            self._shown.pop(next(iter(self._shown)))
        self._shown[device] = chain[:-1]
        return None

    def link_up(self, device: DeviceId, now: float) -> None:
        """A peer is up: learn its certificates and compare what both know."""
        self._machine.call(TrustGossip.link_up, device, now)
        chain = self._shown.get(device)
        if chain is None:
            return
        read = self._read(chain)
        against = self._effective.against(read.keys)
        if against is not None:  # took effect while HELLO was on its way
            self._hooks.expel(device, self._explained(against, read.certificates[0]))
        else:
            self._machine.call(TrustGossip.show, read)

    def link_down(self, device: DeviceId) -> None:
        """A peer is down."""
        self._machine.call(TrustGossip.link_down, device)
        self._shown.pop(device, None)

    async def deliver(self, sender: DeviceId, message: object) -> None:
        """Take one of TRUST_MESSAGES."""
        await self._machine.deliver(sender, message)

    # What people ask.

    async def revoke(self, request: RevokeRequest) -> RevocationReport:
        """Put a member out, durably; its links here are closed when this returns.

        Raises:
            NotFound, ConfigError, TrustError: see `sign_revocation`; nothing was done.
        """
        signed = await trio.to_thread.run_sync(sign_revocation, self._known(), request)
        told = len(self._shown)
        self._machine.call(TrustGossip.state_revocation, signed.statement)
        while signed.statement.id not in self._effective:
            await self._took_effect.wait()
        return signed.report(told=told)

    def _known(self) -> KnownMembers:
        """What is known now, which may not be on disk yet; a copy, for use in a thread."""
        machine = self._machine.machine
        return KnownMembers(
            group=self._group,
            roster=Roster(machine.roster.chains),
            revoked=RevokedKeys(machine.revoked.statements),
        )

    # What the machine says.

    async def _persist(self, records: Sequence[object]) -> None:
        statements = cast(Sequence[Statement], records)
        await trio.to_thread.run_sync(append_statements, self._group.folder, statements)

    def _event(self, event: object) -> None:
        match event:
            case RevocationLearned(statement=statement):
                self._take_effect(statement)
            case RootRotated() | ChainLearned():
                self._stale.set()

    def _take_effect(self, statement: Revocation) -> None:
        self._effective.add(statement)
        for device, chain in list(self._shown.items()):
            read = [certs.certificate_from_der(der) for der in chain]
            against = self._effective.against([key_fingerprint(c) for c in read])
            if against is not None:
                self._hooks.expel(device, self._explained(against, read[0]))
        self._stale.set()
        self._took_effect.set()
        self._took_effect = trio.Event()

    def _explained(self, statement: Revocation, leaf: x509.Certificate) -> str:
        name = certs.common_name(leaf)
        if certs.certificate_device(leaf) == statement.device:
            return f"{name} was revoked: {statement.reason}"
        return f"{name} was admitted by {statement.name}, which was revoked: {statement.reason}"

    # Our own certificates.

    async def _keep_credentials(self) -> None:
        """Bring our certificates up to date whenever something was learnt, and when due."""
        while True:
            with trio.move_on_after(self._wait_s()):
                await self._stale.wait()
            self._stale = trio.Event()
            await self._refresh()

    def _wait_s(self) -> float:
        due_s = certs.renew_at_s(self._group.chain[0]) - time.time()
        return min(max(due_s, limits.TRUST_REFRESH_MIN_S), limits.TRUST_REFRESH_MAX_S)

    async def _refresh(self) -> None:
        await trio.to_thread.run_sync(save_roster, self._group.folder, self._machine.machine.roster)
        try:
            now = await trio.to_thread.run_sync(_refreshed, self._group)
        except (TrustError, OSError):
            return  # a file was damaged under us: what is shown stays, the next start tells
        if now != self._group:
            self._group = now
            self._hooks.use(now.credentials)
            self._show_own()

    def _show_own(self) -> None:
        roots = self._machine.machine.roots
        own = member_chain(self._group.chain, gid=self._group.id, roots=roots.ever)
        self._machine.call(TrustGossip.show, own)

    def _read(self, chain: Chain) -> MemberChain:
        return read_chain(chain, gid=self._group.id, roots=self._machine.machine.roots.ever)


def _refreshed(group: Group) -> Group:
    return refresh(group, now=time.time())
