"""Certificates stay valid: alone, by asking, after long absence, with a wrong clock."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from p2ptrain import limits
from p2ptrain.net.renew import meet_issuer
from p2ptrain.runtime.credentials import credential_keeper as keeper_module
from p2ptrain.runtime.credentials.revoking import RevokeRequest
from p2ptrain.runtime.peer import Peer
from p2ptrain.store.groups import (
    Group,
    NewMember,
    first_member,
    load_device_key,
    load_group,
    load_issuer,
    store_member,
)
from p2ptrain.store.home import Home, open_home
from p2ptrain.trust import certificates as certs
from p2ptrain.trust.clock import Reading
from p2ptrain.trust.renewal import RENEW_LATE_MAX_S
from tests.memory_group import until
from tests.shell.conftest import MintGroup
from tests.shell.test_peer import opened
from tests.shell.test_trust_peers import again

DAY_S = 86_400.0
MakeHome = Callable[[str], Home]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds between attempts takes a moment."""
    monkeypatch.setattr(limits, "AWAY_RETRY_S", 0.05)
    monkeypatch.setattr(limits, "TRUST_LOOK_S", 0.05)
    monkeypatch.setattr(limits, "TRUST_REFRESH_MIN_S", 0.0)


def plain_member(sponsor: Group, home: Home, *, now: float) -> Group:
    """A member that may not admit, whose leaf its sponsor signed at `now`."""
    key, issuer = Ed25519PrivateKey.generate(), load_issuer(sponsor)
    request = certs.request_certificate(key, name="plain")
    leaf = certs.issue_leaf(issuer, request, gid=sponsor.id, name="plain", now=now)
    chain = (leaf, *issuer.chain)
    member = NewMember(root=sponsor.root, device_key=key, device_name="plain", chain=chain)
    return store_member(home, sponsor.name, member)


def old_group(mint_group: MintGroup, days: float) -> Group:
    """A member whose own issuer was made so long ago; its leaf is as old."""
    (group,) = mint_group(1, now=time.time() - days * DAY_S)
    return group


def fresh_leaf(group: Group) -> None:
    """Give an old member a leaf of today, as if it had run all the time."""
    from p2ptrain.store.groups import renew_leaf

    assert renew_leaf(group, now=time.time())


def begins_s(group: Group) -> float:
    return again(group).chain[0].not_valid_before_utc.timestamp()


async def test_member_that_may_not_admit_renews_by_asking_a_linked_one(
    mint_group: MintGroup, make_home: MakeHome
) -> None:
    sponsor = old_group(mint_group, 40)
    fresh_leaf(sponsor)
    plain = plain_member(sponsor, make_home("plain"), now=time.time() - 25 * DAY_S)
    before_s = begins_s(plain)
    async with opened(again(sponsor)) as first, opened(plain, peers=first.addresses()) as second:
        await until(lambda: begins_s(plain) > before_s + 20 * DAY_S)
        # What it shows from now on is the fresh one, and the link stayed.
        await until(lambda: second.trust.group.chain == again(plain).chain)
        assert first.links.devices() == (plain.device,)
        roster = first.trust._machine.machine.roster
        await until(lambda: roster.get(plain.device).certificates == again(plain).chain)  # type: ignore[union-attr]  # it is there
        assert not (plain.folder / "issuer.key").exists()


async def test_member_away_for_longer_than_its_leaf_comes_back_through_an_issuer(
    mint_group: MintGroup, make_home: MakeHome
) -> None:
    sponsor = old_group(mint_group, 60)
    fresh_leaf(sponsor)
    plain = plain_member(sponsor, make_home("plain"), now=time.time() - 45 * DAY_S)
    async with opened(again(sponsor)) as first, opened(plain, peers=first.addresses()) as second:
        await until(lambda: second.links.devices() == (sponsor.device,))
        assert not second.trust.away
        assert second.trust.notices == ()
    assert begins_s(plain) > time.time() - 3600


