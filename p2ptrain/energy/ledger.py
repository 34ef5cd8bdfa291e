"""The energy ledger: microjoules and nanoseconds of one peer per run, step and phase.

Marginal is above idle: CPU time and bytes. Total adds the machine's idle power over the wall
time. Every entry holds all four phases, and its sums are the sums of its phases by construction;
the ledger's own running totals are kept apart and compared (`check`).
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from p2ptrain.energy.phases import PHASES
from p2ptrain.energy.power_model import PowerModel, process_share_uj, split
from p2ptrain.errors import InvariantBroken

STEPS_KEPT: Final = 1024
RUNS_KEPT: Final = 64
NO_RUN: Final = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseAmount:
    """Time and energy of one phase."""

    wall_ns: int = 0
    marginal_uj: int = 0
    idle_uj: int = 0

    def __post_init__(self) -> None:
        if min(self.wall_ns, self.marginal_uj, self.idle_uj) < 0:
            raise ValueError("time and energy are not negative")

    @property
    def total_uj(self) -> int:
        return self.marginal_uj + self.idle_uj

    def plus(self, other: PhaseAmount) -> PhaseAmount:
        return PhaseAmount(
            wall_ns=self.wall_ns + other.wall_ns,
            marginal_uj=self.marginal_uj + other.marginal_uj,
            idle_uj=self.idle_uj + other.idle_uj,
        )


def _no_phases() -> dict[str, PhaseAmount]:
    return {phase: PhaseAmount() for phase in PHASES}


@dataclass(frozen=True, slots=True, kw_only=True)
class Amounts:
    """Energy by phase, with bytes and samples."""

    phases: dict[str, PhaseAmount] = field(default_factory=_no_phases)
    bytes_sent: int = 0
    samples: int = 0

    def __post_init__(self) -> None:
        if set(self.phases) != set(PHASES) or min(self.bytes_sent, self.samples) < 0:
            raise ValueError(f"amounts need the phases {', '.join(PHASES)}, none negative")

    @property
    def whole(self) -> PhaseAmount:
        """All phases together."""
        whole = PhaseAmount()
        for amount in self.phases.values():
            whole = whole.plus(amount)
        return whole

    def plus(self, other: Amounts) -> Amounts:
        return Amounts(
            phases={phase: self.phases[phase].plus(other.phases[phase]) for phase in PHASES},
            bytes_sent=self.bytes_sent + other.bytes_sent,
            samples=self.samples + other.samples,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """What one peer did between two readings of its clocks and meter."""

    phase_ns: dict[str, int]
    """From PhaseClock.take."""
    cpu_ns: int
    """CPU time of this process (time.process_time; other sources read zero under qemu)."""
    bytes_sent: int
    bytes_received: int
    samples: int = 0
    counter_uj: int | None = None
    """What the meter's counter rose by; None: the model alone."""
    machine_cpu_ns: int | None = None
    """CPU time of all processes; None: taken as this process's own."""


class EnergyLedger:
    """Adds intervals up; keeps the newest steps one by one and all older ones as one sum."""

    def __init__(self, model: PowerModel) -> None:
        self._model = model
        self._runs: OrderedDict[str, Amounts] = OrderedDict()
        self._steps: OrderedDict[tuple[str, int], Amounts] = OrderedDict()
        self._total = PhaseAmount()

    def add(self, interval: Interval, *, run: str = NO_RUN, step: int | None = None) -> Amounts:
        """Book one interval on a run and step, or on no run; gives what was booked.

        Raises:
            ValueError: a time, byte count or counter is negative; the interval was not booked.
        """
        amounts = measure(interval, self._model)
        self._runs[run] = self._runs.get(run, Amounts()).plus(amounts)
        self._total = self._total.plus(amounts.whole)
        if step is not None:
            key = (run, step)
            self._steps[key] = self._steps.get(key, Amounts()).plus(amounts)
        self._compact()
        return amounts

    def run(self, run: str = NO_RUN) -> Amounts:
        """Everything booked on a run; nothing for a run the ledger does not know."""
        return self._runs.get(run, Amounts())

    def step(self, run: str, step: int) -> Amounts | None:
        """One step's amounts while it is among the newest STEPS_KEPT, else None."""
        return self._steps.get((run, step))

    def life(self) -> Amounts:
        """Everything this ledger has booked."""
        return _add_all(self._runs.values())

    def check(self) -> None:
        """Compare the sum over runs and phases with the running total.

        Raises:
            InvariantBroken: they differ; a bug.
        """
        whole = self.life().whole
        if whole != self._total:
            raise InvariantBroken(f"the energy ledger holds {whole}, but booked {self._total}")

    def _compact(self) -> None:
        while len(self._steps) > STEPS_KEPT:
            self._steps.popitem(last=False)
        while len(self._runs) > RUNS_KEPT:
            oldest = next(run for run in self._runs if run != NO_RUN)
            amounts = self._runs.pop(oldest)
            self._runs[NO_RUN] = self._runs.get(NO_RUN, Amounts()).plus(amounts)


