"""Keep this device's certificates valid: by itself, by asking a linked issuer, or coming back.

The one task that replaces what links show. Three ways, by what is left: an own issuer that is in
date signs a leaf; a linked member that may admit certifies our keys again; and who was away for
too long for any link, or whose clock is wrong, meets an issuer outside mutual TLS.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import trio
from cryptography import x509

from p2ptrain import limits
from p2ptrain.errors import TrustError
from p2ptrain.ids import DeviceId
from p2ptrain.net.renew import Identity, Met, Wanted, meet_issuer
from p2ptrain.runtime.device.suspension import boot_clock_s
from p2ptrain.store.groups import (
    Group,
    find_issuer,
    install_chain,
    install_issuer,
    load_device_key,
    refresh,
    reload,
    renew_leaf,
)
from p2ptrain.store.trust_log import read_revoked, read_roots
from p2ptrain.trust import certificates as certs
from p2ptrain.trust.chains import MemberChain, check_in_date, member_chain, root_of
from p2ptrain.trust.clock import Reading, VouchedClock, doubts_clock
from p2ptrain.trust.credentials import Credentials
from p2ptrain.trust.renewal import RenewalGranted, renewed_chain
from p2ptrain.trust.rotation import Roots, Rotation

Hear = Callable[[Roots, float, str], Wanted | None]
"""(roots by now, time, name) of an issuer that was met -> what to ask it for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeeperHooks:
    """What the keeper needs of its peer."""

    use: Callable[[Credentials], None]
    """Show these from the next handshake on."""
    shown: Callable[[MemberChain], None]
    """Our chain is new: spread it."""
    rotated: Callable[[Rotation], Awaitable[object]]
    """An issuer told us of a root's successor: spread it; it is durable afterwards."""
    ask: Callable[[Wanted, Callable[[RenewalGranted], Awaitable[bool]]], Awaitable[bool | None]]
    """Ask linked issuers in turn until one grants what is taken; whether any did, None: nobody
    was there to be asked."""
    date_refusals: Callable[[], tuple[str, ...]]
    """host:port of members whose certificates are not yet valid by our clock."""
    root_refusals: Callable[[], tuple[str, ...]]
    """host:port of peers whose root we do not trust, or that do not trust ours: another group, or
    one of us has not heard of a rotation."""
    linked_ahead_s: Callable[[], tuple[float, ...]]
    """How far the clocks of the linked members are ahead of ours."""
    came_back: Callable[[Sequence[str]], None]
    """Our certificates are valid again: dial these."""


