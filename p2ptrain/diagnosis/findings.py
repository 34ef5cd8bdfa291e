"""What a diagnosis says: findings, each with its reason and the next step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

PROBLEM: Final = "problem"
HINT: Final = "hint"
FINE: Final = "fine"
SEVERITIES: Final = (PROBLEM, HINT, FINE)

DIAGNOSIS_VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    check: str
    """interface, multicast, port, firewall, reach, clock, certificate, group, revoked, version,
    onnxruntime, wifi, machine, peer or run."""
    severity: str
    """problem: this keeps a peer alone or slow. hint: it may. fine: nothing is wrong here."""
    found: str
    why: str = ""
    """What it does to a peer."""
    next_step: str = ""

    def __post_init__(self) -> None:
        if self.severity not in SEVERITIES:
            raise ValueError(f"{self.severity!r} is no severity")
        if self.severity != FINE and not (self.why and self.next_step):
            raise ValueError("a finding says why it matters and what to do")


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What `p2ptrain doctor` prints: problems first."""

    group_name: str | None
    findings: tuple[Finding, ...]
    version: int = DIAGNOSIS_VERSION

    @property
    def problems(self) -> tuple[Finding, ...]:
        """What is wrong."""
        return tuple(each for each in self.findings if each.severity == PROBLEM)


def problem(check: str, found: str, *, why: str, next_step: str) -> Finding:
    """Something that keeps a peer alone or slow."""
    return Finding(check=check, severity=PROBLEM, found=found, why=why, next_step=next_step)


def hint(check: str, found: str, *, why: str, next_step: str) -> Finding:
    """Something that may."""
    return Finding(check=check, severity=HINT, found=found, why=why, next_step=next_step)


def fine(check: str, found: str) -> Finding:
    """Nothing is wrong here."""
    return Finding(check=check, severity=FINE, found=found)


def duration(seconds: float) -> str:
    """A length of time in the largest unit that fits: `3 days`, `2 hours`, `90 s`."""
    for unit_s, name in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit_s:
            return f"{seconds / unit_s:.0f} {name}"
    return f"{seconds:.0f} s"


def counted(number: int, thing: str) -> str:
    """`1 file`, `3 files`."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
