"""What a peer can be in our eyes, what we can observe, and what follows: the whole table."""

from __future__ import annotations

from enum import Enum
from typing import Final


class State(Enum):
    """How another peer stands; the value is what people read."""

    HEARD_OF = "heard of"
    """Somebody gossiped its record; we never spoke with it."""
    ALIVE = "alive"
    SUSPECT = "suspect"
    DEAD = "dead"


class Sign(Enum):
    """One observation of another peer."""

    HEARD = "heard"
    """A message came over its link, and we hold its record."""
    SILENT = "silent"
    """A probe went unanswered for longer than the probe timeout."""
    EXPIRED = "expired"
    """Nothing was heard for the whole suspicion time."""
    LINK_LOST = "link lost"
    """The link broke, and nobody refused a new one."""
    REFUSED = "refused"
    """The other side closed the link and its machine refused a new one."""
    RESTARTED = "restarted"
    """Its record has a newer incarnation: what it held in memory is gone."""


TRANSITIONS: Final[dict[tuple[State, Sign], State]] = {
    (State.HEARD_OF, Sign.HEARD): State.ALIVE,
    (State.HEARD_OF, Sign.SILENT): State.HEARD_OF,
    (State.HEARD_OF, Sign.EXPIRED): State.HEARD_OF,
    (State.HEARD_OF, Sign.LINK_LOST): State.HEARD_OF,
    (State.HEARD_OF, Sign.REFUSED): State.HEARD_OF,
    (State.HEARD_OF, Sign.RESTARTED): State.HEARD_OF,
    (State.ALIVE, Sign.HEARD): State.ALIVE,
    (State.ALIVE, Sign.SILENT): State.SUSPECT,
    (State.ALIVE, Sign.EXPIRED): State.DEAD,
    (State.ALIVE, Sign.LINK_LOST): State.SUSPECT,
    (State.ALIVE, Sign.REFUSED): State.DEAD,
    (State.ALIVE, Sign.RESTARTED): State.DEAD,
    (State.SUSPECT, Sign.HEARD): State.ALIVE,
    (State.SUSPECT, Sign.SILENT): State.SUSPECT,
    (State.SUSPECT, Sign.EXPIRED): State.DEAD,
    (State.SUSPECT, Sign.LINK_LOST): State.SUSPECT,
    (State.SUSPECT, Sign.REFUSED): State.DEAD,
    (State.SUSPECT, Sign.RESTARTED): State.DEAD,
    (State.DEAD, Sign.HEARD): State.ALIVE,
    (State.DEAD, Sign.SILENT): State.DEAD,
    (State.DEAD, Sign.EXPIRED): State.DEAD,
    (State.DEAD, Sign.LINK_LOST): State.DEAD,
    (State.DEAD, Sign.REFUSED): State.DEAD,
    (State.DEAD, Sign.RESTARTED): State.DEAD,
}
