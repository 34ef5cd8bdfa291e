"""What this peer's work costs: one clock and one meter, booked on runs and steps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final, NamedTuple

from p2ptrain.energy.combine import PeerBooking
from p2ptrain.energy.ledger import NO_RUN, Amounts, PhaseAmount
from p2ptrain.energy.phases import Phase
from p2ptrain.energy.power_model import PowerModel
from p2ptrain.energy.recorder import EnergyRecorder
from p2ptrain.ids import DeviceId
from p2ptrain.planner.plan import Plan
from p2ptrain.planner.profile import Power
from p2ptrain.power.meter import Meter
from p2ptrain.training.messages import Stamp, Usage
from p2ptrain.units import NS_PER_S, UJ_PER_J
from p2ptrain.wire.flows import carried

PJ_PER_J: Final = 10**12
POWER_MEASURED_S_MIN: Final = 10
"""Of compute that a meter must have seen before its watts are believed."""


class Traffic(NamedTuple):
    """Bytes at the sockets since the peer started."""

    sent: int
    received: int


Sent = Mapping[DeviceId, dict[str, int]]
"""Encrypted bytes to each device for each kind of traffic of one run."""


class PeerMeter:
    """Books every moment of the peer's life, on the run of that moment or on none."""

    def __init__(
        self,
        *,
        device: DeviceId,
        name: str,
        meter: Meter,
        traffic: Callable[[], Traffic],
        sent: Callable[[str], Sent],
    ) -> None:
        """`traffic` and `sent` count since the peer started; `sent` is asked for one run."""
        self._device, self._name = device, name
        self._meter, self._traffic, self.sent = meter, traffic, sent
        self._recorder = EnergyRecorder(
            model=meter.model, reading=meter.read(time.monotonic()), cpu_ns=time.process_time_ns()
        )
        self._run: str = NO_RUN

    @contextlib.contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Count the time of the block as this phase."""
        self._recorder.clock.begin(phase, time.monotonic())
        try:
            yield
        finally:
            self._recorder.clock.end(phase, time.monotonic())

    def enter_run(self, session: str | None) -> None:
        """From now on book on this session of a run; None: on none."""
        self.settle()
        self._run = NO_RUN if session is None else session

    def settle(self, *, step: int | None = None, samples: int = 0) -> Amounts:
        """Book what happened since the last call; gives what it came to."""
        traffic = self._traffic()
        return self._recorder.book(
            reading=self._meter.read(time.monotonic()),
            cpu_ns=time.process_time_ns(),
            bytes_sent=traffic.sent,
            bytes_received=traffic.received,
            samples=samples,
            run=self._run,
            step=step,
        )

    def power(self, threads: int) -> Power:
        """What the machine draws while this peer computes, for plans.

        Args:
            threads: Of the run.

        Returns:
            What the meter has booked of compute above idle, once that is long enough; until then,
            and without a meter, what the model says.
        """
        compute = self._recorder.ledger.life().phases["compute"]
        is_metered = self._meter.identity.quality == "measured"
        return power_drawn(self._meter.model, compute, threads=threads, is_metered=is_metered)

    def booking(self, session: str | None = None) -> PeerBooking:
        """Everything booked on a session of a run; None: on the peer's whole life."""
        self._recorder.ledger.check()
        return PeerBooking(
            device=self._device,
            name=self._name,
            amounts=self._recorder.ledger.life()
            if session is None
            else self._recorder.ledger.run(session),
            identity=self._meter.identity,
        )


def power_drawn(
    model: PowerModel, compute: PhaseAmount, *, threads: int, is_metered: bool
) -> Power:
    """Watts of a machine whose meter has booked this much compute."""
    idle_uw = round(model.idle_watts * UJ_PER_J)
    above_uw = round(model.core_watts * min(threads, model.cores) * UJ_PER_J)
    measured = is_metered and compute.wall_ns >= POWER_MEASURED_S_MIN * NS_PER_S
    if measured:
        above_uw = compute.marginal_uj * NS_PER_S // compute.wall_ns
    return Power(
        idle_uw=idle_uw,
        busy_uw=idle_uw + above_uw,
        pj_per_byte=round(model.joules_per_byte * PJ_PER_J),
        measured=measured,
        error_permille=None if model.error_band is None else round(1000 * model.error_band),
    )


class RunMeter:
    """A peer's meter as one session of a run uses it: a resumed run begins a new account."""

    def __init__(self, meter: PeerMeter, plan: Plan, *, samples_per_step: int) -> None:
        self._meter, self._samples = meter, samples_per_step
        self._session = f"{plan.run}.{plan.lineage}.{plan.view}"
        self._run, self._begun = plan.run, carried(meter.sent(plan.run), ())
        meter.enter_run(self._session)

    def phase(self, phase: Phase) -> contextlib.AbstractContextManager[None]:
        """Count the time of the block as this phase."""
        return self._meter.phase(phase)

    def usage(self, stamp: Stamp, *, step: int) -> Usage:
        """Book a finished step; what the run has cost so far, for its home peer."""
        amounts = self._meter.settle(step=step, samples=self._samples)
        return Usage(
            stamp=stamp,
            step=step,
            activity=_activity(amounts),
            booking=self._meter.booking(self._session),
            sent=carried(self._meter.sent(self._run), self._begun),
        )

    def close(self) -> None:
        """The run is over on this peer."""
        self._meter.enter_run(None)


def _activity(amounts: Amounts) -> str:
    """`71 % compute, 2 % communicate, 27 % wait` of the last step."""
    whole_ns = max(1, amounts.whole.wall_ns)
    shares = {phase: 100 * amount.wall_ns // whole_ns for phase, amount in amounts.phases.items()}
    return ", ".join(f"{share} % {phase}" for phase, share in shares.items() if share > 0)