class CredentialKeeper:
    """Runs as one task; `poke` it when something was learnt that concerns certificates."""

    def __init__(
        self, group: Group, hooks: KeeperHooks, *, reading: Callable[[], Reading] | None = None
    ) -> None:
        """Takes what reads this device's clocks; None: the real ones."""
        self._reading = read_clocks if reading is None else reading
        self._group = group
        self._hooks = hooks
        self.clock = VouchedClock(floor_s=_certain_s(group))
        self._hints: dict[str, None] = {}
        self._doubted_at_s: dict[str, float] = {}
        self._stale = trio.Event()
        self._away_since_s: float | None = None
        self._last_failure = ""
        self._ask_again_at_s = 0.0
        self._in_use: tuple[Credentials, tuple[x509.Certificate, ...]] | None = None
        self._refresh_at_s = 0.0

    @property
    def group(self) -> Group:
        """The membership as it is now."""
        return self._group

    @property
    def away(self) -> bool:
        """Whether no member would let us in: out of date, or no idea of the time."""
        return not self._in_date() or (
            self.clock.is_behind(self._reading()) and not self._is_vouched()
        )

    @property
    def notices(self) -> tuple[str, ...]:
        """What a person should know, one sentence each."""
        found = []
        problem = self.clock.problem(self._reading())
        if problem is not None:
            found.append(f"{problem}; set it, or give this device a time server")
        if self.away:
            reason = f" ({self._last_failure})" if self._last_failure else ""
            found.append(
                "this device's certificate is out of date, and no issuer was found that renews "
                f"it{reason}; start a member that may admit, or give its address with --peer"
            )
        return tuple(found)

    @property
    def clock_is_vouched(self) -> bool:
        """Whether an issuer's time is used instead of this device's clock."""
        return self._is_vouched()

    def now(self) -> float:
        """The time to judge and to sign certificates by, seconds since 1970."""
        return self.clock.now(self._reading())

    def poke(self) -> None:
        """Look again soon."""
        self._stale.set()

    def hint(self, address: str) -> None:
        """A member may be at host:port; a bounded number is remembered."""
        if len(self._hints) < limits.DISCOVERED_ADDRESSES_MAX and address not in self._hints:
            self._hints[address] = None
            if self._away_since_s is not None:
                self.poke()

    async def run(self) -> None:
        """Until cancelled; then certificates on disk are whole, old or new."""
        while True:
            with trio.move_on_after(limits.AWAY_RETRY_S if self.away else limits.TRUST_LOOK_S):
                await self._stale.wait()
            if self._stale.is_set():
                self._stale = trio.Event()
                self._refresh_at_s = 0.0
            await self.look()

    async def look(self) -> None:
        """Do what is due now."""
        if self.away:
            await self._come_back()
        else:
            await self._doubt_clock()
            await self._doubt_root()
            if self.now() >= self._refresh_at_s:
                await self._refresh()
                await self._renew_by_asking()
        self._show()

    # Where everything is as it should be.

    async def _refresh(self) -> None:
        try:
            work = partial(refresh, self._group, now=self.now())
            self._group = await trio.to_thread.run_sync(work)
        except (TrustError, OSError):
            pass  # a file was damaged under us: what is shown stays, the next start tells
        due_s = certs.renew_at_s(self._group.chain[0])
        earliest_s = self.now() + limits.TRUST_REFRESH_MIN_S
        self._refresh_at_s = max(earliest_s, min(due_s, self.now() + limits.TRUST_REFRESH_MAX_S))

    async def _renew_by_asking(self) -> None:
        wanted = self._wanted(self.now(), early=True)
        if wanted is None or trio.current_time() < self._ask_again_at_s:
            return
        self._refresh_at_s = min(self._refresh_at_s, self.now() + limits.RENEW_RETRY_SOON_S)
        was_taken = await self._hooks.ask(wanted, self._take)
        if was_taken is not None:
            pause_s = limits.RENEW_RETRY_S if was_taken else limits.RENEW_RETRY_SOON_S
            self._ask_again_at_s = trio.current_time() + pause_s

    def _wanted(self, now: float, *, early: bool) -> Wanted | None:
        """What only somebody else can certify; None when nothing is due.

        Args:
            early: At two thirds of a life already.
        """
        issuer = find_issuer(self._group)
        if self._is_stranded(read_roots(self._group.folder, self._group.root, self._group.id)):
            return self._everything()
        if issuer is None:
            return self._everything() if _due(self._group.chain[0], now, early) else None
        if not issuer.above or not _due(issuer.certificate, now, early):
            return None  # what the root signed, only the root could renew
        return self._everything()

    def _everything(self) -> Wanted:
        """Our issuer's key if we have one, whose owner signs its own leaf; else our leaf's."""
        name, issuer = self._group.device_name, find_issuer(self._group)
        device_csr = certs.request_certificate(load_device_key(self._group), name=name)
        wanted = Wanted(device_csr=certs.request_to_der(device_csr))
        if issuer is None:
            return wanted
        issuer_csr = certs.request_certificate(issuer.key, name=name)
        return replace(wanted, issuer_csr=certs.request_to_der(issuer_csr))

    def _is_stranded(self, roots: Roots) -> bool:
        """Whether a rotation did not move us: whoever made it had not heard of us."""
        if not roots.rotations:
            return False
        return root_of(roots.mended(self._group.chain)[1:], roots.ever) != roots.current

    async def _take(self, granted: RenewalGranted) -> bool:
        """Install what was granted, unless it is no better than what we have."""
        try:
            await trio.to_thread.run_sync(_install, self._group, granted, self.now())
        except (TrustError, OSError) as error:
            self._last_failure = str(error)
            return False
        self._group = reload(self._group)
        return True

    # Where the clock is in doubt.

    async def _doubt_clock(self) -> None:
        addresses = self._hooks.date_refusals()
        ahead_s = self._hooks.linked_ahead_s()
        if not doubts_clock(linked_ahead_s=ahead_s, not_yet_valid=bool(addresses)):
            return
        for address in filter(self._may_doubt, addresses):
            if await self._meet(address, self._hear_time):
                self._hooks.came_back([address])
                return

    async def _doubt_root(self) -> None:
        """Whoever missed a rotation is met by strangers: the old root's word explains them."""
        for address in filter(self._may_doubt, self._hooks.root_refusals()):
            if await self._meet(address, self._hear_roots):
                await self._refresh()
                self._show()
                self._hooks.came_back([address])

    def _may_doubt(self, address: str) -> bool:
        """Whether an address was not asked a moment ago."""
        last_s = self._doubted_at_s.get(address)
        now_s = trio.current_time()
        if last_s is not None and now_s < last_s + limits.DOUBT_RETRY_S:
            return False
        self._doubted_at_s[address] = now_s
        return True

    # Where no member would let us in.

    async def _come_back(self) -> None:
        if self._away_since_s is None:
            self._away_since_s = trio.current_time()
        for address in list(self._hints):
            if await self._meet(address, self._hear) and not self.away:
                break
        alone_s = trio.current_time() - self._away_since_s
        if (
            self.away
            and alone_s >= limits.AWAY_ALONE_S
            and not self.clock.is_behind(self._reading())
        ):
            # Nobody answers: perhaps everybody was away. An own issuer needs nobody.
            await trio.to_thread.run_sync(partial(renew_leaf, self._group, now=self.now()))
            self._group = reload(self._group)
        if not self.away:
            self._away_since_s = None
            self._show()
            self._hooks.came_back(list(self._hints))

    async def _meet(self, address: str, hear: Hear) -> bool:
        """Meet an issuer: hear what it says, and have certified what is wanted then."""
        try:
            identity = await trio.to_thread.run_sync(_identity, self._group)
            known = len(identity.roots.rotations)
            met = await meet_issuer(address, identity, partial(hear, identity.roots))
            for rotation in identity.roots.rotations[known:]:
                await self._hooks.rotated(rotation)
            return await self._took(met)
        except (TrustError, OSError) as error:
            self._last_failure = str(error)
            return False

    def _hear(self, roots: Roots, clock_s: float, by: str) -> Wanted | None:
        """Take the time, then ask for what is out of date by it."""
        self._hear_time(roots, clock_s, by)
        if self._is_stranded(roots):
            return self._everything()
        return self._wanted(self.now(), early=False)

    def _hear_time(self, roots: Roots, clock_s: float, by: str) -> None:
        self.clock.vouch(clock_s, by=by, reading=self._reading())

    def _hear_roots(self, roots: Roots, clock_s: float, by: str) -> Wanted | None:
        """Learn of rotations, whatever time it is there."""
        return self._everything() if self._is_stranded(roots) else None

    async def _took(self, met: Met) -> bool:
        if met.granted is not None:
            return await self._take(met.granted)
        if not self._in_date():
            renewing = partial(renew_leaf, self._group, now=self.now())
            await trio.to_thread.run_sync(renewing)
            self._group = reload(self._group)
        return True

    # What follows.

    def _show(self) -> None:
        credentials = replace(self._group.credentials, dates_checked=not self._is_vouched())
        shown = (credentials, self._group.chain)
        if shown == self._in_use:
            return
        self._hooks.use(credentials)
        self._in_use = shown
        roots = read_roots(self._group.folder, self._group.root, self._group.id)
        self._hooks.shown(member_chain(self._group.chain, gid=self._group.id, roots=roots.ever))

    def _is_vouched(self) -> bool:
        return self.clock.is_vouched(self._reading())

    def _knows_no_time(self) -> bool:
        return self.clock.is_behind(self._reading()) and not self._is_vouched()

    def _in_date(self) -> bool:
        try:
            check_in_date(self._group.chain, now=self.now())
        except TrustError:
            return False
        return True


