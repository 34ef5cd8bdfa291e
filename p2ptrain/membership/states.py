"""What a peer can be in our eyes, what we can observe, and what follows: the whole table."""

from __future__ import annotations

from enum import Enum
from typing import Final


class State(Enum):
    """How another peer stands; the value is what people read."""

    HEARD_OF = "heard of"
    """It has a link with us and has not yet said who it is."""
    ALIVE = "alive"
    SUSPECT = "suspect"
    DEAD = "dead"
    LEFT = "left"
    """Gone, after it had said that it would go."""


class Sign(Enum):
    """One observation of another peer."""

    HEARD = "heard"
    """A message came over its link, and we hold its record."""
    VOUCHED = "vouched"
    """It answered somebody whom we had asked to ask it."""
    TOLD = "told"
    """Its own record says more than what is held against it, or is the first one."""
    SILENT = "silent"
    """A question went unanswered, asked directly and through others."""
    ACCUSED = "accused"
    """Somebody else says that it is silent."""
    EXPIRED = "expired"
    """Nothing contradicted the suspicion for the whole suspicion time."""
    CONDEMNED = "condemned"
    """Somebody else says that it is dead."""
    LINK_LOST = "link lost"
    """The link broke, and nobody refused a new one."""
    REFUSED = "refused"
    """The other side closed the link and its machine refused a new one."""
    RESTARTED = "restarted"
    """Its record has a newer incarnation: what it held in memory is gone."""
    GONE = "gone"
    """What would be suspicion or death, of a peer that had said that it goes."""


TRANSITIONS: Final[dict[tuple[State, Sign], State]] = {
    (State.HEARD_OF, Sign.HEARD): State.ALIVE,
    (State.HEARD_OF, Sign.VOUCHED): State.HEARD_OF,
    (State.HEARD_OF, Sign.TOLD): State.ALIVE,
    (State.HEARD_OF, Sign.SILENT): State.HEARD_OF,
    (State.HEARD_OF, Sign.ACCUSED): State.HEARD_OF,
    (State.HEARD_OF, Sign.EXPIRED): State.HEARD_OF,
    (State.HEARD_OF, Sign.CONDEMNED): State.DEAD,
    (State.HEARD_OF, Sign.LINK_LOST): State.HEARD_OF,
    (State.HEARD_OF, Sign.REFUSED): State.HEARD_OF,
    (State.HEARD_OF, Sign.RESTARTED): State.HEARD_OF,
    (State.HEARD_OF, Sign.GONE): State.LEFT,
    (State.ALIVE, Sign.HEARD): State.ALIVE,
    (State.ALIVE, Sign.VOUCHED): State.ALIVE,
    (State.ALIVE, Sign.TOLD): State.ALIVE,
    (State.ALIVE, Sign.SILENT): State.SUSPECT,
    (State.ALIVE, Sign.ACCUSED): State.SUSPECT,
    (State.ALIVE, Sign.EXPIRED): State.DEAD,
    (State.ALIVE, Sign.CONDEMNED): State.DEAD,
    (State.ALIVE, Sign.LINK_LOST): State.SUSPECT,
    (State.ALIVE, Sign.REFUSED): State.DEAD,
    (State.ALIVE, Sign.RESTARTED): State.DEAD,
    (State.ALIVE, Sign.GONE): State.LEFT,
    (State.SUSPECT, Sign.HEARD): State.ALIVE,
    (State.SUSPECT, Sign.VOUCHED): State.ALIVE,
    (State.SUSPECT, Sign.TOLD): State.ALIVE,
    (State.SUSPECT, Sign.SILENT): State.SUSPECT,
    (State.SUSPECT, Sign.ACCUSED): State.SUSPECT,
    (State.SUSPECT, Sign.EXPIRED): State.DEAD,
    (State.SUSPECT, Sign.CONDEMNED): State.DEAD,
    (State.SUSPECT, Sign.LINK_LOST): State.SUSPECT,
    (State.SUSPECT, Sign.REFUSED): State.DEAD,
    (State.SUSPECT, Sign.RESTARTED): State.DEAD,
    (State.SUSPECT, Sign.GONE): State.LEFT,
    (State.DEAD, Sign.HEARD): State.ALIVE,
    (State.DEAD, Sign.VOUCHED): State.ALIVE,
    (State.DEAD, Sign.TOLD): State.ALIVE,
    (State.DEAD, Sign.SILENT): State.DEAD,
    (State.DEAD, Sign.ACCUSED): State.DEAD,
    (State.DEAD, Sign.EXPIRED): State.DEAD,
    (State.DEAD, Sign.CONDEMNED): State.DEAD,
    (State.DEAD, Sign.LINK_LOST): State.DEAD,
    (State.DEAD, Sign.REFUSED): State.DEAD,
    (State.DEAD, Sign.RESTARTED): State.DEAD,
    (State.DEAD, Sign.GONE): State.DEAD,
    (State.LEFT, Sign.HEARD): State.ALIVE,
    (State.LEFT, Sign.VOUCHED): State.ALIVE,
    (State.LEFT, Sign.TOLD): State.ALIVE,
    (State.LEFT, Sign.SILENT): State.LEFT,
    (State.LEFT, Sign.ACCUSED): State.LEFT,
    (State.LEFT, Sign.EXPIRED): State.LEFT,
    (State.LEFT, Sign.CONDEMNED): State.LEFT,
    (State.LEFT, Sign.LINK_LOST): State.LEFT,
    (State.LEFT, Sign.REFUSED): State.LEFT,
    (State.LEFT, Sign.RESTARTED): State.LEFT,
    (State.LEFT, Sign.GONE): State.LEFT,
}
