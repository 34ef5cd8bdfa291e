"""Ballots of the Paxos instance that decides a run's next view."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from p2ptrain.ids import DeviceId

ROUND_MAX: Final = 1 << 53


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Ballot:
    """One attempt to decide; ordered by round, then by the device that made it."""

    round: int
    device: DeviceId
    """The proposer: no two devices ever make the same ballot."""

    def __post_init__(self) -> None:
        if not 1 <= self.round <= ROUND_MAX:
            raise ValueError("rounds of ballots count from 1")