def measure(interval: Interval, model: PowerModel) -> Amounts:
    """Turn one interval into energy by phase.

    With the model, bytes are paid by `communicate`; a counter covers them or, for a package,
    cannot see them. The rest above idle, from the model's CPU figure or from the process's share
    of the counter, follows wall time in compute and communicate, since only these burn CPU; a
    peer that did neither pays it where its time went. Idle power follows wall time.
    """
    _check(interval)
    walls = [interval.phase_ns.get(phase, 0) for phase in PHASES]
    wall_ns = sum(walls)
    idle_uj = model.idle_uj(wall_ns)
    bytes_uj = model.bytes_uj(interval.bytes_sent + interval.bytes_received)
    busy_uj = model.compute_uj(interval.cpu_ns)
    if interval.counter_uj is not None:
        # The counter says it all: nothing modelled is added to a measured figure, and the idle
        # part is never more than what was measured.
        bytes_uj = 0
        idle_uj = min(idle_uj, interval.counter_uj)
        machine_cpu_ns = interval.machine_cpu_ns
        busy_uj = process_share_uj(
            package_uj=interval.counter_uj,
            idle_uj=idle_uj,
            process_cpu_ns=interval.cpu_ns,
            machine_cpu_ns=interval.cpu_ns if machine_cpu_ns is None else machine_cpu_ns,
        )
    working = [walls[0], walls[1], 0, 0]
    busy_parts = split(busy_uj, working if any(working) else walls)
    idle_parts = split(idle_uj, walls)
    amounts = Amounts(
        phases={
            phase: PhaseAmount(
                wall_ns=walls[index],
                marginal_uj=busy_parts[index] + (bytes_uj if phase == "communicate" else 0),
                idle_uj=idle_parts[index],
            )
            for index, phase in enumerate(PHASES)
        },
        bytes_sent=interval.bytes_sent,
        samples=interval.samples,
    )
    booked = PhaseAmount(wall_ns=wall_ns, marginal_uj=busy_uj + bytes_uj, idle_uj=idle_uj)
    if amounts.whole != booked:
        raise InvariantBroken(f"phases hold {amounts.whole}, the interval {booked}")
    return amounts


def _check(interval: Interval) -> None:
    optional = (interval.counter_uj, interval.machine_cpu_ns)
    numbers = [interval.cpu_ns, interval.bytes_sent, interval.bytes_received, interval.samples]
    numbers += [*interval.phase_ns.values(), *(number for number in optional if number is not None)]
    if min(numbers) < 0 or not set(interval.phase_ns) <= set(PHASES):
        raise ValueError("an interval has no negative time, count or counter, nor other phases")


def _add_all(many: Iterable[Amounts]) -> Amounts:
    whole = Amounts()
    for amounts in many:
        whole = whole.plus(amounts)
    return whole


def scaled_idle(amounts: Amounts, idle_uj: int) -> Amounts:
    """The same amounts with another idle energy, divided as before."""
    parts = split(idle_uj, [amounts.phases[phase].idle_uj for phase in PHASES])
    return dataclasses.replace(
        amounts,
        phases={
            phase: dataclasses.replace(amounts.phases[phase], idle_uj=part)
            for phase, part in zip(PHASES, parts, strict=True)
        },
    )
