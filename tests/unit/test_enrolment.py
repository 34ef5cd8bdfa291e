"""The enrolment exchange: who knows the secret gets through, nobody else learns anything."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from p2ptrain.errors import LocalProtocolError, RemoteProtocolError, TrustError
from p2ptrain.trust import enrolment
from p2ptrain.trust.enrolment import (
    EnrolFrame,
    EnrolmentGrant,
    EnrolmentRequest,
    Joiner,
    Sealed,
    Sponsor,
    parse_enrol_prefix,
    refusal,
    with_revocations,
)
from p2ptrain.trust.invite import Invite
from tests.minted_group import MintedGroup

ROOT_HASH = "ab" * 32
REQUEST = EnrolmentRequest(name="beta", device_csr=b"device", issuer_csr=b"issuer")
GRANT = EnrolmentGrant(group_name="home", root=b"root", issuers=(b"a", b"b"), clock_s=1.5)


def invite(secret: str = "01" * 16) -> Invite:
    return Invite(
        group_name="home", addresses=(), root_hash=ROOT_HASH, secret=secret, expires_at_s=1.0
    )


def joiner(secret: str = "01" * 16) -> Joiner:
    return Joiner(invite(secret), X25519PrivateKey.from_private_bytes(b"j" * 32))


def sponsor(root_hash: str = ROOT_HASH) -> Sponsor:
    return Sponsor(X25519PrivateKey.from_private_bytes(b"s" * 32), root_hash=root_hash)


def test_both_sides_that_know_the_secret_complete() -> None:
    ours, theirs = joiner(), sponsor()
    offer = ours.offer()
    assert theirs.invite_id(offer) == invite().id
    answer, their_keys = theirs.answer(offer, invite().shared_key)
    our_keys = ours.agreed(answer)
    request = our_keys.ask(REQUEST)
    assert their_keys.asked(request) == REQUEST
    assert b"beta" not in request.body
    assert our_keys.granted(their_keys.grant(GRANT)) == GRANT


def test_grant_holds_as_many_revocations_as_fit_the_newest_first() -> None:
    group = MintedGroup()
    founder = group.founder()
    stated = []
    for index in range(40):
        group.now += 1
        stated.append(group.revoke(group.admit(founder, f"stolen-{index}"), by=founder))
    grant = with_revocations(GRANT, stated)
    assert 10 < len(grant.revocations) < 40
    assert list(grant.revocations) == stated[: -1 - len(grant.revocations) : -1]
    ours, theirs = agreed()
    assert ours.granted(theirs.grant(grant)) == grant
    assert with_revocations(GRANT, stated[:2]).revocations == (stated[1], stated[0])


def agreed() -> tuple[Sealed, Sealed]:
    """The joiner's and the sponsor's keys after an honest exchange."""
    ours = joiner()
    answer, keys = sponsor().answer(ours.offer(), invite().shared_key)
    return ours.agreed(answer), keys


def test_sponsor_without_the_secret_is_noticed_before_we_say_anything() -> None:
    ours = joiner()
    answer, _ = sponsor().answer(ours.offer(), b"0" * 32)
    with pytest.raises(TrustError, match="does not know"):
        ours.agreed(answer)


def test_sponsor_of_another_root_is_noticed() -> None:
    ours = joiner()
    answer, _ = sponsor(root_hash="cd" * 32).answer(ours.offer(), invite().shared_key)
    with pytest.raises(TrustError, match="does not know"):
        ours.agreed(answer)


def test_joiner_without_the_secret_gets_nothing() -> None:
    _, keys = agreed()
    with pytest.raises(TrustError, match="does not fit"):
        keys.asked(EnrolFrame(kind=enrolment.REQUEST, body=bytes(80)))


@pytest.mark.parametrize("position", [0, 40, -1])
def test_changed_request_is_refused(position: int) -> None:
    ours, theirs = agreed()
    body = bytearray(ours.ask(REQUEST).body)
    body[position] ^= 1
    with pytest.raises(TrustError):
        theirs.asked(EnrolFrame(kind=enrolment.REQUEST, body=bytes(body)))


def test_changed_grant_is_refused() -> None:
    ours, theirs = agreed()
    body = bytearray(theirs.grant(GRANT).body)
    body[3] ^= 1
    with pytest.raises(TrustError, match="changed"):
        ours.granted(EnrolFrame(kind=enrolment.GRANT, body=bytes(body)))


@pytest.mark.parametrize("reason", [*enrolment.REFUSALS, "something new", "\x1b[2J"])
def test_refusal_becomes_a_sentence_of_ours(reason: str) -> None:
    with pytest.raises(TrustError) as caught:
        joiner().agreed(refusal(reason))
    assert caught.value.message == enrolment.REFUSALS.get(reason, "the sponsor refused")


def test_messages_out_of_order_or_of_wrong_size_are_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="out of order"):
        joiner().agreed(joiner().offer())
    with pytest.raises(RemoteProtocolError, match="wrong size"):
        sponsor().answer(EnrolFrame(kind=enrolment.OFFER, body=b"x"), b"0" * 32)


def test_public_key_of_low_order_is_refused() -> None:
    offer = EnrolFrame(kind=enrolment.OFFER, body=bytes(16) + bytes(32))
    with pytest.raises(RemoteProtocolError, match="not usable"):
        sponsor().answer(offer, invite().shared_key)


@pytest.mark.parametrize(
    "prefix",
    [
        b"P2TX\x01\x01\x00\x00",
        b"P2TE\x02\x01\x00\x00",
        b"P2TE\x01\x00\x00\x00",
        b"P2TE\x01\x0e\x00\x00",
        b"P2TE\x01\x01\x01\xc0",
    ],
    ids=["magic", "version", "kind 0", "kind 14", "length"],
)
def test_bad_prefix_is_refused(prefix: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_enrol_prefix(prefix)


def test_prefix_round_trips_and_our_own_size_is_checked() -> None:
    encoded = EnrolFrame(kind=enrolment.GRANT, body=b"abc").encoded()
    assert parse_enrol_prefix(encoded[:8]) == (enrolment.GRANT, 3)
    with pytest.raises(LocalProtocolError):
        EnrolFrame(kind=enrolment.GRANT, body=bytes(48 * 1024 + 1)).encoded()
