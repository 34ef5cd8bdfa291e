"""What a peer shows on every link, and where its secrets are; the key itself is never in here."""

from __future__ import annotations

from dataclasses import dataclass

from p2ptrain.ids import DeviceId, GroupId


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """One device's identity in one group."""

    group: GroupId
    device: DeviceId
    root_pem: str
    """The group's root: the only certificate that links trust."""
    chain_file: str
    """Path of chain.pem: our leaf, then its issuers, without the root."""
    key_file: str
    """Path of device.key."""
