"""One view's plan in the eyes of one member, and what each input makes of it: the whole table."""

from __future__ import annotations

from enum import Enum
from typing import Final


class Stand(Enum):
    """Where a member stands on the one plan it holds for a view."""

    OFFERED = "offered"
    """The shell has been asked."""
    REFUSED = "refused"
    ACCEPTED = "accepted"
    """Durable: no other plan is accepted for this view."""
    DECIDED = "decided"
    WITHDRAWN = "withdrawn"


class Input(Enum):
    """What can happen to it; a pair that is not in the table breaks the protocol."""

    PROPOSED = "the same proposal again"
    ACCEPT = "the shell accepts"
    REFUSE = "the shell refuses"
    DECIDE = "the proposer says decided"
    WITHDRAW = "the proposer withdraws"


TRANSITIONS: Final[dict[tuple[Stand, Input], Stand]] = {
    (Stand.OFFERED, Input.PROPOSED): Stand.OFFERED,
    (Stand.OFFERED, Input.ACCEPT): Stand.ACCEPTED,
    (Stand.OFFERED, Input.REFUSE): Stand.REFUSED,
    (Stand.OFFERED, Input.WITHDRAW): Stand.WITHDRAWN,
    (Stand.REFUSED, Input.PROPOSED): Stand.REFUSED,
    (Stand.REFUSED, Input.REFUSE): Stand.REFUSED,
    (Stand.REFUSED, Input.WITHDRAW): Stand.REFUSED,
    (Stand.ACCEPTED, Input.PROPOSED): Stand.ACCEPTED,
    (Stand.ACCEPTED, Input.ACCEPT): Stand.ACCEPTED,
    (Stand.ACCEPTED, Input.DECIDE): Stand.DECIDED,
    (Stand.ACCEPTED, Input.WITHDRAW): Stand.WITHDRAWN,
    (Stand.DECIDED, Input.PROPOSED): Stand.DECIDED,
    (Stand.DECIDED, Input.ACCEPT): Stand.DECIDED,
    (Stand.DECIDED, Input.DECIDE): Stand.DECIDED,
    (Stand.WITHDRAWN, Input.PROPOSED): Stand.WITHDRAWN,
    (Stand.WITHDRAWN, Input.ACCEPT): Stand.WITHDRAWN,
    (Stand.WITHDRAWN, Input.REFUSE): Stand.WITHDRAWN,
    (Stand.WITHDRAWN, Input.WITHDRAW): Stand.WITHDRAWN,
}
