"""What the membership machine tells the shell."""

from __future__ import annotations

from dataclasses import dataclass

from p2ptrain.ids import DeviceId
from p2ptrain.membership.record import MemberRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberUp:
    """A peer answers, for the first time or again after it was down."""

    record: MemberRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberDown:
    """A peer is gone, or has restarted; `reason` is a phrase for people."""

    device: DeviceId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberSuspected:
    """A peer is silent or its link broke; it is still counted until it is down."""

    device: DeviceId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SuspicionCleared:
    """A suspected peer answered in time."""

    device: DeviceId


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordChanged:
    """A peer that is up says something new about itself."""

    record: MemberRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressLearned:
    """Somebody knows where a peer without a link to us may be reached: a hint to dial."""

    device: DeviceId
    addresses: tuple[str, ...]


MembershipEvent = (
    MemberUp | MemberDown | MemberSuspected | SuspicionCleared | RecordChanged | AddressLearned
)
