"""When a link has to be replaced: its age and what it carried. PROTOCOL.md section 3.3.

One TLS key may seal a limited number of records, and Python offers no way to change it. Another
connection also means that certificates and their dates are checked again.
"""

from __future__ import annotations

from enum import Enum

from p2ptrain import limits


class Wear(Enum):
    """How used up a link is."""

    FRESH = "fresh"
    WORN = "worn"
    """Whoever dialled it should put another in its place."""
    WORN_OUT = "worn out"
    """It may not be used any more."""


def wear(*, age_s: float, carried_bytes: int) -> Wear:
    """How used up a link is that is `age_s` old and carried that much in its busier direction."""
    if age_s >= limits.LINK_AGE_MAX_S or carried_bytes >= limits.LINK_CARRIED_BYTES_MAX:
        return Wear.WORN_OUT
    if age_s >= limits.LINK_RENEW_AGE_S or carried_bytes >= limits.LINK_RENEW_BYTES:
        return Wear.WORN
    return Wear.FRESH


def next_change_s(*, age_s: float) -> float:
    """Seconds until age alone makes a link more worn than it is; 0 when it is worn out."""
    for limit_s in (limits.LINK_RENEW_AGE_S, limits.LINK_AGE_MAX_S):
        if age_s < limit_s:
            return limit_s - age_s
    return 0.0
