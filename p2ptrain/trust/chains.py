"""A member's chain of certificates: whose it is, what keys it stands on, whether it holds."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization

from p2ptrain.errors import TrustError
from p2ptrain.ids import DeviceId, GroupId, short
from p2ptrain.trust import certificates as certs


class UnknownRoot(TrustError):
    """The chain of issuers does not lead to the group's root."""


def key_fingerprint(certificate: x509.Certificate) -> str:
    """Hex sha256 of a certificate's SubjectPublicKeyInfo: what a revocation names."""
    spki = certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(spki).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberChain:
    """A leaf and the issuers above it, nearest first, without the root."""

    certificates: tuple[x509.Certificate, ...]
    device: DeviceId
    root: x509.Certificate
    """The root that it leads to."""
    generation: int = 0
    """How many rotations came before that root."""

    @property
    def name(self) -> str:
        """What people call the device; for display only.

        A member signs its own leaf and may write anything there: what is no name, and could keep
        a statement about it from being valid, is replaced by the beginning of its id.
        """
        name = certs.common_name(self.certificates[0])
        try:
            return certs.check_name(name)
        except ValueError:
            return short(self.device)

    @property
    def issuers(self) -> tuple[x509.Certificate, ...]:
        """What may have signed others, nearest first."""
        return self.certificates[1:]

    @property
    def keys(self) -> tuple[str, ...]:
        """Fingerprints, the leaf's first."""
        return tuple(map(key_fingerprint, self.certificates))

    @property
    def may_admit(self) -> bool:
        """Whether the leaf hangs below an issuer of the same device."""
        return certs.certified_device(self.issuers[0]) == self.device

    @property
    def own_keys(self) -> tuple[str, ...]:
        """Fingerprints of the keys that the device itself holds."""
        return self.keys[:2] if self.may_admit else self.keys[:1]

    @property
    def sponsor(self) -> DeviceId | None:
        """The member that admitted this one; None: the root did."""
        above = self.issuers[1:] if self.may_admit else self.issuers
        return certs.certified_device(above[0]) if above else None

    @property
    def begins_s(self) -> float:
        """From when on all of it is valid."""
        return max(c.not_valid_before_utc.timestamp() for c in self.certificates)

    @property
    def ends_s(self) -> float:
        """Until when all of it is valid."""
        return min(c.not_valid_after_utc.timestamp() for c in self.certificates)

    @property
    def age_key(self) -> tuple[float, ...]:
        """The larger, the newer: leaf first, then what it hangs on."""
        return tuple(c.not_valid_before_utc.timestamp() for c in self.certificates)

    def to_der(self) -> tuple[bytes, ...]:
        """As it travels."""
        return tuple(map(certs.to_der, self.certificates))


def read_chain(
    chain: Sequence[bytes], *, gid: GroupId, roots: Sequence[x509.Certificate]
) -> MemberChain:
    """Read a chain that came from anywhere, leaf first, without the root.

    Signatures, kinds and names are checked; dates are not: see `check_in_date`.

    Args:
        roots: All that the group ever had as far as it is known here, the newest first.

    Raises:
        TrustError: it is not one of a member of this group.
    """
    read = tuple(certs.certificate_from_der(der) for der in chain)
    if not read:
        raise TrustError("an empty chain of certificates")
    return member_chain(read, gid=gid, roots=roots)


def member_chain(
    chain: Sequence[x509.Certificate], *, gid: GroupId, roots: Sequence[x509.Certificate]
) -> MemberChain:
    """The same for certificates that were read already."""
    device = certs.peer_identity(certs.to_der(chain[0]), gid=gid)
    root = root_of(chain[1:], roots)
    _check_signed(chain[0], chain[1])
    generation = len(roots) - 1 - list(roots).index(root)
    return MemberChain(certificates=tuple(chain), device=device, root=root, generation=generation)


def root_of(
    issuers: Sequence[x509.Certificate], roots: Sequence[x509.Certificate]
) -> x509.Certificate:
    """The root that issuers, nearest to the leaf first, lead to; by signatures and kinds.

    Raises:
        UnknownRoot: none of these; a rotation that we have not heard of may explain that.
        TrustError: something between is not an issuer.
    """
    if not 1 <= len(issuers) <= certs.ISSUERS_MAX:
        raise TrustError(f"a chain has 1 to {certs.ISSUERS_MAX} issuers")
    for certificate, signer in itertools.pairwise(issuers):
        _check_signed(certificate, signer)
    for certificate in issuers:
        _check_authority(certificate)
    for root in roots:
        if _is_signed(issuers[-1], root):
            return root
    raise UnknownRoot


def check_in_date(chain: Sequence[x509.Certificate], *, now: float) -> None:
    """TrustError naming the first certificate that is not valid at `now`."""
    for certificate in chain:
        certs.check_dates(certificate, now)


def check_issuers(
    root: x509.Certificate, issuers: Sequence[x509.Certificate], *, now: float
) -> None:
    """Check issuers, nearest to the leaf first, up to one root: signatures, kinds and dates.

    For a joiner, before it keeps them; on a link OpenSSL does this.

    Raises:
        TrustError: a link of the chain does not hold; nothing of it may be used.
    """
    root_of(issuers, (root,))
    check_in_date((root, *issuers), now=now)


def _check_signed(certificate: x509.Certificate, signer: x509.Certificate) -> None:
    if not _is_signed(certificate, signer):
        raise TrustError("the chain of issuers does not lead to the group's root")


@functools.lru_cache(maxsize=1024)
def _is_signed(certificate: x509.Certificate, signer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(signer)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def _check_authority(certificate: x509.Certificate) -> None:
    """TrustError for a leaf, or anything else, in an issuer's place."""
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except (ValueError, x509.ExtensionNotFound) as error:
        raise TrustError("a certificate in the chain is not an issuer's") from error
    if not constraints.ca or not usage.key_cert_sign:
        raise TrustError("a certificate in the chain is not an issuer's")
