"""Certificates of a group: root, one issuer per admitting member, one leaf per device.

Everything is Ed25519 and follows the table in trust/README.md. Functions are given `now` in
seconds since 1970; only key generation and serial numbers draw from the system's randomness.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from p2ptrain.errors import TrustError
from p2ptrain.ids import DeviceId, GroupId, is_base32

ROOT_LIFE_S: Final = 10 * 365 * 86_400
ISSUER_LIFE_S: Final = 365 * 86_400
"""Of an issuer that another issuer signed. One that the root signed lives as long as the root:
only the root could renew it, and the root's key is locked away."""
LEAF_LIFE_S: Final = 30 * 86_400
BACKDATE_S: Final = 300
"""Certificates begin this long before they are made: clocks of devices differ a little."""
ISSUERS_MAX: Final = 16
"""Longest chain of issuers between a leaf and the root."""
NAME_CHARACTERS_MAX: Final = 40
_MALFORMED: Final = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""What `cryptography` raises for DER that is a certificate on the outside only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Issuer:
    """A key that may sign, its certificate and the issuers above it up to below the root."""

    key: Ed25519PrivateKey
    certificate: x509.Certificate
    above: tuple[x509.Certificate, ...]
    """Nearest first; empty when the root signed this issuer."""

    @property
    def chain(self) -> tuple[x509.Certificate, ...]:
        """What a leaf of this issuer sends after itself."""
        return (self.certificate, *self.above)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewGroup:
    """A group that was just made; `root_key` must leave memory once it is sealed."""

    id: GroupId
    root_key: Ed25519PrivateKey
    root: x509.Certificate


def group_id(root: x509.Certificate) -> GroupId:
    """The id of the group whose root this is."""
    return GroupId(_key_hash(_ed25519(root))[:16])


def device_id(key: Ed25519PublicKey) -> DeviceId:
    """The id of the device that holds this key."""
    return DeviceId(_key_hash(key)[:26])


def certificate_device(certificate: x509.Certificate) -> DeviceId:
    """The id of the device whose leaf this is."""
    return device_id(_ed25519(certificate))


def root_hash(root: x509.Certificate) -> str:
    """Lower-case hex sha256 of the root certificate: what an invite pins."""
    return hashlib.sha256(to_der(root)).hexdigest()


def common_name(certificate: x509.Certificate) -> str:
    """The display name in a certificate; never an identity."""
    attributes = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(attributes[0].value) if attributes else ""


def check_name(name: str) -> str:
    """Return a display name of a group or device if it is one.

    Raises:
        ValueError: empty, too long, or with characters that a terminal may obey.
    """
    if not 1 <= len(name) <= NAME_CHARACTERS_MAX or not name.isprintable() or name != name.strip():
        raise ValueError(f"a name has 1 to {NAME_CHARACTERS_MAX} printable characters")
    if name[0] in ".-" or "/" in name or "\\" in name:
        raise ValueError("a name does not begin with . or - and holds no slash")
    return name


def create_group(name: str, *, now: float) -> NewGroup:
    """Make the root of a new group; ValueError when the name is not one."""
    key = Ed25519PrivateKey.generate()
    subject = _name(f"p2ptrain group {check_name(name)}")
    public = key.public_key()
    builder = _builder(subject, subject, public, now=now, life_s=ROOT_LIFE_S)
    builder = _as_authority(builder)
    root = builder.sign(key, algorithm=None)
    return NewGroup(id=group_id(root), root_key=key, root=root)


def issue_first_issuer(
    group: NewGroup, key: Ed25519PrivateKey, *, device: DeviceId, name: str, now: float
) -> Issuer:
    """An issuer for `device` signed by the root: the founder's, or one made in a recovery."""
    signer = _Signer(key=group.root_key, certificate=group.root, gid=group.id, life_s=ROOT_LIFE_S)
    certificate = _sign_issuer(signer, key.public_key(), issuer_name(name, key), device, now)
    return Issuer(key=key, certificate=certificate, above=())


