"""Revocation: who may say it, what it refuses, what stays, and that it cannot be taken back."""

from __future__ import annotations

import dataclasses

import pytest

from p2ptrain.errors import RemoteProtocolError, TrustError
from p2ptrain.trust.chains import UnknownRoot, member_chain
from p2ptrain.trust.revocation import (
    Kept,
    Revocation,
    RevokedKeys,
    check_reason,
    check_revocation,
    decode_revocation,
    encode_revocation,
    revoke,
)
from p2ptrain.wire.codec import decode, encode
from tests.minted_group import NOW, MintedGroup, MintedMember


@pytest.fixture
def group() -> MintedGroup:
    return MintedGroup()


def keys_of(member: MintedMember) -> tuple[str, ...]:
    return member.chain.keys


def check(group: MintedGroup, statement: Revocation) -> None:
    check_revocation(statement, gid=group.gid, roots=[group.made.root])


def test_revoked_device_is_refused_and_everybody_else_is_not(group: MintedGroup) -> None:
    founder = group.founder()
    phone, other = group.admit(founder, "phone"), group.admit(founder, "other")
    statement = group.revoke(phone, by=founder)
    check(group, statement)
    revoked = RevokedKeys([statement])
    assert revoked.against(keys_of(phone)) == statement
    assert revoked.against(keys_of(other)) is None
    assert revoked.against(keys_of(founder)) is None
    assert statement.keys == keys_of(phone)[:2]
    assert (statement.name, statement.by) == ("phone", founder.device)


def test_member_that_may_not_admit_loses_its_own_key_only(group: MintedGroup) -> None:
    founder = group.founder()
    plain = group.admit(founder, "plain", admits=False)
    statement = group.revoke(plain, by=founder)
    assert statement.keys == keys_of(plain)[:1]
    assert RevokedKeys([statement]).against(keys_of(founder)) is None


def test_revoked_issuer_voids_what_it_issued_also_over_others(group: MintedGroup) -> None:
    founder = group.founder()
    stolen = group.admit(founder, "stolen")
    child = group.admit(stolen, "child")
    grandchild = group.admit(child, "grandchild", admits=False)
    revoked = RevokedKeys([group.revoke(stolen, by=founder)])
    for member in (stolen, child, grandchild):
        assert revoked.against(keys_of(member)) is not None


def test_kept_members_stay_and_are_led_around_the_revoked_one(group: MintedGroup) -> None:
    founder = group.founder()
    stolen = group.admit(founder, "stolen")
    child, plain = group.admit(stolen, "child"), group.admit(stolen, "plain", admits=False)
    grandchild, void = group.admit(child, "grandchild"), group.admit(stolen, "void")
    statement = group.revoke(stolen, by=founder, keep=(child, plain))
    check(group, statement)
    revoked = RevokedKeys([statement])
    for member in (child, plain, grandchild):
        assert revoked.against(keys_of(member)) is None
        mended = revoked.mended(member.chain.certificates)
        chain = member_chain(mended, gid=group.gid, roots=[group.made.root])
        assert chain.device == member.device
        assert chain.may_admit == member.chain.may_admit
        assert not set(chain.keys) & set(statement.keys)
        assert revoked.mended(mended) == mended
    assert revoked.against(keys_of(void)) == statement
    assert revoked.mended(void.chain.certificates) == void.chain.certificates


def test_member_may_be_kept_though_the_one_between_is_not(group: MintedGroup) -> None:
    founder = group.founder()
    stolen = group.admit(founder, "stolen")
    between = group.admit(stolen, "between")
    kept = group.admit(between, "kept")
    revoked = RevokedKeys([group.revoke(stolen, by=founder, keep=(kept,))])
    assert revoked.against(keys_of(kept)) is None
    assert revoked.against(keys_of(between)) is not None


def test_founder_can_be_revoked_by_a_member_that_it_admitted(group: MintedGroup) -> None:
    founder = group.founder()
    revoker, other = group.admit(founder, "revoker"), group.admit(founder, "other")
    statement = group.revoke(founder, by=revoker, keep=(revoker, other))
    check(group, statement)
    revoked = RevokedKeys([statement])
    assert revoked.against(keys_of(founder)) == statement
    for member in (revoker, other):
        assert revoked.against(keys_of(member)) is None
    mended = revoked.mended(other.chain.certificates)
    chain = member_chain(mended, gid=group.gid, roots=[group.made.root])
    assert chain.sponsor == revoker.device
    assert revoked.against(chain.keys) is None
    assert revoked.mended(mended) == mended
    assert revoked.mended(revoker.chain.certificates) == revoker.chain.certificates


def test_members_that_revoke_each_other_are_both_out_in_any_order(group: MintedGroup) -> None:
    founder = group.founder()
    a, b = group.admit(founder, "a"), group.admit(founder, "b")
    statements = [group.revoke(a, by=b), group.revoke(b, by=a)]
    for order in (statements, statements[::-1]):
        revoked = RevokedKeys(order)
        assert revoked.against(keys_of(a)) is not None
        assert revoked.against(keys_of(b)) is not None
        assert revoked.against(keys_of(founder)) is None


