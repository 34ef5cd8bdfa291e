"""What `p2ptrain status` shows, gathered from the peer's parts."""

from __future__ import annotations

from typing import Protocol

import trio

from p2ptrain.membership.machine import Membership, MemberView
from p2ptrain.net.discovery import DiscoveryState
from p2ptrain.net.links import Links, PeerLinkStatistics
from p2ptrain.net.tls_link import CLOCKS_DIFFER
from p2ptrain.runtime.credentials.trust_service import TrustService
from p2ptrain.runtime.driver import Driver
from p2ptrain.runtime.reports import LinksReport, MemberReport, PeerStatus
from p2ptrain.runtime.runs.run_service import RunService
from p2ptrain.runtime.runs.run_status import run_status_report
from p2ptrain.store.groups import Group
from p2ptrain.store.home import Home
from p2ptrain.store.runs import summaries


class StatusSource(Protocol):
    """The parts of a peer that a status is made of."""

    home: Home
    group: Group
    discovery: DiscoveryState
    links: Links
    membership: Driver[Membership]
    runs: RunService
    trust: TrustService

    def addresses(self) -> tuple[str, ...]:
        """Where other devices may reach this peer."""


def status_report(peer: StatusSource) -> PeerStatus:
    """The state of a running peer."""
    own = peer.membership.machine.own
    others = peer.membership.machine.members(trio.current_time())
    carried = peer.links.statistics().peers
    self_line = MemberReport(
        device=own.device,
        name=own.name,
        state="self",
        addresses=own.addresses,
        runtime=f"{own.build.runtime} {own.build.version}",
        activity=own.activity,
        last_heard_s=0.0,
    )
    return PeerStatus(
        group=peer.group.id,
        group_name=peer.group.name,
        device=peer.group.device,
        name=peer.group.device_name,
        address=", ".join(peer.addresses()),
        discovery=peer.discovery.text,
        alone_because=_alone_because(peer),
        members=(self_line, *(member_report(v, carried.get(v.device)) for v in others)),
        run=peer.runs.current_run,
        run_status=None if peer.runs.member is None else run_status_report(peer.runs.member),
        run_state=_run_state(peer),
        plan=peer.runs.plan_report,
        runs=tuple(summaries(peer.home.runs)),
    )


def links_report(peer: StatusSource) -> LinksReport:
    """How a running peer is reached and reaches others."""
    host, port = peer.links.address
    statistics = peer.links.statistics()
    return LinksReport(
        listen_host=host,
        port=port,
        discovery=peer.discovery.text,
        discovery_works=peer.discovery.working,
        refusals=peer.links.refusals(),
        failures=peer.links.failures(),
        refused_count=statistics.refused_count,
        last_refusal=statistics.last_refusal,
    )


def member_report(view: MemberView, carried: PeerLinkStatistics | None = None) -> MemberReport:
    """One other member's line, with what its link has carried."""
    record = view.record
    state = view.state.value
    return MemberReport(
        device=view.device,
        name=view.device[:8] if record is None else record.name,
        state=f"{state}: {view.reason}" if view.reason else state,
        addresses=() if record is None else record.addresses,
        runtime="" if record is None else f"{record.build.runtime} {record.build.version}",
        activity="" if record is None else record.activity,
        last_heard_s=view.last_heard_s,
        state_s=view.state_s,
        round_trip_s=view.round_trip_s,
        linked=view.linked,
        last_down=view.last_down,
        bytes_per_s=None if carried is None else carried.bytes_per_s,
    )


def _alone_because(peer: StatusSource) -> str | None:
    if peer.membership.machine.alive():
        return None
    if peer.trust.notices:
        return "; ".join(peer.trust.notices)
    outdated = {a: r for a, r in peer.links.failures().items() if r.endswith(CLOCKS_DIFFER)}
    known = {**outdated, **peer.links.refusals()}
    refusals = [f"{address}: {reason}" for address, reason in known.items()]
    if refusals:
        return "; ".join(refusals)
    return f"no other member was found ({peer.discovery.text}); p2ptrain doctor tells why"


def _run_state(peer: StatusSource) -> str:
    if peer.runs.current_run is not None:
        return f"running {peer.runs.current_run[:8]}"
    failure = peer.runs.last_failure
    return "idle" if failure is None else f"idle; the last run ended: {failure}"
