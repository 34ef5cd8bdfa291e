"""Test vectors for trust: statements, whom they refuse, and a renewal, all with fixed keys.

The keys follow from letters, here and nowhere else: these certificates are worth nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any, Final
from unittest.mock import patch

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from p2ptrain.trust import certificates as certs
from p2ptrain.trust.chains import MemberChain, member_chain
from p2ptrain.trust.gossip import TrustGossip
from p2ptrain.trust.renewal import RenewalClient, RenewalServer, renew
from p2ptrain.trust.revocation import Revocation, RevokedKeys, revoke
from p2ptrain.trust.roster import Roster, chain_digest
from p2ptrain.trust.rotation import OldRoot, Roots, Rotation, rotate
from p2ptrain.wire.codec import to_plain

NOW: Final = 1_800_000_000.0
DAY_S: Final = 86_400.0
Document = dict[str, Any]  # Any: JSON


class _FixedKey:
    """In place of the class whose `generate` draws a key."""

    def __init__(self, letter: str) -> None:
        self._letter = letter

    def generate(self) -> Ed25519PrivateKey:
        return _key(self._letter)


class _Cast:
    """A group: a founder, a phone that it admitted, and a tablet that the phone admitted."""

    def __init__(self) -> None:
        self.made = _root("home", "r")
        self.founder = self._member("founder", "a", None)
        self.phone = self._member("phone", "b", self.founder)
        self.tablet = self._member("tablet", "c", self.phone)

    def roots(self, *rotations: Rotation) -> Roots:
        return Roots(self.made.root, rotations, gid=self.made.id)

    def chain(self, member: _Member) -> MemberChain:
        return self.read((member.leaf, *member.issuer.chain))

    def read(self, chain: Sequence[x509.Certificate]) -> MemberChain:
        return member_chain(chain, gid=self.made.id, roots=self.roots().ever)

    def _member(self, name: str, letter: str, sponsor: _Member | None) -> _Member:
        key, issuer_key = _key(letter), _key(letter.upper())
        device = certs.device_id(key.public_key())
        if sponsor is None:
            issuer = certs.issue_first_issuer(
                self.made, issuer_key, device=device, name=name, now=NOW
            )
        else:
            request = certs.request_certificate(issuer_key, name=name)
            made = certs.issue_issuer(
                sponsor.issuer, request, device=device, gid=self.made.id, name=name, now=NOW
            )
            issuer = certs.Issuer(key=issuer_key, certificate=made, above=sponsor.issuer.chain)
        asked = certs.request_certificate(key, name=name)
        leaf = certs.issue_leaf(issuer, asked, gid=self.made.id, name=name, now=NOW)
        return _Member(key, issuer, leaf)


class _Member:
    def __init__(
        self, key: Ed25519PrivateKey, issuer: certs.Issuer, leaf: x509.Certificate
    ) -> None:
        self.key, self.issuer, self.leaf = key, issuer, leaf


def trust_vectors() -> Document:
    """Revocations and a rotation, the chains they refuse or move, hashes, and a renewal."""
    with _counted_serials():
        cast = _Cast()
        founder, phone, tablet = map(cast.chain, (cast.founder, cast.phone, cast.tablet))
        alone = _revoked(cast, phone, ())
        keeping = _revoked(cast, phone, (tablet,))
        rotation = _rotated(cast, founder)
        chains = {"founder": founder, "phone": phone, "tablet": tablet}
        judged = [
            _judged(cast, name, chain, statements)
            for name, chain in chains.items()
            for statements in ((alone,), (keeping,), (keeping, alone))
        ]
        return {
            "group": cast.made.id,
            "root": certs.to_der(cast.made.root).hex(),
            "chains": [_shown(name, chain) for name, chain in chains.items()],
            "revocations": [_statement(alone), _statement(keeping)],
            "judged": judged,
            "rotations": [_statement(rotation)],
            "moved": [_moved(cast, name, chain, rotation) for name, chain in chains.items()],
            "summary": _summary(cast, [founder, phone], keeping, rotation),
            "renewal": _renewal(cast, rotation),
        }


def _revoked(cast: _Cast, target: MemberChain, keep: Sequence[MemberChain]) -> Revocation:
    return revoke(
        target, by=cast.founder.issuer, gid=cast.made.id, reason="stolen", keep=keep, now=NOW
    )


def _rotated(cast: _Cast, founder: MemberChain) -> Rotation:
    old = OldRoot(key=cast.made.root_key, certificate=cast.made.root)
    new = _root("home 2", "s")
    issuers = [founder.issuers[-1]]
    return rotate(old, new, gid=cast.made.id, number=1, issuers=issuers, now=NOW)


def _shown(name: str, chain: MemberChain) -> Document:
    return {
        "name": name, "device": chain.device, "keys": list(chain.keys),
        "certificates": _hex(chain.certificates), "hash": chain_digest(chain),
    }  # fmt: skip


def _statement(statement: Revocation | Rotation) -> Document:
    signed = statement.signed_bytes
    return {"fields": to_plain(statement), "signed": signed.hex(), "id": statement.id}


def _judged(
    cast: _Cast, name: str, chain: MemberChain, statements: Sequence[Revocation]
) -> Document:
    revoked = RevokedKeys(statements)
    refused = revoked.against(chain.keys) is not None
    return {
        "chain": name, "statements": [statement.id for statement in statements],
        "refused": refused, "led_around": _hex(revoked.mended(chain.certificates)),
    }  # fmt: skip


def _moved(cast: _Cast, name: str, chain: MemberChain, rotation: Rotation) -> Document:
    moved = cast.roots(rotation).mended(chain.certificates)
    return {"chain": name, "certificates": _hex(moved)}


def _summary(
    cast: _Cast, chains: Sequence[MemberChain], revocation: Revocation, rotation: Rotation
) -> Document:
    machine = TrustGossip(
        gid=cast.made.id, roots=cast.roots(rotation), revoked=RevokedKeys([revocation]),
        roster=Roster(chains), rng=random.Random(0),
    )  # fmt: skip
    known = machine._known(reply_wanted=False)
    return {"known": to_plain(known), "digest": machine._summary().digest}


def _renewal(cast: _Cast, rotation: Rotation) -> Document:
    """The phone was away; the founder certifies its issuer again, below its own old root."""
    member, issuer = _exchange_key("m"), _exchange_key("i")
    client = RenewalClient(cast.made.id, member)
    server = RenewalServer(cast.made.id, cast.founder.issuer, issuer)
    offer = client.offer()
    answer = server.answer(offer, rotations=[rotation], now=NOW + 40 * DAY_S)
    shown = client.met(answer, roots=cast.roots(), revoked=RevokedKeys())
    phone, name = cast.phone, "phone"
    device_csr, issuer_csr = (
        certs.request_to_der(certs.request_certificate(key, name=name))
        for key in (phone.key, phone.issuer.key)
    )
    request = client.ask(cast.chain(phone), phone.key, device_csr=device_csr, issuer_csr=issuer_csr)
    chain, _ = server.asked(
        request, roots=cast.roots(), revoked=RevokedKeys(), now=NOW + 40 * DAY_S
    )
    granted = renew(
        cast.founder.issuer, chain, gid=cast.made.id, device_csr=device_csr,
        issuer_csr=issuer_csr, now=NOW + 40 * DAY_S,
    )  # fmt: skip
    grant = server.grant(granted)
    frames = {"offer": offer, "answer": answer, "request": request, "grant": grant}
    return {
        "member_x25519": member.private_bytes_raw().hex(),
        "issuer_x25519": issuer.private_bytes_raw().hex(),
        "clock_s": shown.clock_s,
        "granted_issuers": [der.hex() for der in client.granted(grant).issuers],
        "frames": {name: frame.encoded().hex() for name, frame in frames.items()},
    }


def _hex(chain: Sequence[x509.Certificate]) -> list[str]:
    return [certs.to_der(certificate).hex() for certificate in chain]


def _key(letter: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(letter.encode() * 32)


def _exchange_key(letter: str) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(letter.encode() * 32)


def _root(name: str, letter: str) -> certs.NewGroup:
    with patch.object(certs, "Ed25519PrivateKey", _FixedKey(letter)):
        return certs.create_group(name, now=NOW)


@contextlib.contextmanager
def _counted_serials() -> Iterator[None]:
    numbers = itertools.count(1)
    with patch.object(x509, "random_serial_number", lambda: next(numbers)):
        yield
