"""A group in memory: who admitted whom, with all keys at hand. Nothing is stored."""

from __future__ import annotations

from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from p2ptrain.ids import DeviceId, GroupId
from p2ptrain.trust import certificates as certs
from p2ptrain.trust.chains import MemberChain, member_chain
from p2ptrain.trust.revocation import Revocation, revoke

NOW = 1_800_000_000.0


@dataclass(frozen=True, kw_only=True)
class MintedMember:
    """A device of the group, with its keys."""

    key: Ed25519PrivateKey
    issuer: certs.Issuer | None
    chain: MemberChain

    @property
    def device(self) -> DeviceId:
        return self.chain.device

    @property
    def may_sign(self) -> certs.Issuer:
        assert self.issuer is not None
        return self.issuer


class MintedGroup:
    """A group whose root key is still in memory."""

    def __init__(self, *, now: float = NOW) -> None:
        self.now = now
        self.made = certs.create_group("home", now=now)

    @property
    def gid(self) -> GroupId:
        return self.made.id

    def founder(self, name: str = "founder") -> MintedMember:
        """A member whose issuer the root signed."""
        key, issuer_key = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
        issuer = certs.issue_first_issuer(
            self.made, issuer_key, device=device_of(key), name=name, now=self.now
        )
        return self._member(key, issuer, name)

    def admit(self, sponsor: MintedMember, name: str, *, admits: bool = True) -> MintedMember:
        """A member that another one lets in, with or without the right to admit others."""
        key = Ed25519PrivateKey.generate()
        if not admits:
            return self._plain(key, sponsor.may_sign, name)
        issuer_key = Ed25519PrivateKey.generate()
        certificate = certs.issue_issuer(
            sponsor.may_sign,
            certs.request_certificate(issuer_key, name=name),
            device=device_of(key),
            gid=self.gid,
            name=name,
            now=self.now,
        )
        above = sponsor.may_sign.chain
        issuer = certs.Issuer(key=issuer_key, certificate=certificate, above=above)
        return self._member(key, issuer, name)

    def revoke(
        self, target: MintedMember, *, by: MintedMember, keep: tuple[MintedMember, ...] = ()
    ) -> Revocation:
        """A statement of one member against another."""
        return revoke(
            target.chain,
            by=by.may_sign,
            gid=self.gid,
            reason="stolen",
            keep=[member.chain for member in keep],
            now=self.now,
        )

    def _member(self, key: Ed25519PrivateKey, issuer: certs.Issuer, name: str) -> MintedMember:
        return MintedMember(key=key, issuer=issuer, chain=self._plain(key, issuer, name).chain)

    def _plain(self, key: Ed25519PrivateKey, issuer: certs.Issuer, name: str) -> MintedMember:
        request = certs.request_certificate(key, name=name)
        leaf = certs.issue_leaf(issuer, request, gid=self.gid, name=name, now=self.now)
        chain = member_chain((leaf, *issuer.chain), gid=self.gid, roots=[self.made.root])
        return MintedMember(key=key, issuer=None, chain=chain)


def device_of(key: Ed25519PrivateKey) -> DeviceId:
    """The id of the device that holds this key."""
    return certs.device_id(key.public_key())
