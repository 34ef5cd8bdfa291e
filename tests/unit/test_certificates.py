"""Certificates: identity is the key, issuers stay inside their group, chains lead to the root."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256

from p2ptrain.errors import TrustError
from p2ptrain.ids import DeviceId, is_base32
from p2ptrain.trust import certificates as certs
from p2ptrain.trust.chains import check_issuers, member_chain
from p2ptrain.trust.revocation import revoke

NOW = 1_800_000_000.0
ANYBODY = DeviceId("a" * 26)


@dataclass(frozen=True)
class Minted:
    group: certs.NewGroup
    issuer: certs.Issuer
    device_key: Ed25519PrivateKey
    leaf: x509.Certificate


@pytest.fixture
def minted() -> Minted:
    group = certs.create_group("home", now=NOW)
    key = Ed25519PrivateKey.generate()
    issuer = certs.issue_first_issuer(
        group,
        Ed25519PrivateKey.generate(),
        device=certs.device_id(key.public_key()),
        name="a",
        now=NOW,
    )
    request = certs.request_certificate(key, name="a")
    leaf = certs.issue_leaf(issuer, request, gid=group.id, name="a", now=NOW)
    return Minted(group=group, issuer=issuer, device_key=key, leaf=leaf)


def admit(sponsor: certs.Issuer, group: certs.NewGroup) -> certs.Issuer:
    key = Ed25519PrivateKey.generate()
    request = certs.request_certificate(key, name="b")
    made = certs.issue_issuer(sponsor, request, device=ANYBODY, gid=group.id, name="b", now=NOW)
    return certs.Issuer(key=key, certificate=made, above=sponsor.chain)


def test_ids_are_base32_of_the_documented_length(minted: Minted) -> None:
    assert is_base32(minted.group.id, 16)
    assert is_base32(certs.certificate_device(minted.leaf), 26)
    assert certs.certificate_device(minted.leaf) == certs.device_id(minted.device_key.public_key())


def test_leaf_follows_the_table(minted: Minted) -> None:
    extensions = minted.leaf.extensions
    constraints = extensions.get_extension_for_class(x509.BasicConstraints)
    usage = extensions.get_extension_for_class(x509.KeyUsage)
    assert constraints.critical
    assert not constraints.value.ca
    assert usage.critical
    assert usage.value.digital_signature
    assert not usage.value.key_cert_sign
    life = minted.leaf.not_valid_after_utc - minted.leaf.not_valid_before_utc
    assert life.total_seconds() == certs.LEAF_LIFE_S + certs.BACKDATE_S


def test_issuer_is_held_to_its_group(minted: Minted) -> None:
    constraint = minted.issuer.certificate.extensions.get_extension_for_class(x509.NameConstraints)
    names = [name.value for name in constraint.value.permitted_subtrees or []]
    assert constraint.critical
    assert names == [f".g-{minted.group.id}.p2ptrain.internal"]


def test_peer_identity_is_the_hash_of_its_key(minted: Minted) -> None:
    device = certs.peer_identity(certs.to_der(minted.leaf), gid=minted.group.id)
    assert device == certs.device_id(minted.device_key.public_key())


def test_peer_identity_refuses_another_group_a_ca_and_garbage(minted: Minted) -> None:
    other = certs.create_group("other", now=NOW)
    with pytest.raises(TrustError, match="in this group"):
        certs.peer_identity(certs.to_der(minted.leaf), gid=other.id)
    for der in (certs.to_der(minted.issuer.certificate), b"", b"\x30\x03abc"):
        with pytest.raises(TrustError, match="not a device's"):
            certs.peer_identity(der, gid=minted.group.id)


def test_chain_over_three_sponsors_leads_to_the_root(minted: Minted) -> None:
    second = admit(minted.issuer, minted.group)
    third = admit(second, minted.group)
    check_issuers(minted.group.root, third.chain, now=NOW)


def test_chain_without_its_middle_or_from_elsewhere_is_refused(minted: Minted) -> None:
    third = admit(admit(minted.issuer, minted.group), minted.group)
    stranger = certs.create_group("home", now=NOW)
    broken = (third.chain[0], third.chain[2])
    for root, chain in ((minted.group.root, broken), (stranger.root, third.chain)):
        with pytest.raises(TrustError, match="does not lead"):
            check_issuers(root, chain, now=NOW)
    with pytest.raises(TrustError, match="1 to"):
        check_issuers(minted.group.root, (), now=NOW)


@pytest.mark.parametrize(
    ("offset_s", "problem"),
    [(-certs.BACKDATE_S - 1, "not yet valid"), (certs.ROOT_LIFE_S + 1, "expired")],
)
def test_chain_out_of_date_is_refused(minted: Minted, offset_s: float, problem: str) -> None:
    with pytest.raises(TrustError, match=problem):
        check_issuers(minted.group.root, minted.issuer.chain, now=NOW + offset_s)


def test_chain_of_issuers_is_bounded(minted: Minted) -> None:
    issuer = minted.issuer
    for _ in range(certs.ISSUERS_MAX - 1):
        issuer = admit(issuer, minted.group)
    with pytest.raises(TrustError, match="too many"):
        admit(issuer, minted.group)


def test_certificates_do_not_outlive_their_issuer(minted: Minted) -> None:
    second = admit(minted.issuer, minted.group)
    assert lifetime_s(second.certificate) == certs.ISSUER_LIFE_S + certs.BACKDATE_S
    assert lifetime_s(minted.issuer.certificate) == lifetime_s(minted.group.root)
    late = NOW + certs.ISSUER_LIFE_S - 86_400
    request = certs.request_certificate(minted.device_key, name="a")
    leaf = certs.issue_leaf(second, request, gid=minted.group.id, name="a", now=late)
    assert leaf.not_valid_after_utc == second.certificate.not_valid_after_utc
    with pytest.raises(TrustError, match="expired"):
        certs.issue_leaf(second, request, gid=minted.group.id, name="a", now=late + 2 * 86_400)


def lifetime_s(certificate: x509.Certificate) -> float:
    return (certificate.not_valid_after_utc - certificate.not_valid_before_utc).total_seconds()


def test_request_of_another_key_type_is_refused(minted: Minted) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    with pytest.raises(TrustError, match="prove"):
        certs.requested_key(request.sign(key, SHA256()))


def test_request_whose_proof_was_changed_is_refused(minted: Minted) -> None:
    der = bytearray(certs.request_to_der(certs.request_certificate(minted.device_key, name="a")))
    der[-1] ^= 1
    with pytest.raises(TrustError, match="prove"):
        certs.requested_key(certs.request_from_der(bytes(der)))


def test_leaf_is_due_for_renewal_after_two_thirds(minted: Minted) -> None:
    due = certs.renew_at_s(minted.leaf)
    assert due == pytest.approx(NOW + 20 * 86_400, abs=certs.BACKDATE_S)
    assert not certs.needs_renewal(minted.leaf, now=due - 1)
    assert certs.needs_renewal(minted.leaf, now=due)


@pytest.mark.parametrize("name", ["", "a" * 41, "a\nb", "\x1b[2J", " a", "../a", "-rf", ".ssh"])
def test_names_that_could_harm_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        certs.check_name(name)


def test_pem_round_trips_and_damage_is_told(minted: Minted) -> None:
    chain = certs.certificates_from_pem(certs.to_pem(minted.leaf, *minted.issuer.chain))
    key = certs.key_from_pem(certs.key_to_pem(minted.device_key))
    assert chain == (minted.leaf, *minted.issuer.chain)
    assert key.public_key() == minted.device_key.public_key()
    for read in (certs.key_from_pem, certs.certificates_from_pem, certs.certificate_from_der):
        with pytest.raises(TrustError):
            read(b"not one")
    with pytest.raises(TrustError):
        certs.request_from_der(b"not one")


def hostile(minted: Minted, **changes: object) -> x509.Certificate:
    """A leaf that its owner's issuer signed as it liked."""
    key, issuer = minted.device_key, minted.issuer
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, str(changes.get("name", "x")))])
    begins = minted.leaf.not_valid_before_utc
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer.certificate.subject)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(begins)
        .not_valid_after(minted.leaf.not_valid_after_utc)
    )
    for extension in minted.leaf.extensions:
        is_name = isinstance(extension.value, x509.SubjectAlternativeName)
        if is_name and "raw_name" in changes:
            raw = x509.UnrecognizedExtension(extension.oid, changes["raw_name"])  # type: ignore[arg-type]  # bytes
            builder = builder.add_extension(raw, critical=False)
        else:
            builder = builder.add_extension(extension.value, critical=extension.critical)
    return builder.sign(issuer.key, algorithm=None)


@pytest.mark.parametrize("raw_name", [b"", b"\x30\x03\x82\x01", b"\x30\x02\xa3\x00", b"\xff" * 9])
def test_malformed_parts_of_a_certificate_are_found_when_it_arrives(
    minted: Minted, raw_name: bytes
) -> None:
    made = hostile(minted, raw_name=raw_name)
    with pytest.raises(TrustError):
        certs.certificate_from_der(certs.to_der(made))
    with pytest.raises(TrustError):
        certs.peer_identity(certs.to_der(made), gid=minted.group.id)


@pytest.mark.parametrize("name", ["\x1b[2J", "a\nb", "x" * 60, " "])
def test_member_that_gives_itself_an_impossible_name_goes_by_its_id(
    minted: Minted, name: str
) -> None:
    made = hostile(minted, name=name)
    chain = member_chain(
        (made, *minted.issuer.chain), gid=minted.group.id, roots=[minted.group.root]
    )
    assert chain.name == chain.device[:8]
    statement = revoke(
        chain, by=minted.issuer, gid=minted.group.id, reason="no name", keep=(), now=NOW
    )
    assert statement.name == chain.device[:8]
