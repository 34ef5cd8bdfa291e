"""Root rotation: only the root names its successor, and both are trusted until all have moved."""

from __future__ import annotations

import dataclasses

import pytest

from p2ptrain.errors import TrustError
from p2ptrain.trust import certificates as certs
from p2ptrain.trust.chains import MemberChain, member_chain
from p2ptrain.trust.rotation import (
    OldRoot,
    Roots,
    Rotation,
    decode_rotation,
    encode_rotation,
    rotate,
)
from p2ptrain.wire.codec import decode, encode
from tests.minted_group import NOW, MintedGroup, MintedMember


@pytest.fixture
def group() -> MintedGroup:
    return MintedGroup()


def rotated(
    group: MintedGroup, *founders: MintedMember, number: int = 1, old: OldRoot | None = None
) -> tuple[Rotation, OldRoot]:
    new = certs.create_group("home 2", now=NOW)
    before = old or OldRoot(key=group.made.root_key, certificate=group.made.root)
    made = rotate(
        before,
        new,
        gid=group.gid,
        number=number,
        issuers=[founder.chain.issuers[-1] for founder in founders],
        now=NOW,
    )
    return made, OldRoot(key=new.root_key, certificate=new.root)


def moved(group: MintedGroup, roots: Roots, member: MintedMember) -> MemberChain:
    mended = roots.mended(member.chain.certificates)
    return member_chain(mended, gid=group.gid, roots=roots.ever)


def test_everybody_below_a_moved_issuer_moves_along(group: MintedGroup) -> None:
    founder = group.founder()
    member = group.admit(group.admit(founder, "a"), "b")
    rotation, new = rotated(group, founder)
    roots = Roots(group.made.root, [rotation], gid=group.gid)
    for each in (founder, member):
        chain = moved(group, roots, each)
        assert chain.root == new.certificate == roots.current
        assert chain.device == each.device
        assert roots.mended(chain.certificates) == chain.certificates
        assert chain.age_key >= each.chain.age_key


def test_old_root_is_trusted_until_nobody_needs_it_or_time_is_up(group: MintedGroup) -> None:
    rotation, new = rotated(group, group.founder())
    roots = Roots(group.made.root, [rotation], gid=group.gid)
    old = group.made.root
    assert roots.trusted(in_use=[old, new.certificate], now=NOW) == (new.certificate, old)
    assert roots.trusted(in_use=[new.certificate], now=NOW) == (new.certificate,)
    late = rotation.until_s + 1
    assert roots.trusted(in_use=[old, new.certificate], now=late) == (new.certificate,)
    assert rotation.until_s - NOW == certs.LEAF_LIFE_S


def test_roots_may_be_rotated_again(group: MintedGroup) -> None:
    founder = group.founder()
    first, second_root = rotated(group, founder)
    roots = Roots(group.made.root, [first], gid=group.gid)
    between = dataclasses.replace(founder, chain=moved(group, roots, founder))
    second, third_root = rotated(group, between, number=2, old=second_root)
    assert roots.add(second)
    assert not roots.add(second)
    assert moved(group, roots, founder).root == third_root.certificate
    assert roots.ever == (third_root.certificate, second_root.certificate, group.made.root)


def test_rotation_that_the_root_did_not_sign_is_refused(group: MintedGroup) -> None:
    stranger = MintedGroup()
    forged, _ = rotated(
        group, old=OldRoot(key=stranger.made.root_key, certificate=stranger.made.root)
    )
    honest, new = rotated(group, group.founder())
    roots = Roots(group.made.root, gid=group.gid)
    second, _ = rotated(group, number=2, old=new)
    changed = dataclasses.replace(honest, until_s=honest.until_s - 1)
    elsewhere = dataclasses.replace(honest, group="a" * 16)
    for wrong in (forged, second, changed, elsewhere):
        with pytest.raises(TrustError):
            roots.add(wrong)
    assert roots.ever == (group.made.root,)


def test_second_successor_of_one_root_is_refused(group: MintedGroup) -> None:
    founder = group.founder()
    first, _ = rotated(group, founder)
    other, _ = rotated(group, founder)
    roots = Roots(group.made.root, [first], gid=group.gid)
    with pytest.raises(TrustError, match="two different"):
        roots.add(other)


def test_issuer_that_the_new_root_did_not_sign_is_refused(group: MintedGroup) -> None:
    founder = group.founder()
    honest, _ = rotated(group, founder)
    der = certs.to_der(founder.chain.issuers[-1]).hex()
    unsigned = dataclasses.replace(honest, issuers=(der,))
    signature = group.made.root_key.sign(unsigned.signed_bytes).hex()
    with pytest.raises(TrustError):
        Roots(group.made.root, gid=group.gid).add(
            dataclasses.replace(unsigned, signature=signature)
        )


def test_rotation_travels_and_is_stored_unchanged(group: MintedGroup) -> None:
    rotation, _ = rotated(group, group.founder())
    assert decode(encode(rotation)) == rotation
    assert decode_rotation(encode_rotation(rotation)) == rotation
    for damaged in (b"", b"{}", encode_rotation(rotation)[:-9]):
        with pytest.raises(TrustError, match="damaged"):
            decode_rotation(damaged)


@pytest.mark.parametrize(
    "change",
    [{"version": 2}, {"number": 0}, {"until_s": 1}, {"root": ""}, {"issuers": ("ab" * 5000,)}],
)
def test_malformed_rotation_is_refused(group: MintedGroup, change: dict[str, object]) -> None:
    rotation, _ = rotated(group)
    with pytest.raises(ValueError, match=r"."):
        dataclasses.replace(rotation, **change)  # type: ignore[arg-type]  # a table of changes
