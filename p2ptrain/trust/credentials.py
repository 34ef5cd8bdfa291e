"""What a peer shows on every link, and where its secrets are; the key itself is never in here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from p2ptrain.ids import DeviceId, GroupId


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """One device's identity in one group."""

    group: GroupId
    device: DeviceId
    root_pem: str
    """The group's root, or roots while one is rotated: all that links trust."""
    chain_file: str
    """Path of chain.pem: our leaf, then its issuers, without the root."""
    key_file: str
    """Path of device.key."""
    dates_checked: bool = True
    """Whether TLS judges dates by this device's clock; otherwise the objection must, by a time
    that was vouched for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objection:
    """Why a chain that leads to our root is refused all the same."""

    refusal: str
    """What its HELLO is answered with, a refusal of PROTOCOL.md section 3.1."""
    reason: str
    """One phrase for people here."""


Chain = tuple[bytes, ...]
"""DER of a leaf, its issuers and the root, as TLS verified them."""
FindObjection = Callable[[Chain], Objection | None]


def no_objection(chain: Chain) -> Objection | None:
    """What TLS verified is good enough: for groups where nobody was ever revoked."""
    return None
