"""From what was looked at to what it means: every rule, problems first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from p2ptrain.diagnosis import device, network, others
from p2ptrain.diagnosis.findings import SEVERITIES, Diagnosis, Finding
from p2ptrain.diagnosis.observations import Observations

RULES: Final[tuple[Callable[[Observations], Iterator[Finding]], ...]] = (
    network.interface_findings,
    device.membership_findings,
    device.runtime_findings,
    network.port_findings,
    network.firewall_findings,
    network.multicast_findings,
    network.wifi_findings,
    others.reach_findings,
    others.trust_findings,
    others.version_findings,
    others.clock_findings,
    device.machine_findings,
    device.peer_findings,
)
"""Causes before their consequences: the first problem is the one to solve first."""


def diagnose(observed: Observations) -> Diagnosis:
    """Say what was found, why it matters and what to do next.

    The result depends on nothing but the observations; equal findings are said once.
    """
    found = dict.fromkeys(finding for rule in RULES for finding in rule(observed))
    ordered = sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))
    name = None if observed.membership is None else observed.membership.group_name
    return Diagnosis(group_name=name, findings=tuple(ordered))