async def test_member_that_may_admit_renews_alone_when_nobody_answers(
    mint_group: MintGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "AWAY_ALONE_S", 0.1)
    group = old_group(mint_group, 45)
    async with opened(group, peers=("127.0.0.1:1",)) as peer:
        assert peer.trust.away
        assert "certificate is out of date" in str(peer.status().alone_because)
        await until(lambda: not peer.trust.away)
    assert begins_s(group) > time.time() - 3600


async def test_two_members_that_were_both_away_find_each_other_again(
    mint_group: MintGroup,
) -> None:
    one, two = mint_group(2, now=time.time() - 45 * DAY_S)
    async with opened(one) as first, opened(two, peers=first.addresses()) as second:
        await until(lambda: second.links.devices() == (one.device,))


async def test_issuer_that_is_due_is_certified_again_by_a_linked_member(
    mint_group: MintGroup, make_home: MakeHome
) -> None:
    sponsor = old_group(mint_group, 300)
    fresh_leaf(sponsor)
    member = admitted(sponsor, make_home("member"), now=time.time() - 300 * DAY_S)
    fresh_leaf(member)
    ends_s = load_issuer(member).certificate.not_valid_after_utc.timestamp()
    key = load_issuer(member).key.public_key()
    async with opened(again(sponsor)) as first, opened(member, peers=first.addresses()):
        await until(
            lambda: load_issuer(member).certificate.not_valid_after_utc.timestamp() > ends_s
        )
    renewed = load_issuer(member)
    assert renewed.key.public_key() == key
    assert renewed.certificate.not_valid_after_utc.timestamp() > time.time() + 360 * DAY_S
    assert again(member).chain[1] == renewed.certificate


async def test_issuer_that_ran_out_while_away_is_certified_again(
    mint_group: MintGroup, make_home: MakeHome
) -> None:
    sponsor = old_group(mint_group, 400)
    fresh_leaf(sponsor)
    member = admitted(sponsor, make_home("member"), now=time.time() - 380 * DAY_S)
    async with opened(again(sponsor)) as first, opened(member, peers=first.addresses()) as second:
        await until(lambda: second.links.devices() == (sponsor.device,))
    assert load_issuer(member).certificate.not_valid_after_utc.timestamp() > time.time()


def admitted(sponsor: Group, home: Home, *, now: float) -> Group:
    """A member with an issuer of its own that its sponsor signed at `now`."""
    device_key, key = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    above = load_issuer(sponsor)
    certificate = certs.issue_issuer(
        above,
        certs.request_certificate(key, name="member"),
        device=certs.device_id(device_key.public_key()),
        gid=sponsor.id,
        name="member",
        now=now,
    )
    member = NewMember(
        root=sponsor.root,
        device_key=device_key,
        device_name="member",
        issuer=certs.Issuer(key=key, certificate=certificate, above=above.chain),
        now_s=now,
    )
    return store_member(home, sponsor.name, member)


@pytest.mark.parametrize(("days", "said"), [(45, "was revoked"), (500, "away for too long")])
async def test_revoked_member_and_one_away_for_too_long_do_not_come_back(
    mint_group: MintGroup, make_home: MakeHome, days: float, said: str
) -> None:
    sponsor = old_group(mint_group, 600)
    fresh_leaf(sponsor)
    assert 500 * DAY_S > RENEW_LATE_MAX_S + certs.LEAF_LIFE_S
    plain = plain_member(sponsor, make_home("plain"), now=time.time() - days * DAY_S)
    async with opened(again(sponsor)) as first:
        if days < 100:
            first.trust._machine.machine.roster.add(chain_of(plain))
            await first.trust.revoke(RevokeRequest(device=plain.device, reason="stolen"))
        async with opened(plain, peers=first.addresses()) as second:
            await until(lambda: any(said in notice for notice in second.trust.notices))
            assert second.trust.away
            assert second.links.devices() == ()


def chain_of(group: Group) -> certs.x509.Certificate:
    from p2ptrain.trust.chains import member_chain

    return member_chain(group.chain, gid=group.id, roots=[group.root])  # type: ignore[return-value]  # a chain


class WrongClocks:
    """Every peer of this process believes in a time that is off, as the certificates are."""

    def __init__(self, off_s: float) -> None:
        self.off_s = off_s

    def __call__(self) -> Reading:
        reading = keeper_module.read_clocks()
        return dataclasses.replace(reading, wall_s=reading.wall_s + self.off_s)


