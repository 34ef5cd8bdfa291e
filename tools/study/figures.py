"""What one cell of the study came to, in seconds, joules and bytes of a sample; pure.

Joules are modelled: a throttled peer of this machine has no meter of its own, so each stands for a
Raspberry Pi 4 with the watts of its device file. How long each phase lasted is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from p2ptrain.runtime.reports import PeerEnergy, TrafficReport, TrainResult
from tools.study.cells import Cell

POWER_DEVICE: Final = "raspberry-pi-4"
PHASES: Final = ("compute", "communicate", "wait", "idle")
ONCE: Final = frozenset({"state", "log", "data", "weights", "bundle", "control", "evaluation"})
"""Kinds of traffic that a step does not have by itself: preparation, recovery, evaluation."""
Outcome = Literal["ran", "does not fit", "not run in this version", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Watts:
    """What a peer is taken to draw."""

    idle: float
    busy: float
    joules_per_byte: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One cell as it is kept; everything of a sample, all peers together, where it ran."""

    key: str
    outcome: Outcome
    why: str = ""
    plan: str = ""
    predicted_step_s: float | None = None
    step_s: float | None = None
    """Median of the steps that count."""
    seconds_per_sample: float | None = None
    joules_per_sample: float | None = None
    phase_joules: dict[str, float] | None = None
    """By phase; they add up to joules_per_sample."""
    bytes_per_sample: float | None = None
    peak_bytes: int | None = None
    """Of the process that needed most."""
    date: str = ""


def phase_seconds(peers: Sequence[PeerEnergy]) -> dict[str, float]:
    """How long all peers together were in each phase."""
    return {
        phase: sum(peer.phases[phase].seconds for peer in peers if phase in peer.phases)
        for phase in PHASES
    }


def step_bytes(traffic: Sequence[TrafficReport], steps: int) -> float:
    """What belongs to steps, of one step."""
    return sum(each.bytes_sent for each in traffic if each.kind not in ONCE) / steps


def phase_joules(
    seconds: Mapping[str, float], *, step_s: float, peers: int, step_bytes: float, watts: Watts
) -> dict[str, float]:
    """Joules of one step by phase, all peers together.

    Args:
        seconds: Of each phase over a whole run; only their shares count.
        step_s: Of one step.
        peers: That take part.
        step_bytes: Sent in a step; each is received, too.
        watts: Of each peer.
    """
    whole = sum(seconds.values())
    found = {}
    for phase in PHASES:
        own_s = step_s * peers * seconds.get(phase, 0.0) / whole if whole else 0.0
        found[phase] = own_s * (watts.busy if phase == "compute" else watts.idle)
    found["communicate"] += 2 * step_bytes * watts.joules_per_byte
    return found


def ran(
    cell: Cell, result: TrainResult, *, step_s: float, peak_bytes: int, watts: Watts
) -> Figures:
    """The figures of a run."""
    samples = cell.model.samples_per_step
    sent = step_bytes(result.traffic, result.steps - result.first_step)
    joules = phase_joules(
        phase_seconds(result.energy.peers),
        step_s=step_s, peers=cell.peers, step_bytes=sent, watts=watts,
    )  # fmt: skip
    each = {phase: own / samples for phase, own in joules.items()}
    return Figures(
        key=cell.key,
        outcome="ran",
        step_s=step_s,
        seconds_per_sample=step_s / samples,
        joules_per_sample=sum(each.values()),
        phase_joules=each,
        bytes_per_sample=sent / samples,
        peak_bytes=peak_bytes,
    )
