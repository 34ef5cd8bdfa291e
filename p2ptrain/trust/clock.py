"""What time it is, on a device whose own clock may be wrong.

A clock without a battery starts in the past. It is doubted when it contradicts what certificates
prove, and until it is right again a time is used that an issuer of the group has signed, carried
on by a clock that only counts. trust/README.md says what that is worth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from p2ptrain.errors import TrustError
from p2ptrain.units import format_span

CLOCK_SKEW_MAX_S: Final = 240.0
"""Below the back-dating of certificates, so that a fresh one is valid elsewhere at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Two clocks of a device at one instant."""

    wall_s: float
    """Seconds since 1970, as far as the device knows."""
    counted_s: float
    """Seconds since some moment; never set, and goes on while the machine sleeps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vouched:
    """A time that somebody signed."""

    time_s: float
    by: str
    """Who, for people."""
    at: Reading


class VouchedClock:
    """The wall clock, or the time that was vouched for while that one is wrong.

    Args:
        floor_s: It is certainly later than this: an issuer made our certificate then.
    """

    def __init__(self, *, floor_s: float) -> None:
        self._floor_s = floor_s
        self._vouched: Vouched | None = None

    def now(self, reading: Reading) -> float:
        """The time to judge certificates by, seconds since 1970."""
        vouched = self._in_use(reading)
        if vouched is not None:
            return vouched
        return max(reading.wall_s, self._floor_s) if self.is_behind(reading) else reading.wall_s

    def is_vouched(self, reading: Reading) -> bool:
        """Whether a time of somebody else is used instead of the wall clock."""
        return self._in_use(reading) is not None

    def is_behind(self, reading: Reading) -> bool:
        """Whether the wall clock shows a time before our certificate was made."""
        return reading.wall_s < self._floor_s - CLOCK_SKEW_MAX_S

    def vouch(self, time_s: float, *, by: str, reading: Reading) -> bool:
        """Take the time that an issuer has signed; whether it differs from the wall clock.

        Raises:
            TrustError: it is before a time that is certainly over; who says that lies, or has a
                wrong clock itself.
        """
        if time_s < self._floor_s - CLOCK_SKEW_MAX_S:
            raise TrustError(f"{by} vouches for a time at which this device was not yet a member")
        self._vouched = Vouched(time_s=time_s, by=by, at=reading)
        return self.is_vouched(reading)

    def problem(self, reading: Reading) -> str | None:
        """What is wrong with the wall clock, one sentence for people; None: nothing known."""
        vouched = self._in_use(reading)
        if vouched is not None and self._vouched is not None:
            return (
                f"this device's clock is {_difference(vouched - reading.wall_s)} that of "
                f"{self._vouched.by}, whose time is used until the clock is set"
            )
        if self.is_behind(reading):
            return (
                "this device's clock is wrong: it shows a time before its certificate was made, "
                f"{_difference(self._floor_s - reading.wall_s)} it"
            )
        return None

    def _in_use(self, reading: Reading) -> float | None:
        if self._vouched is None:
            return None
        now = self._vouched.time_s + reading.counted_s - self._vouched.at.counted_s
        if abs(now - reading.wall_s) <= CLOCK_SKEW_MAX_S:
            return None  # the wall clock is right, or was set meanwhile
        return now


def doubts_clock(*, linked_ahead_s: tuple[float, ...], not_yet_valid: bool) -> bool:
    """Whether an issuer should be asked for the time.

    A member's certificate that is not yet valid means that our clock is behind or that its issuer's
    was ahead. Clocks without a battery are behind, so ours is doubted, unless some linked member's
    clock agrees with it.

    Args:
        linked_ahead_s: How far the clocks of the linked members are ahead of ours.
    """
    return not_yet_valid and not any(abs(s) <= CLOCK_SKEW_MAX_S for s in linked_ahead_s)


def _difference(ahead_s: float) -> str:
    return f"{format_span(abs(ahead_s))} {'behind' if ahead_s > 0 else 'ahead of'}"