@contextlib.asynccontextmanager
async def by_its_own_time(group: Group, off_s: float) -> AsyncIterator[Peer]:
    """A peer that lives so much later than this machine's clock says, and knows it."""
    async with opened(group) as peer:
        keeper = peer.trust._keeper
        reading = keeper_module.read_clocks()
        keeper.clock.vouch(reading.wall_s + off_s, by="the test", reading=reading)
        await until(lambda: not keeper.away)
        await keeper.look()
        yield peer


async def test_device_whose_clock_is_behind_is_told_and_joins_by_an_issuers_time(
    make_home: MakeHome,
) -> None:
    """The whole group lives 90 days from now: to it, this machine has no battery clock."""
    off_s = 90 * DAY_S
    later_s = time.time() + off_s
    made = certs.create_group("later", now=later_s - 40 * DAY_S)
    groups = []
    for name in ("right", "wrong"):
        member = first_member(made, name, now=later_s)
        groups.append(
            store_member(make_home(name), "later", dataclasses.replace(member, now_s=later_s))
        )
    right, wrong = groups
    async with by_its_own_time(right, off_s) as first, opened(wrong) as second:
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert second.trust.away
        (told, out) = second.trust.notices
        assert "this device's clock is wrong" in told
        assert "days behind it" in told
        assert "no issuer was found" in out
        second._dial_hint(first.addresses()[0])
        await until(lambda: second.links.devices() == (right.device,))
        (told,) = second.trust.notices
        assert "90 days behind that of right, whose time is used" in told
        assert second.trust.now() == pytest.approx(later_s, abs=600)


async def test_members_in_vouched_time_still_judge_dates(make_home: MakeHome) -> None:
    """TLS does not look at dates then, so the objection must."""
    off_s = 90 * DAY_S
    later_s = time.time() + off_s
    made = certs.create_group("later", now=later_s - 100 * DAY_S)
    member = dataclasses.replace(first_member(made, "right", now=later_s), now_s=later_s)
    right = store_member(make_home("right"), "later", member)
    old_s = later_s - 60 * DAY_S
    expired = dataclasses.replace(first_member(made, "old", now=old_s), now_s=old_s)
    old = store_member(make_home("old"), "later", expired)
    async with by_its_own_time(right, off_s) as first:
        objection = first.trust.objection(
            tuple(certs.to_der(each) for each in (*old.chain, old.root))
        )
        assert objection is not None
        assert objection.refusal == "dates"
        assert "has expired" in objection.reason
        good = tuple(certs.to_der(each) for each in (*right.chain, right.root))
        assert first.trust.objection(good) is None


async def test_member_that_is_not_yet_valid_raises_doubt_and_the_later_time_wins(
    make_home: MakeHome,
) -> None:
    off_s = 3 * DAY_S
    later_s = time.time() + off_s
    made = certs.create_group("both", now=time.time() - DAY_S)
    now_s = time.time()
    behind = store_member(make_home("behind"), "both", first_member(made, "behind", now=now_s))
    member = first_member(made, "ahead", now=now_s)
    ahead = store_member(make_home("ahead"), "both", dataclasses.replace(member, now_s=later_s))
    async with (
        by_its_own_time(ahead, off_s) as first,
        opened(behind, peers=first.addresses()) as second,
    ):
        await until(lambda: second.links.devices() == (ahead.device,))
        (told,) = second.trust.notices
        assert "3 days behind that of ahead" in told


async def test_time_alone_can_be_had_and_certifies_nothing(mint_group: MintGroup) -> None:
    one, two = mint_group(2)
    async with opened(one) as first:
        identity = keeper_module._identity(two)
        met = await meet_issuer(first.addresses()[0], identity, lambda clock_s, by: None)
    assert met.granted is None
    assert met.by == one.device_name
    assert met.clock_s == pytest.approx(time.time(), abs=30)
    assert load_device_key(two).public_key() == identity.key.public_key()
    assert load_group(open_home(two.folder.parents[1]), two.id).chain == two.chain