def issuer_name(name: str, key: Ed25519PrivateKey | Ed25519PublicKey) -> x509.Name:
    """The subject of an issuer's certificate.

    The key's hash keeps every issuer's name different from its signer's: certificates with equal
    subject and issuer count as self-issued, which exempts them from name constraints.
    """
    public = key if isinstance(key, Ed25519PublicKey) else key.public_key()
    return _name(f"{check_name(name)} issuer {_key_hash(public)[:8]}")


def issue_issuer(
    sponsor: Issuer,
    request: x509.CertificateSigningRequest,
    *,
    device: DeviceId,
    gid: GroupId,
    name: str,
    now: float,
) -> x509.Certificate:
    """Let `device` admit others: certify the issuer key that it made.

    Raises:
        TrustError: the request does not prove its key, or the sponsor's chain is at its limit.
    """
    if len(sponsor.chain) >= ISSUERS_MAX:
        raise TrustError(
            "this member was admitted over too many others to admit one more",
            hint="ask a member that joined earlier for the invite",
        )
    public = requested_key(request)
    signer = _Signer(
        key=sponsor.key, certificate=sponsor.certificate, gid=gid, life_s=ISSUER_LIFE_S
    )
    return _sign_issuer(signer, public, issuer_name(name, public), device, now)


def reissue(
    signer_key: Ed25519PrivateKey,
    signer: x509.Certificate,
    former: x509.Certificate,
    *,
    gid: GroupId,
    now: float,
) -> x509.Certificate:
    """Certify the key, name and kind of a member's certificate anew, below another signer.

    What the former certificate's key has signed hangs below the new one as it did below it.

    Raises:
        TrustError: the former certificate is not one of a member of this group.
    """
    constraints = former.extensions.get_extension_for_class(x509.BasicConstraints).value
    if not constraints.ca:
        request = _Asked(key=_ed25519(former), subject=former.subject)
        above = Issuer(key=signer_key, certificate=signer, above=())
        return _sign_leaf(above, request, gid=gid, now=now)
    device = certified_device(former)
    if device is None:
        raise TrustError("an issuer's certificate does not say whose it is")
    life_s = ROOT_LIFE_S if signer.subject == signer.issuer else ISSUER_LIFE_S
    above_it = _Signer(key=signer_key, certificate=signer, gid=gid, life_s=life_s)
    return _sign_issuer(above_it, _ed25519(former), former.subject, device, now)


def certified_device(certificate: x509.Certificate) -> DeviceId | None:
    """The device that a certificate names: of a leaf its own, of an issuer its owner's."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return None
    for uri in names.get_values_for_type(x509.UniformResourceIdentifier):
        device = uri.removeprefix("p2ptrain://").partition(".")[0]
        if is_base32(device, 26):
            return DeviceId(device)
    return None


def issue_leaf(
    issuer: Issuer, request: x509.CertificateSigningRequest, *, gid: GroupId, name: str, now: float
) -> x509.Certificate:
    """Certify a device key for 30 days; TrustError when the request does not prove its key."""
    asked = _Asked(key=requested_key(request), subject=_name(check_name(name)))
    return _sign_leaf(issuer, asked, gid=gid, now=now)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    key: Ed25519PublicKey
    subject: x509.Name


def _sign_leaf(issuer: Issuer, asked: _Asked, *, gid: GroupId, now: float) -> x509.Certificate:
    uri = x509.UniformResourceIdentifier(leaf_uri(device_id(asked.key), gid))
    life_s = min(LEAF_LIFE_S, _seconds_left(issuer.certificate, now))
    builder = _builder(asked.subject, issuer.certificate.subject, asked.key, now=now, life_s=life_s)
    builder = (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage(
                [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
            ),
            critical=False,
        )
        .add_extension(x509.SubjectAlternativeName([uri]), critical=False)
        .add_extension(_authority_key(issuer.certificate), critical=False)
    )
    return builder.sign(issuer.key, algorithm=None)


def request_certificate(key: Ed25519PrivateKey, *, name: str) -> x509.CertificateSigningRequest:
    """Ask for a certificate and prove that we hold the key."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(_name(check_name(name)))
    return builder.sign(key, algorithm=None)


