"""What peers say to each other about trust; `Revocation` and `Rotation` are messages themselves."""

from __future__ import annotations

from dataclasses import dataclass

from p2ptrain import limits
from p2ptrain.ids import is_base32, is_digest
from p2ptrain.trust.certificates import ISSUERS_MAX
from p2ptrain.wire.codec import message


@message("trust.summary")
@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A hash over all that the sender knows about trust: equal ones need no more words."""

    digest: str


@message("trust.known")
@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What the sender holds, so that the other side sends what is missing."""

    rotations: int
    """How many."""
    revocations: tuple[str, ...]
    """Their ids."""
    chains: dict[str, str]
    """Device id -> hash of the newest chain of that device."""
    reply_wanted: bool = False
    """Whether the other side should say what it holds, too."""

    def __post_init__(self) -> None:
        if len(self.revocations) > limits.REVOCATIONS_MAX or len(self.chains) > limits.ROSTER_MAX:
            raise ValueError("more than a group can hold")
        if not all(map(is_digest, (*self.revocations, *self.chains.values()))):
            raise ValueError("an id is not a hash")
        if not all(is_base32(device, 26) for device in self.chains):
            raise ValueError("a device id is not one")


@message("trust.chain")
@dataclass(frozen=True, slots=True, kw_only=True)
class ChainShown:
    """The certificates of one member (DER), leaf first, without the root."""

    certificates: tuple[bytes, ...]

    def __post_init__(self) -> None:
        if not 2 <= len(self.certificates) <= ISSUERS_MAX + 1:
            raise ValueError("a chain has a leaf and 1 to 16 issuers")
        if any(len(der) > limits.CERTIFICATE_BYTES_MAX for der in self.certificates):
            raise ValueError("a certificate is too large")


@message("trust.renew")
@dataclass(frozen=True, slots=True, kw_only=True)
class RenewAsked:
    """Certify my keys again; the link proves who asks."""

    request: int
    """Repeated in the answer."""
    device_csr: bytes
    issuer_csr: bytes = b""
    """Empty: a leaf; otherwise the issuer key that the sender shows."""

    def __post_init__(self) -> None:
        if max(len(self.device_csr), len(self.issuer_csr)) > limits.CERTIFICATE_BYTES_MAX:
            raise ValueError("a request is too large")


@message("trust.renewed")
@dataclass(frozen=True, slots=True, kw_only=True)
class RenewAnswered:
    """The fresh certificates (DER), or none: ask another member."""

    request: int
    issuers: tuple[bytes, ...] = ()
    leaf: bytes = b""

    def __post_init__(self) -> None:
        if len(self.issuers) > ISSUERS_MAX or any(
            len(der) > limits.CERTIFICATE_BYTES_MAX for der in (self.leaf, *self.issuers)
        ):
            raise ValueError("too many or too large certificates")
