"""Which phase a peer is in, so that seconds per phase add up to wall time."""

from __future__ import annotations

from typing import Final, Literal

from p2ptrain.errors import InvariantBroken
from p2ptrain.units import NS_PER_S

Phase = Literal["compute", "communicate", "wait", "idle"]
PHASES: Final[tuple[Phase, ...]] = ("compute", "communicate", "wait", "idle")
"""By precedence: while a peer computes and sends at once, the time counts as compute."""


class PhaseClock:
    """Counts wall time by phase from begin and end calls; idle when nothing is begun.

    Phases may nest and overlap, since several tasks call it: the first of PHASES that is begun
    counts. Times are integer nanoseconds, so the parts add up to the whole exactly.
    """

    def __init__(self, now: float) -> None:
        self._since_ns = _ns(now)
        self._begun: dict[Phase, int] = dict.fromkeys(PHASES, 0)
        self._spent_ns: dict[Phase, int] = dict.fromkeys(PHASES, 0)

    @property
    def phase(self) -> Phase:
        """The phase that counts at present."""
        return next((phase for phase in PHASES if self._begun[phase]), "idle")

    def begin(self, phase: Phase, now: float) -> None:
        """Something of this phase starts."""
        self._advance(now)
        self._begun[phase] += 1

    def end(self, phase: Phase, now: float) -> None:
        """What was begun last in this phase is over.

        Raises:
            InvariantBroken: nothing of this phase was begun.
        """
        if self._begun[phase] == 0:
            raise InvariantBroken(f"phase {phase} ended before it began")
        self._advance(now)
        self._begun[phase] -= 1

    def take(self, now: float) -> dict[str, int]:
        """Nanoseconds by phase since the last call; they add up to the time between the calls."""
        self._advance(now)
        taken: dict[str, int] = dict(self._spent_ns.items())
        self._spent_ns = dict.fromkeys(PHASES, 0)
        return taken

    def _advance(self, now: float) -> None:
        now_ns = _ns(now)
        # A clock that steps back gives no time rather than negative time.
        self._spent_ns[self.phase] += max(0, now_ns - self._since_ns)
        self._since_ns = max(self._since_ns, now_ns)


def _ns(seconds: float) -> int:
    return round(seconds * NS_PER_S)
