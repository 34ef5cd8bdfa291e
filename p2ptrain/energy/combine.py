"""Put the energy of several peers together without counting a shared machine twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from p2ptrain.energy.ledger import Amounts, PhaseAmount, scaled_idle
from p2ptrain.energy.meter import MeterIdentity
from p2ptrain.energy.power_model import split
from p2ptrain.errors import InvariantBroken
from p2ptrain.ids import DeviceId


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerBooking:
    """What one peer booked for a run, and by which meter; peers send each other this."""

    device: DeviceId
    name: str
    amounts: Amounts
    identity: MeterIdentity


@dataclass(frozen=True, slots=True, kw_only=True)
class Combined:
    """Bookings whose idle energy is shared where the meter is; `whole` is their exact sum."""

    peers: tuple[PeerBooking, ...]
    whole: PhaseAmount


def combine(bookings: Sequence[PeerBooking]) -> Combined:
    """Share idle energy among peers on one meter, sorted by device.

    Peers of a run work at the same time, so one machine's idle energy is the largest that any of
    its peers booked, not their sum; it is divided among them as they booked it. Marginal energy
    is each process's own and stays.

    Raises:
        ValueError: a device is booked twice.
        InvariantBroken: the parts do not add up to the whole; a bug.
    """
    if len({one.device for one in bookings}) != len(bookings):
        raise ValueError("a device is booked twice")
    meters: dict[str, list[PeerBooking]] = {}
    for one in sorted(bookings, key=lambda booking: booking.device):
        meters.setdefault(one.identity.meter, []).append(one)
    shared = [peer for group in meters.values() for peer in _share_idle(group)]
    whole = Amounts()
    for one in shared:
        whole = whole.plus(one.amounts)
    expected_uj = sum(_machine_idle_uj(group) for group in meters.values())
    if whole.whole.idle_uj != expected_uj:
        raise InvariantBroken(f"idle energy {whole.whole.idle_uj} uJ, machines {expected_uj} uJ")
    shared.sort(key=lambda booking: booking.device)
    return Combined(peers=tuple(shared), whole=whole.whole)


def _share_idle(group: list[PeerBooking]) -> list[PeerBooking]:
    parts = split(_machine_idle_uj(group), [one.amounts.whole.idle_uj for one in group])
    return [
        replace(one, amounts=scaled_idle(one.amounts, part))
        for one, part in zip(group, parts, strict=True)
    ]


def _machine_idle_uj(group: list[PeerBooking]) -> int:
    return max(one.amounts.whole.idle_uj for one in group)
