"""What one peer says against another: silent or dead, in one standing of its record.

The accused contradicts by raising `refutations` in its own record; whoever holds an accusation
below the standing of the newest record knows that it is refuted. Source: SWIM (Das, Gupta,
Motivala 2002, section 4.2); the counter there called incarnation is `refutations` here, since our
incarnation already tells a restarted process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from p2ptrain import limits
from p2ptrain.ids import DeviceId

SUSPECT: Final = "suspect"
DEAD: Final = "dead"
VERDICTS: Final = (SUSPECT, DEAD)

REFUSED: Final = "refused"
SILENT: Final = "silent"
LEFT: Final = "left"
RESTARTED: Final = "restarted"
CUT_OFF: Final = "cut off"
KINDS: Final = (REFUSED, SILENT, LEFT, RESTARTED, CUT_OFF)
"""How a peer went: nothing listens there any more (sure), it answers nobody, it said that it
goes, it is a new process, or it is there for others while we have no link with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accusation:
    """`accuser` says that `device`, as of that standing, is silent or dead."""

    device: DeviceId
    incarnation: int
    refutations: int
    verdict: str
    """One of VERDICTS."""
    kind: str
    """`refused` or `silent`: what a verdict of death rests on."""
    accuser: DeviceId

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS or self.kind not in (REFUSED, SILENT):
            raise ValueError("unknown verdict or kind of an accusation")
        if not 0 <= self.incarnation <= limits.INCARNATION_MAX:
            raise ValueError("the incarnation of an accusation is out of range")
        if not 0 <= self.refutations < limits.INCARNATION_MAX:
            raise ValueError("nobody may use up the refutations")

    @property
    def standing(self) -> tuple[int, int]:
        """(incarnation, refutations) that it speaks of."""
        return (self.incarnation, self.refutations)
