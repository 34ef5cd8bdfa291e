"""What a device knows about the members of its group, for `group members` and for choosing one."""

from __future__ import annotations

import time
from dataclasses import dataclass

from p2ptrain.errors import ConfigError, NotFound
from p2ptrain.ids import DeviceId, GroupId, short
from p2ptrain.store.groups import Group
from p2ptrain.store.trust_log import read_revoked, read_roots, read_roster
from p2ptrain.trust.chains import MemberChain, member_chain
from p2ptrain.trust.revocation import Revocation, RevokedKeys
from p2ptrain.trust.roster import Roster

TRUST_REPORT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberTrust:
    """One device that was ever a member."""

    device: DeviceId
    name: str
    state: str
    """`member`; `expired`: away for longer than its certificate; `revoked`; `void`: admitted by
    a revoked member and not kept."""
    is_self: bool
    may_admit: bool
    sponsor: str | None
    """Name of the member that admitted it; None: the founder, or recovered with the root's key."""
    expires_s: float
    """When its certificates end, if nobody renews them; seconds since 1970."""
    reason: str | None = None
    """Of a revocation."""
    revoked_by: str | None = None
    revoked_at_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustReport:
    """The members of a group as this device knows them."""

    group: GroupId
    name: str
    members: tuple[MemberTrust, ...]
    root_expires_s: float
    roots_trusted: int
    """Two while a root is rotated."""
    version: int = TRUST_REPORT_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class RevocationReport:
    """What a revocation did."""

    device: DeviceId
    name: str
    id: str
    kept: tuple[str, ...]
    """Names of the members below it that stay."""
    void: tuple[str, ...]
    """Names of the members below it that are out as well."""
    told: int
    """Members that were linked when it was made; the others hear of it by and by."""
    version: int = TRUST_REPORT_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What is on disk about the members of a group."""

    group: Group
    roster: Roster
    revoked: RevokedKeys

    @property
    def own(self) -> MemberChain:
        """This device's chain."""
        roots = read_roots(self.group.folder, self.group.root, self.group.id)
        return member_chain(self.group.chain, gid=self.group.id, roots=roots.ever)

    def name_of(self, device: DeviceId) -> str:
        """What people call a device."""
        chain = self.roster.get(device)
        statement = self.revoked.of_device(device)
        if chain is not None:
            return chain.name
        return statement.name if statement is not None else short(device)


def read_known(group: Group) -> Known:
    """Read what this device knows about the members of a group, itself included."""
    roots = read_roots(group.folder, group.root, group.id)
    revoked = read_revoked(group.folder, roots, group.id)
    roster = read_roster(group.folder, roots, group.id)
    roster.add(member_chain(group.chain, gid=group.id, roots=roots.ever))
    return Known(group=group, roster=roster, revoked=revoked)


def trust_report(group: Group) -> TrustReport:
    """The members of a group as this device knows them; itself first, then by name."""
    known = read_known(group)
    now = time.time()
    members = [_member(chain, known, now) for chain in known.roster.chains]
    listed = {member.device for member in members}
    for statement in known.revoked.statements:
        if statement.device not in listed:
            members.append(_gone(statement, known))
            listed.add(statement.device)
    members.sort(key=lambda member: (not member.is_self, member.name, member.device))
    return TrustReport(
        group=group.id,
        name=group.name,
        members=tuple(members),
        root_expires_s=group.trusted[0].not_valid_after_utc.timestamp(),
        roots_trusted=len(group.trusted),
    )


def find_member(known: Known, wanted: str) -> MemberChain:
    """The member with this name, or whose device id begins like this.

    Raises:
        NotFound: nobody; lists who there is.
        ConfigError: several.
    """
    chains = known.roster.chains
    found = [c for c in chains if wanted in (c.name, c.device)] or [
        c for c in chains if len(wanted) >= 4 and c.device.startswith(wanted)
    ]
    if len(found) == 1:
        return found[0]
    if found:
        ids = ", ".join(f"{chain.name} is {short(chain.device)}" for chain in found)
        raise ConfigError(f"{wanted!r} is more than one device: {ids}", hint="give the id")
    names = ", ".join(sorted(chain.name for chain in chains))
    raise NotFound(
        f"no member is called {wanted!r}; this device knows: {names}",
        hint="see p2ptrain group members",
    )


def _member(chain: MemberChain, known: Known, now: float) -> MemberTrust:
    statement = known.revoked.against(chain.keys)
    own = statement if statement is not None and statement.device == chain.device else None
    if statement is not None:
        state = "revoked" if own is not None else "void"
    else:
        state = "member" if now < chain.ends_s else "expired"
    return MemberTrust(
        device=chain.device,
        name=chain.name,
        state=state,
        is_self=chain.device == known.group.device,
        may_admit=chain.may_admit,
        sponsor=None if chain.sponsor is None else known.name_of(chain.sponsor),
        expires_s=chain.ends_s,
        reason=None if statement is None else statement.reason,
        revoked_by=None if statement is None else known.name_of(statement.by),
        revoked_at_s=None if statement is None else float(statement.at_s),
    )


def _gone(statement: Revocation, known: Known) -> MemberTrust:
    return MemberTrust(
        device=statement.device,
        name=statement.name,
        state="revoked",
        is_self=statement.device == known.group.device,
        may_admit=len(statement.keys) > 1,
        sponsor=None,
        expires_s=0.0,
        reason=statement.reason,
        revoked_by=known.name_of(statement.by),
        revoked_at_s=float(statement.at_s),
    )
