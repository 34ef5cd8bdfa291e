"""Turn the peers' bookings into the energy report that people and programs read."""

from __future__ import annotations

from collections.abc import Sequence

from p2ptrain.energy.combine import PeerBooking, combine
from p2ptrain.energy.ledger import PhaseAmount
from p2ptrain.runtime.reports import EnergyReport, PeerEnergy, PhaseEnergy
from p2ptrain.units import NS_PER_S, UJ_PER_J


def energy_report(
    bookings: Sequence[PeerBooking],
    *,
    samples: int | None = None,
    predicted_joules_per_sample: float | None = None,
) -> EnergyReport:
    """The report of a run or of a peer's life; shared machines are counted once.

    Args:
        bookings: One per peer.
        samples: Samples of the whole group (every stage sees every sample, so they are not
            added up); None: the largest number any peer booked.
        predicted_joules_per_sample: By the run's plan, if one says so.
    """
    combined = combine(bookings)
    if samples is None:
        samples = max((one.amounts.samples for one in combined.peers), default=0)
    total_joules = combined.whole.total_uj / UJ_PER_J
    return EnergyReport(
        peers=tuple(_peer(one) for one in combined.peers),
        marginal_joules=combined.whole.marginal_uj / UJ_PER_J,
        total_joules=total_joules,
        joules_per_sample=total_joules / samples if samples else None,
        predicted_joules_per_sample=predicted_joules_per_sample,
    )


def _peer(booking: PeerBooking) -> PeerEnergy:
    amounts, identity = booking.amounts, booking.identity
    return PeerEnergy(
        device=booking.device,
        name=booking.name,
        phases={phase: _phase(amount) for phase, amount in amounts.phases.items()},
        marginal_joules=amounts.whole.marginal_uj / UJ_PER_J,
        total_joules=amounts.whole.total_uj / UJ_PER_J,
        scope=identity.scope,
        quality=identity.quality,
        error_band=identity.error_band,
        meter=identity.meter,
        source=identity.source,
        bytes_sent=amounts.bytes_sent,
        samples=amounts.samples,
    )


def _phase(amount: PhaseAmount) -> PhaseEnergy:
    return PhaseEnergy(
        seconds=amount.wall_ns / NS_PER_S,
        marginal_joules=amount.marginal_uj / UJ_PER_J,
        total_joules=amount.total_uj / UJ_PER_J,
    )
