"""Links as their ends measured them, and what the planner makes of both ends' figures."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from p2ptrain.ids import DeviceId
from p2ptrain.planner.input import (
    OTHER_HOST_BYTES_PER_S,
    OTHER_HOST_LATENCY_NS,
    SAME_HOST_BYTES_PER_S,
    SAME_HOST_LATENCY_NS,
    LinkEstimate,
)
from p2ptrain.planner.profile import PeerProfile

MEDIUM_CHARACTERS_MAX: Final = 64
LOOPBACK_BYTES_PER_S_MIN: Final = SAME_HOST_BYTES_PER_S // 4
"""A link of one host that carries less is none of its own: one that is shaped, or an emulated one.
What is measured on others is how busy the cores are, which the profiles count already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkFigure:
    """What one device has measured of its link with another, from the traffic between them."""

    peer: DeviceId
    round_trip_ns: int | None
    """Of a small message and its answer, program to program; None: not measured."""
    bytes_per_s: int | None
    """Sent while more waited; None: there was never enough traffic to tell."""
    medium: str = ""
    """The Wi-Fi that its own end is on, the same for all on it; empty: a cable, or unknown."""

    def __post_init__(self) -> None:
        if self.round_trip_ns is not None and self.round_trip_ns < 0:
            raise ValueError("a round trip is not negative")
        if self.bytes_per_s is not None and self.bytes_per_s < 1:
            raise ValueError("a link carries at least 1 byte per second")
        if len(self.medium) > MEDIUM_CHARACTERS_MAX:
            raise ValueError("a medium's name is too long")


class LinkTable:
    """Links between peers: as estimated, else as assumed for their kind."""

    def __init__(self, estimates: Iterable[LinkEstimate]) -> None:
        self._known = {frozenset((each.first, each.second)): each for each in estimates}

    def between(self, one: PeerProfile, other: PeerProfile) -> LinkEstimate:
        """The link of two peers."""
        known = self._known.get(frozenset((one.device, other.device)))
        if known is not None:
            return known
        near = one.host == other.host
        return LinkEstimate(
            first=one.device,
            second=other.device,
            latency_ns=SAME_HOST_LATENCY_NS if near else OTHER_HOST_LATENCY_NS,
            bytes_per_s=SAME_HOST_BYTES_PER_S if near else OTHER_HOST_BYTES_PER_S,
            rate_measured=False,
            latency_measured=False,
        )


def link_estimates(
    told: Mapping[DeviceId, Iterable[LinkFigure]], hosts: Mapping[DeviceId, str]
) -> tuple[LinkEstimate, ...]:
    """One estimate for every two devices between which something was measured, by device.

    Args:
        told: What each device says of its links.
        hosts: Machine of each device that may take part; links with others are left out.

    Returns:
        The slower direction's rate, since tensors go both ways. Where no end has measured one it
        is assumed: no faster than half of the measured ones are, or a plan would flee from every
        slow link that it knows to those that it does not. Links between peers of one host only
        where some of that host's are clearly not the loopback: then its peers are apart, as
        containers on networks of their own are.
    """
    figures = {(device, figure.peer): figure for device, own in told.items() for figure in own}
    pairs = list(itertools.combinations(sorted(hosts), 2))
    every = []
    for first, second in pairs:
        both = [figures.get((first, second)), figures.get((second, first))]
        known = [figure for figure in both if figure is not None]
        every.append(_estimate(first, second, known))
    within = [each for each in every if hosts[each.first] == hosts[each.second]]
    apart = {hosts[each.first] for each in within if _is_shaped(each)}
    found = [each for each in every if each not in within or hosts[each.first] in apart]
    usual = _usual_bytes_per_s(found)
    return tuple(
        each if each.rate_measured else dataclasses.replace(each, bytes_per_s=usual)
        for each in found
        if each.rate_measured
        or each.latency_measured
        or each.medium
        or usual < OTHER_HOST_BYTES_PER_S
        or hosts[each.first] == hosts[each.second]
    )


def _usual_bytes_per_s(found: Iterable[LinkEstimate]) -> int:
    """What to assume of links of which nobody knows the rate."""
    rates = [each.bytes_per_s for each in found if each.rate_measured]
    return min([OTHER_HOST_BYTES_PER_S, *([statistics.median_low(rates)] if rates else [])])


def _estimate(first: DeviceId, second: DeviceId, known: list[LinkFigure]) -> LinkEstimate:
    trips = [f.round_trip_ns for f in known if f.round_trip_ns is not None]
    rates = [f.bytes_per_s for f in known if f.bytes_per_s is not None]
    return LinkEstimate(
        first=first,
        second=second,
        latency_ns=min(trips) // 2 if trips else OTHER_HOST_LATENCY_NS,
        bytes_per_s=min(rates, default=OTHER_HOST_BYTES_PER_S),
        medium=next((f.medium for f in known if f.medium), ""),
        rate_measured=bool(rates),
        latency_measured=bool(trips),
    )


def _is_shaped(estimate: LinkEstimate) -> bool:
    return estimate.rate_measured and estimate.bytes_per_s < LOOPBACK_BYTES_PER_S_MIN
