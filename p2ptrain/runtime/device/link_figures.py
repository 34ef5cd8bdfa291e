"""What this peer has measured of its links, for whoever plans."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from p2ptrain import limits
from p2ptrain.ids import DeviceId
from p2ptrain.membership.standings import MemberView
from p2ptrain.net.link_reports import PeerLinkStatistics
from p2ptrain.planner.links import LinkFigure
from p2ptrain.units import NS_PER_S


def link_figures(
    views: Iterable[MemberView],
    peers: Mapping[DeviceId, PeerLinkStatistics],
    medium_of: Callable[[str], str],
) -> tuple[LinkFigure, ...]:
    """Figures of the links that are up now, by device.

    Args:
        views: Membership's table, which has the round trips.
        peers: What links count, which have the rates.
        medium_of: Own address -> the Wi-Fi that it is on, or nothing.
    """
    figures = []
    for view in sorted(views, key=lambda view: view.device):
        counts = peers.get(view.device)
        if not view.linked or counts is None:
            continue
        trip_s = view.round_trip_s
        figures.append(
            LinkFigure(
                peer=view.device,
                round_trip_ns=None if trip_s is None else max(0, round(trip_s * NS_PER_S)),
                bytes_per_s=counts.bytes_per_s,
                medium=medium_of(counts.local_host),
            )
        )
    return tuple(figures[: limits.LINK_PEERS_MAX])
