"""What the membership machine tells the shell."""

from __future__ import annotations

from dataclasses import dataclass

from p2ptrain.ids import DeviceId
from p2ptrain.membership.record import MemberRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberUp:
    """A peer answers over its link, for the first time or again after it was down."""

    record: MemberRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberDown:
    """A peer is gone, has restarted, or cannot be talked to; `reason` is a phrase for people.

    `kind` is one of `accusation.KINDS`: only `refused` is a sure death, `left` was announced, and
    a peer that is `cut off` is alive for others.
    """

    device: DeviceId
    reason: str
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberSuspected:
    """A peer is silent or its link broke; it is still counted until it is down."""

    device: DeviceId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SuspicionCleared:
    """A suspected peer answered in time, us or somebody we asked."""

    device: DeviceId


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordChanged:
    """A peer that is up says something new about itself."""

    record: MemberRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberWasAway:
    """A peer says that it was suspended: what looked like a death was a leave, and it is back."""

    device: DeviceId
    away_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressLearned:
    """Where a peer without a link to us may be reached, while we want more links: dial it."""

    device: DeviceId
    addresses: tuple[str, ...]


MembershipEvent = (
    MemberUp
    | MemberDown
    | MemberSuspected
    | SuspicionCleared
    | RecordChanged
    | MemberWasAway
    | AddressLearned
)
