"""Turn a peer's growing counters into booked intervals."""

from __future__ import annotations

from p2ptrain.energy.ledger import NO_RUN, Amounts, EnergyLedger, Interval
from p2ptrain.energy.meter import Reading
from p2ptrain.energy.phases import PhaseClock
from p2ptrain.energy.power_model import PowerModel


class EnergyRecorder:
    """One peer's phase clock and ledger, fed with counters that only grow.

    The runtime calls `clock.begin` and `clock.end` around compute actions, sends and waits, and
    `book` after every step and every few seconds in between.
    """

    def __init__(self, *, model: PowerModel, reading: Reading, cpu_ns: int) -> None:
        self.clock = PhaseClock(reading.at_s)
        self.ledger = EnergyLedger(model)
        self._reading = reading
        self._cpu_ns = cpu_ns
        self._bytes_sent = 0
        self._bytes_received = 0

    def book(
        self,
        *,
        reading: Reading,
        cpu_ns: int,
        bytes_sent: int,
        bytes_received: int,
        samples: int = 0,
        run: str = NO_RUN,
        step: int | None = None,
    ) -> Amounts:
        """Book what happened since the last call; gives what was booked.

        Args:
            reading: The meter's, at `reading.at_s`.
            cpu_ns: time.process_time_ns() of this process, so far.
            bytes_sent: By this peer since it started, encrypted.
            bytes_received: The same, received.
            samples: Of this interval.
            run: The run the interval belongs to, or NO_RUN.
            step: The run's step, or None.
        """
        before = self._reading
        interval = Interval(
            phase_ns=self.clock.take(reading.at_s),
            cpu_ns=max(0, cpu_ns - self._cpu_ns),
            bytes_sent=bytes_sent - self._bytes_sent,
            bytes_received=bytes_received - self._bytes_received,
            samples=samples,
            counter_uj=_rise(before.counter_uj, reading.counter_uj),
            machine_cpu_ns=_rise(before.machine_cpu_ns, reading.machine_cpu_ns),
        )
        amounts = self.ledger.add(interval, run=run, step=step)
        self._reading, self._cpu_ns = reading, cpu_ns
        self._bytes_sent, self._bytes_received = bytes_sent, bytes_received
        return amounts


def _rise(before: int | None, after: int | None) -> int | None:
    """How far a counter rose; None when either end is unknown or it was reset."""
    if before is None or after is None or after < before:
        return None
    return after - before