def requested_key(request: x509.CertificateSigningRequest) -> Ed25519PublicKey:
    """The key a request proves; TrustError when it is not Ed25519 or the proof is wrong."""
    key = request.public_key()
    if not isinstance(key, Ed25519PublicKey) or not _is_proved(request):
        raise TrustError("a certificate request does not prove its key")
    return key


def _is_proved(request: x509.CertificateSigningRequest) -> bool:
    try:
        return request.is_signature_valid
    except _MALFORMED:
        return False


def leaf_uri(device: DeviceId, gid: GroupId) -> str:
    """The identity in a leaf, inside the namespace that the group's issuers are held to."""
    return f"p2ptrain://{device}.g-{gid}.p2ptrain.internal"


def peer_identity(leaf_der: bytes, *, gid: GroupId) -> DeviceId:
    """Who presented this leaf, whose chain OpenSSL has already checked up to our root.

    Raises:
        TrustError: no leaf, or its name is not that of its key in our group; close the link.
    """
    try:
        leaf = x509.load_der_x509_certificate(leaf_der)
        device = certificate_device(leaf)
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        constraints = leaf.extensions.get_extension_for_class(x509.BasicConstraints).value
    except (*_MALFORMED, x509.ExtensionNotFound) as error:
        raise TrustError("the peer's certificate is not a device's") from error
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if constraints.ca:
        raise TrustError("the peer's certificate is not a device's")
    if uris != [leaf_uri(device, gid)]:
        raise TrustError("the peer's certificate does not name its key in this group")
    return device


def check_root(root: x509.Certificate, *, now: float) -> GroupId:
    """Check that a root signed itself and is in date; gives its group's id."""
    check_dates(root, now)
    try:
        root.verify_directly_issued_by(root)
    except (InvalidSignature, ValueError, TypeError) as error:
        raise TrustError("the group's root certificate is damaged") from error
    return group_id(root)


def renew_at_s(certificate: x509.Certificate) -> float:
    """When two thirds of a certificate's life are over, seconds since 1970."""
    begins_s = certificate.not_valid_before_utc.timestamp()
    return begins_s + (certificate.not_valid_after_utc.timestamp() - begins_s) * 2 / 3


def needs_renewal(certificate: x509.Certificate, *, now: float) -> bool:
    """Whether two thirds of a certificate's life are over."""
    return now >= renew_at_s(certificate)


def to_pem(*certificates: x509.Certificate) -> bytes:
    """Certificates as PEM, in order."""
    return b"".join(c.public_bytes(serialization.Encoding.PEM) for c in certificates)


def to_der(certificate: x509.Certificate) -> bytes:
    """One certificate as DER."""
    return certificate.public_bytes(serialization.Encoding.DER)


