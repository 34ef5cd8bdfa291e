"""The renewal exchange: an issuer vouches for the time, a member proves its key, no key changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from p2ptrain.errors import LocalProtocolError, RemoteProtocolError, TrustError
from p2ptrain.trust import certificates as certs
from p2ptrain.trust import enrolment
from p2ptrain.trust.chains import check_in_date
from p2ptrain.trust.enrolment import EnrolFrame, refusal
from p2ptrain.trust.renewal import (
    RENEW_LATE_MAX_S,
    IssuerShown,
    RenewalClient,
    RenewalGranted,
    RenewalServer,
    renew,
    renewed_chain,
)
from p2ptrain.trust.revocation import RevokedKeys
from p2ptrain.trust.rotation import Roots
from tests.minted_group import NOW, MintedGroup, MintedMember

LATER = NOW + 60 * 86_400
NOBODY = RevokedKeys()


@pytest.fixture
def group() -> MintedGroup:
    return MintedGroup()


def roots(group: MintedGroup) -> Roots:
    return Roots(group.made.root, gid=group.gid)


def client(group: MintedGroup) -> RenewalClient:
    return RenewalClient(group.gid, X25519PrivateKey.generate())


def server(group: MintedGroup, issuer: MintedMember) -> RenewalServer:
    return RenewalServer(group.gid, issuer.may_sign, X25519PrivateKey.generate())


def csr(key: Ed25519PrivateKey) -> bytes:
    return certs.request_to_der(certs.request_certificate(key, name="x"))


def meet(
    group: MintedGroup, issuer: MintedMember, *, now: float = LATER
) -> tuple[RenewalClient, RenewalServer, IssuerShown]:
    ours, theirs = client(group), server(group, issuer)
    answer = theirs.answer(ours.offer(), rotations=(), now=now)
    return ours, theirs, ours.met(answer, roots=roots(group), revoked=NOBODY)


def ask(ours: RenewalClient, member: MintedMember, *, with_issuer: bool = False) -> EnrolFrame:
    return ours.ask(
        member.chain,
        member.key,
        device_csr=csr(member.key),
        issuer_csr=csr(member.may_sign.key) if with_issuer else b"",
    )


def test_member_that_was_away_gets_a_leaf_and_the_time(group: MintedGroup) -> None:
    founder = group.founder()
    away = group.admit(founder, "away", admits=False)
    ours, theirs, shown = meet(group, founder)
    assert shown.clock_s == LATER
    chain, asked = theirs.asked(ask(ours, away), roots=roots(group), revoked=NOBODY, now=LATER)
    assert chain.device == away.device
    granted = renew(
        founder.may_sign, chain, gid=group.gid, device_csr=asked.device_csr, issuer_csr=b"",
        now=LATER,
    )  # fmt: skip
    fresh = renewed_chain(
        ours.granted(theirs.grant(granted)), away.chain, gid=group.gid, roots=roots(group)
    )
    check_in_date(fresh, now=LATER)
    assert certs.certificate_device(fresh[0]) == away.device
    assert certs.common_name(fresh[0]) == "away"


def test_issuer_that_ran_out_is_certified_again_with_its_own_key(group: MintedGroup) -> None:
    founder = group.founder()
    away = group.admit(founder, "away")
    late = NOW + 380 * 86_400
    ours, theirs, _ = meet(group, founder, now=late)
    chain, asked = theirs.asked(
        ask(ours, away, with_issuer=True), roots=roots(group), revoked=NOBODY, now=late
    )
    granted = renew(
        founder.may_sign, chain, gid=group.gid, device_csr=asked.device_csr,
        issuer_csr=asked.issuer_csr, now=late,
    )  # fmt: skip
    fresh = renewed_chain(granted, away.chain, gid=group.gid, roots=roots(group))
    check_in_date(fresh, now=late)
    assert certs.as_ed25519(fresh[0]) == away.may_sign.key.public_key()
    assert certs.certified_device(fresh[0]) == away.device


def test_stranger_that_answers_is_not_believed(group: MintedGroup) -> None:
    impostor = MintedGroup()
    impostor.made = dataclasses.replace(impostor.made, id=group.gid)
    founder = impostor.founder()
    ours, theirs = client(group), server(group, founder)
    answer = theirs.answer(ours.offer(), rotations=(), now=LATER)
    with pytest.raises(TrustError, match="does not lead"):
        ours.met(answer, roots=roots(group), revoked=NOBODY)


def test_recorded_answer_vouches_for_nothing(group: MintedGroup) -> None:
    founder = group.founder()
    recorded = server(group, founder).answer(client(group).offer(), rotations=(), now=NOW)
    with pytest.raises(TrustError, match="signed by somebody else"):
        client(group).met(recorded, roots=roots(group), revoked=NOBODY)


def test_time_that_was_changed_on_its_way_is_refused(group: MintedGroup) -> None:
    ours, theirs = client(group), server(group, group.founder())
    answer = theirs.answer(ours.offer(), rotations=(), now=LATER)
    from p2ptrain.wire.codec import to_plain, unpack_map

    fields = unpack_map(answer.body[32:], bytes_max=60_000)
    fields["clock_s"] = LATER - 100
    import msgpack

    changed = answer.body[:32] + msgpack.packb(to_plain(fields), use_bin_type=True)
    with pytest.raises(TrustError, match="signed by somebody else"):
        ours.met(
            EnrolFrame(kind=enrolment.RENEW_ANSWER, body=changed),
            roots=roots(group),
            revoked=NOBODY,
        )


def test_revoked_or_outdated_issuer_may_not_vouch(group: MintedGroup) -> None:
    founder = group.founder()
    stolen = group.admit(founder, "stolen")
    revoked = RevokedKeys([group.revoke(stolen, by=founder)])
    ours, theirs = client(group), server(group, stolen)
    answer = theirs.answer(ours.offer(), rotations=(), now=LATER)
    with pytest.raises(TrustError, match="was revoked"):
        ours.met(answer, roots=roots(group), revoked=revoked)
    late = NOW + 400 * 86_400
    ours, theirs = client(group), server(group, stolen)
    answer = theirs.answer(ours.offer(), rotations=(), now=late)
    with pytest.raises(TrustError, match="has expired"):
        ours.met(answer, roots=roots(group), revoked=NOBODY)


def refused_as(reason: str, call: Callable[[], object]) -> None:
    with pytest.raises(TrustError) as caught:
        call()
    assert caught.value.message == reason
    assert reason in enrolment.REFUSALS


def test_revoked_member_and_one_away_for_too_long_are_refused(group: MintedGroup) -> None:
    founder = group.founder()
    away = group.admit(founder, "away", admits=False)
    revoked = RevokedKeys([group.revoke(away, by=founder)])
    ours, theirs, _ = meet(group, founder)
    request = ask(ours, away)
    refused_as(
        "revoked", lambda: theirs.asked(request, roots=roots(group), revoked=revoked, now=LATER)
    )
    late = away.chain.ends_s + RENEW_LATE_MAX_S + 1
    refused_as("late", lambda: theirs.asked(request, roots=roots(group), revoked=NOBODY, now=late))


def test_whoever_has_a_chain_but_not_its_key_is_refused(group: MintedGroup) -> None:
    founder = group.founder()
    away = group.admit(founder, "away", admits=False)
    thief = dataclasses.replace(away, key=Ed25519PrivateKey.generate())
    ours, theirs, _ = meet(group, founder)
    request = ask(ours, thief)
    refused_as(
        "confirmation",
        lambda: theirs.asked(request, roots=roots(group), revoked=NOBODY, now=LATER),
    )
    stranger = MintedGroup().founder()
    request = ask(ours, stranger)
    refused_as(
        "confirmation",
        lambda: theirs.asked(request, roots=roots(group), revoked=NOBODY, now=LATER),
    )


def test_nobody_gets_another_key_or_another_right_certified(group: MintedGroup) -> None:
    founder = group.founder()
    plain, member = group.admit(founder, "plain", admits=False), group.admit(founder, "member")
    other = csr(Ed25519PrivateKey.generate())
    attempts = [
        (plain, other, b""),
        (plain, csr(plain.key), other),
        (plain, csr(plain.key), csr(founder.may_sign.key)),
        (member, csr(member.key), other),
    ]
    for who, device_csr, issuer_csr in attempts:
        with pytest.raises(TrustError, match="asks for"):
            renew(
                founder.may_sign, who.chain, gid=group.gid, device_csr=device_csr,
                issuer_csr=issuer_csr, now=LATER,
            )  # fmt: skip


def test_what_was_certified_for_others_is_not_taken(group: MintedGroup) -> None:
    founder = group.founder()
    plain, member = group.admit(founder, "plain", admits=False), group.admit(founder, "member")
    others = RenewalGranted(issuers=member.chain.to_der()[1:], leaf=member.chain.to_der()[0])
    with pytest.raises(TrustError, match="another device's"):
        renewed_chain(others, plain.chain, gid=group.gid, roots=roots(group))
    issuer = RenewalGranted(issuers=founder.chain.to_der()[1:])
    with pytest.raises(TrustError, match="another issuer's"):
        renewed_chain(issuer, member.chain, gid=group.gid, roots=roots(group))


def test_request_that_was_changed_on_its_way_is_refused(group: MintedGroup) -> None:
    founder = group.founder()
    ours, theirs, _ = meet(group, founder)
    body = bytearray(ask(ours, group.admit(founder, "away", admits=False)).body)
    body[50] ^= 1
    changed = EnrolFrame(kind=enrolment.RENEW_REQUEST, body=bytes(body))
    refused_as(
        "confirmation",
        lambda: theirs.asked(changed, roots=roots(group), revoked=NOBODY, now=LATER),
    )


def test_messages_out_of_order_and_of_other_groups_are_refused(group: MintedGroup) -> None:
    founder = group.founder()
    with pytest.raises(RemoteProtocolError, match="another group"):
        server(group, founder).answer(client(MintedGroup()).offer(), rotations=(), now=NOW)
    with pytest.raises(RemoteProtocolError):
        client(group).met(client(group).offer(), roots=roots(group), revoked=NOBODY)
    with pytest.raises(TrustError, match="away for too long"):
        client(group).met(refusal("late"), roots=roots(group), revoked=NOBODY)
    with pytest.raises(LocalProtocolError):
        client(group).granted(EnrolFrame(kind=enrolment.RENEW_GRANT, body=b""))
    with pytest.raises(LocalProtocolError):
        server(group, founder).grant(RenewalGranted(issuers=()))


@pytest.mark.parametrize("clock_s", [float("nan"), float("inf"), -1.0, 2.0**41])
def test_what_no_clock_shows_is_not_taken_for_the_time(clock_s: float) -> None:
    with pytest.raises(ValueError, match="time"):
        IssuerShown(issuers=(), rotations=(), clock_s=clock_s, signature=b"")