def test_second_statement_that_does_not_keep_refuses(group: MintedGroup) -> None:
    founder = group.founder()
    other = group.founder("other")
    stolen = group.admit(founder, "stolen")
    child = group.admit(stolen, "child")
    keeps = group.revoke(stolen, by=founder, keep=(child,))
    voids = group.revoke(stolen, by=other)
    assert RevokedKeys([keeps]).against(keys_of(child)) is None
    assert RevokedKeys([keeps, voids]).against(keys_of(child)) == voids


def test_stolen_device_cannot_keep_what_it_makes_for_itself(group: MintedGroup) -> None:
    founder = group.founder()
    stolen = group.admit(founder, "stolen")
    hidden = group.admit(stolen, "hidden")
    honest = group.revoke(stolen, by=founder)
    own = group.revoke(stolen, by=hidden, keep=(hidden,))
    assert RevokedKeys([own, honest]).against(keys_of(hidden)) == honest


def test_the_same_statement_counts_once(group: MintedGroup) -> None:
    founder = group.founder()
    statement = group.revoke(group.admit(founder, "phone"), by=founder)
    revoked = RevokedKeys()
    assert revoked.add(statement)
    assert not revoked.add(statement)
    assert (len(revoked), revoked.statements) == (1, (statement,))
    assert statement.id in revoked
    assert revoked.of_device(statement.device) == statement
    assert revoked.of_device(founder.device) is None


@pytest.mark.parametrize("field", ["reason", "name", "at_s", "device", "keys", "keep", "by"])
def test_changed_statement_does_not_hold(group: MintedGroup, field: str) -> None:
    founder = group.founder()
    phone = group.admit(founder, "phone")
    child = group.admit(phone, "child")
    statement = group.revoke(phone, by=founder, keep=(child,))
    changes: dict[str, object] = {
        "reason": "lost",
        "name": "laptop",
        "at_s": statement.at_s + 1,
        "device": founder.device,
        "keys": founder.chain.own_keys,
        "keep": (),
        "by": phone.device,
    }
    changed = dataclasses.replace(statement, **{field: changes[field]})  # type: ignore[arg-type]  # one field by name
    with pytest.raises(TrustError):
        check(group, changed)


def test_statement_of_another_group_or_of_a_leaf_does_not_hold(group: MintedGroup) -> None:
    founder = group.founder()
    phone = group.admit(founder, "phone")
    stranger = MintedGroup()
    with pytest.raises(UnknownRoot):
        check(stranger, group.revoke(phone, by=founder))
    as_issuer = dataclasses.replace(
        phone.may_sign,
        key=phone.key,
        certificate=phone.chain.certificates[0],
        above=phone.chain.issuers,
    )
    forged = revoke(founder.chain, by=as_issuer, gid=group.gid, reason="revenge", keep=(), now=NOW)
    with pytest.raises(TrustError, match="not an issuer's"):
        check(group, forged)


def test_kept_key_that_the_revoker_did_not_certify_does_not_hold(group: MintedGroup) -> None:
    founder = group.founder()
    phone = group.admit(founder, "phone")
    child = group.admit(phone, "child")
    honest = group.revoke(phone, by=founder, keep=(child,))
    own = child.chain.certificates[1]
    for kept in (
        Kept(key=honest.keep[0].key, certificate=certificate_hex(own)),
        Kept(key="0" * 64, certificate=honest.keep[0].certificate),
    ):
        unsigned = dataclasses.replace(honest, keep=(kept,), signature="")
        signature = founder.may_sign.key.sign(unsigned.signed_bytes).hex()
        with pytest.raises(TrustError, match="keeps"):
            check(group, dataclasses.replace(unsigned, signature=signature))


def certificate_hex(certificate: object) -> str:
    from p2ptrain.trust.certificates import to_der

    return to_der(certificate).hex()  # type: ignore[arg-type]  # a certificate


def test_statement_travels_and_is_stored_unchanged(group: MintedGroup) -> None:
    founder = group.founder()
    statement = group.revoke(group.admit(founder, "phone"), by=founder)
    assert decode(encode(statement)) == statement
    line = encode_revocation(statement)
    assert line.endswith(b"\n")
    assert decode_revocation(line) == statement
    for damaged in (b"", b"{}", line[:-5], b"[" * 100_000):
        with pytest.raises(TrustError, match="damaged"):
            decode_revocation(damaged)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", 2),
        ("group", "x"),
        ("keys", ()),
        ("keys", ("ab",) * 2),
        ("chain", ()),
        ("chain", ("zz",)),
        ("name", "\x1b"),
        ("reason", ""),
        ("at_s", -1),
    ],
)
def test_malformed_statement_is_refused_when_it_is_read(
    group: MintedGroup, field: str, value: object
) -> None:
    founder = group.founder()
    statement = group.revoke(group.admit(founder, "phone"), by=founder)
    import json

    document = json.loads(encode_revocation(statement)) | {field: value}
    with pytest.raises(TrustError):
        decode_revocation(json.dumps(document).encode())
    from p2ptrain.wire.codec import from_plain

    with pytest.raises(RemoteProtocolError):
        from_plain(Revocation, document)


def test_reason_is_one_line() -> None:
    assert check_reason("stolen in Leeds") == "stolen in Leeds"
    for reason in ("", "a\nb", "x" * 201):
        with pytest.raises(ValueError, match="one line"):
            check_reason(reason)
