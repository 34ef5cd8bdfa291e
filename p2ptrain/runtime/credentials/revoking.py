"""Revoke a member: choose who stays of those that it had admitted, and sign."""

from __future__ import annotations

import time
from dataclasses import dataclass

from p2ptrain.errors import ConfigError
from p2ptrain.runtime.credentials.trust_reports import Known, RevocationReport, find_member
from p2ptrain.store.groups import load_issuer
from p2ptrain.trust.chains import MemberChain
from p2ptrain.trust.revocation import Revocation, revoke


@dataclass(frozen=True, slots=True, kw_only=True)
class RevokeRequest:
    """Whom to revoke, why, and what becomes of the members that it had admitted."""

    device: str
    """Name, device id, or the beginning of one."""
    reason: str
    keep: tuple[str, ...] = ()
    """Members below it that stay."""
    keep_all: bool = False
    keep_none: bool = False
    now_s: float | None = None
    """The time to sign with; None: this device's clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Signed:
    """A statement, and what to tell about it."""

    statement: Revocation
    kept: tuple[MemberChain, ...]
    void: tuple[MemberChain, ...]

    def report(self, *, told: int) -> RevocationReport:
        """For the one who asked."""
        return RevocationReport(
            device=self.statement.device,
            name=self.statement.name,
            id=self.statement.id,
            kept=tuple(chain.name for chain in self.kept),
            void=tuple(chain.name for chain in self.void),
            told=told,
        )


def sign_revocation(known: Known, request: RevokeRequest) -> Signed:
    """Sign with this device's issuer that a member is out; nothing is stored or sent yet.

    Raises:
        NotFound: there is no such member.
        ConfigError: it is ambiguous, revoked already, or had admitted others and the request
            does not say who stays.
        TrustError: this member may not admit, so it may not revoke either.
    """
    target = find_member(known, request.device)
    if known.revoked.of_device(target.device) is not None:
        raise ConfigError(f"{target.name} is revoked already", hint="nothing is left to do")
    kept, void = _sorted(known, target, request)
    statement = revoke(
        target,
        by=load_issuer(known.group),
        gid=known.group.id,
        reason=request.reason,
        keep=kept,
        now=time.time() if request.now_s is None else request.now_s,
    )
    return Signed(statement=statement, kept=kept, void=void)


def _sorted(
    known: Known, target: MemberChain, request: RevokeRequest
) -> tuple[tuple[MemberChain, ...], tuple[MemberChain, ...]]:
    """Members below the target that stay, and those that go; we ourselves always stay."""
    below = [c for c in known.roster.below(target) if known.revoked.against(c.keys) is None]
    ours = [chain for chain in below if chain.device == known.group.device]
    others = [chain for chain in below if chain.device != known.group.device]
    named = {find_member(known, each).device for each in request.keep}
    if others and not (request.keep_all or request.keep_none or named):
        names = ", ".join(sorted(chain.name for chain in others))
        raise ConfigError(
            f"{target.name} had admitted, directly or not: {names}",
            hint="say who stays with --keep NAME (repeatable), --keep-all or --keep-none",
        )
    stay = [c for c in others if request.keep_all or c.device in named]
    void = tuple(chain for chain in others if chain not in stay)
    return (*ours, *stay), void
