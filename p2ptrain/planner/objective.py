"""What is best, and within what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from p2ptrain.units import NS_PER_S, UJ_PER_J

Goal = Literal["time", "energy"]
GOALS: Final[tuple[Goal, ...]] = ("time", "energy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What is best, and within what, for the whole run."""

    goal: Goal = "time"
    deadline_ns: int | None = None
    joules_uj: int | None = None
    """Of all devices that take part, idle time included."""

    def __post_init__(self) -> None:
        limits = [each for each in (self.deadline_ns, self.joules_uj) if each is not None]
        if self.goal not in GOALS or any(limit < 1 for limit in limits):
            raise ValueError("a goal is time or energy, and a limit more than nothing")

    @property
    def has_limits(self) -> bool:
        """Whether some plans are not good enough."""
        return self.deadline_ns is not None or self.joules_uj is not None

    @property
    def needs_watts(self) -> bool:
        """Whether it can only be judged by what devices draw."""
        return self.goal == "energy" or self.joules_uj is not None


def objective_of(goal: str, *, deadline_s: float | None, joules: float | None) -> Objective:
    """An objective in the units that people use; `goal` is one of GOALS."""
    return Objective(
        goal="energy" if goal == "energy" else "time",
        deadline_ns=None if deadline_s is None else max(1, round(deadline_s * NS_PER_S)),
        joules_uj=None if joules is None else max(1, round(joules * UJ_PER_J)),
    )