def _install(group: Group, granted: RenewalGranted, now: float) -> None:
    roots = read_roots(group.folder, group.root, group.id)
    former = member_chain(group.chain, gid=group.id, roots=roots.ever)
    fresh = renewed_chain(granted, former, gid=group.id, roots=roots)
    check_in_date(fresh, now=now)
    if granted.leaf:
        install_chain(group, fresh)
        return
    root = root_of(fresh, roots.ever)
    if root != former.root and root != roots.current:
        raise TrustError("the issuer that was asked has not moved below the new root either")
    ends_s = min(each.not_valid_after_utc.timestamp() for each in fresh)
    if (
        root == former.root
        and ends_s < min(c.not_valid_after_utc.timestamp() for c in former.issuers) + 86_400
    ):
        raise TrustError("the issuer that was asked does not live longer than ours")
    install_issuer(group, fresh, now=now)


def _ends_s(chain: Sequence[x509.Certificate]) -> float:
    return min(certificate.not_valid_after_utc.timestamp() for certificate in chain)


def _identity(group: Group) -> Identity:
    roots = read_roots(group.folder, group.root, group.id)
    return Identity(
        gid=group.id,
        chain=member_chain(group.chain, gid=group.id, roots=roots.ever),
        key=load_device_key(group),
        roots=roots,
        revoked=read_revoked(group.folder, roots, group.id),
    )


def _due(certificate: x509.Certificate, now: float, early: bool) -> bool:
    ends_s = certificate.not_valid_after_utc.timestamp()
    begins_s = certificate.not_valid_before_utc.timestamp()
    limit_s = certs.renew_at_s(certificate) if early else ends_s
    return now >= limit_s or now < begins_s


def _certain_s(group: Group) -> float:
    """A time that is certainly over: others made certificates of ours then."""
    chain = group.chain[1:]
    if certs.certified_device(chain[0]) != group.device:
        chain = group.chain  # the leaf, too, is a sponsor's work
    return max(certificate.not_valid_before_utc.timestamp() for certificate in chain)


def read_clocks() -> Reading:
    """This device's clocks now."""
    return Reading(wall_s=time.time(), counted_s=boot_clock_s())


def issuers_among(
    linked: Sequence[DeviceId], chains: dict[DeviceId, MemberChain]
) -> tuple[DeviceId, ...]:
    """Linked members that may certify, those with the shortest chains first."""
    able = [chains[device] for device in linked if device in chains and chains[device].may_admit]
    able.sort(key=lambda chain: (len(chain.issuers), -chain.ends_s, chain.device))
    return tuple(chain.device for chain in able)