def key_to_pem(key: Ed25519PrivateKey) -> bytes:
    """A private key as unencrypted PKCS#8, for a file only its owner reads."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def key_from_pem(pem: bytes) -> Ed25519PrivateKey:
    """The inverse of `key_to_pem`; TrustError when it is damaged."""
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise TrustError("a private key file is damaged") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise TrustError("a private key file does not hold an Ed25519 key")
    return key


def certificates_from_pem(pem: bytes) -> tuple[x509.Certificate, ...]:
    """Certificates in file order; TrustError when there is none or one is damaged."""
    try:
        return tuple(x509.load_pem_x509_certificates(pem))
    except ValueError as error:
        raise TrustError("a certificate file is damaged") from error


def certificate_from_der(der: bytes) -> x509.Certificate:
    """One certificate that came over the network; TrustError when it is not one.

    Everything that is read of certificates later is read once here, because parts of them are
    looked at lazily, and what is malformed must not surprise anybody afterwards.
    """
    try:
        certificate = x509.load_der_x509_certificate(der)
        _ed25519(certificate)
        certified_device(certificate)
        common_name(certificate)
        if certificate.not_valid_before_utc >= certificate.not_valid_after_utc:
            raise ValueError("it ends before it begins")
    except _MALFORMED as error:
        raise TrustError("what was received is not a certificate") from error
    return certificate


def request_from_der(der: bytes) -> x509.CertificateSigningRequest:
    """One certificate request that came over the network; TrustError when it is not one."""
    try:
        request = x509.load_der_x509_csr(der)
        request.public_key()
        return request
    except _MALFORMED as error:
        raise TrustError("what was received is not a certificate request") from error


def request_to_der(request: x509.CertificateSigningRequest) -> bytes:
    """One certificate request as DER."""
    return request.public_bytes(serialization.Encoding.DER)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Signer:
    key: Ed25519PrivateKey
    certificate: x509.Certificate
    gid: GroupId
    life_s: float
    """The most that it gives to what it signs."""


def _sign_issuer(
    signer: _Signer, public: Ed25519PublicKey, subject: x509.Name, device: DeviceId, now: float
) -> x509.Certificate:
    above = signer.certificate
    life_s = min(signer.life_s, _seconds_left(above, now))
    builder = _as_authority(_builder(subject, above.subject, public, now=now, life_s=life_s))
    inside = x509.UniformResourceIdentifier(f".g-{signer.gid}.p2ptrain.internal")
    owner = x509.UniformResourceIdentifier(leaf_uri(device, signer.gid))
    return (
        builder.add_extension(
            x509.NameConstraints(permitted_subtrees=[inside], excluded_subtrees=None),
            critical=True,
        )
        .add_extension(x509.SubjectAlternativeName([owner]), critical=False)
        .add_extension(_authority_key(above), critical=False)
        .sign(signer.key, algorithm=None)
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, public: Ed25519PublicKey, *, now: float, life_s: float
) -> x509.CertificateBuilder:
    begins = datetime.fromtimestamp(int(now), UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins - timedelta(seconds=BACKDATE_S))
        .not_valid_after(begins + timedelta(seconds=int(life_s)))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _as_authority(builder: x509.CertificateBuilder) -> x509.CertificateBuilder:
    return builder.add_extension(
        x509.BasicConstraints(ca=True, path_length=None), critical=True
    ).add_extension(_key_usage(signs_certificates=True), critical=True)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _authority_key(signer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    identifier = signer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def as_ed25519(certificate: x509.Certificate) -> Ed25519PublicKey:
    """The key of a certificate; ValueError when it is of another kind."""
    return _ed25519(certificate)


def _seconds_left(certificate: x509.Certificate, now: float) -> float:
    left = certificate.not_valid_after_utc.timestamp() - now
    if left <= 0:
        raise TrustError(
            f"the certificate of {common_name(certificate)!r} has expired",
            hint="check this device's clock; otherwise ask a member for a new invite",
        )
    return left


def check_dates(certificate: x509.Certificate, now: float) -> None:
    """TrustError, which says what to do, when a certificate is not valid at `now`."""
    if now < certificate.not_valid_before_utc.timestamp():
        raise TrustError(
            f"the certificate of {common_name(certificate)!r} is not yet valid",
            hint="set this device's clock",
        )
    _seconds_left(certificate, now)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _ed25519(certificate: x509.Certificate) -> Ed25519PublicKey:
    key = certificate.public_key()
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError("not an Ed25519 certificate")
    return key


def _key_hash(key: Ed25519PublicKey) -> str:
    spki = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return base64.b32encode(hashlib.sha256(spki).digest()).decode().lower()
