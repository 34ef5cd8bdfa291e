"""Rules about interfaces, multicast, Wi-Fi, the port and the firewall of this device."""

from __future__ import annotations

from collections.abc import Iterator

from p2ptrain import limits
from p2ptrain.diagnosis.findings import Finding, counted, fine, hint, problem
from p2ptrain.diagnosis.observations import DialEnd, Interface, Observations

MULTICAST_DNS_PORT = 5353
LOOPBACK_PREFIXES = ("127.", "::1", "localhost")
_ALONE_WHY = "peers cannot find each other by themselves"


def usable(observed: Observations) -> tuple[Interface, ...]:
    """Interfaces that have an address and are switched on."""
    every = observed.interfaces or ()
    return tuple(each for each in every if each.networks and _is_on(each))


def own_address(observed: Observations) -> str:
    """host:port at which others most likely reach this device."""
    port = observed.peer.port if observed.peer is not None else limits.PEER_PORT_DEFAULT
    if observed.peer is None and observed.port is not None:
        port = observed.port.port
    first = next(iter(usable(observed)), None)
    host = "HOST" if first is None else first.networks[0].partition("/")[0]
    return f"{host}:{port}"


def join_with_peer(observed: Observations) -> str:
    """What to type where multicast does not do the job."""
    group = "NAME" if observed.membership is None else observed.membership.group_name
    others = [dial.address for dial in observed.dials if dial.end is DialEnd.ANSWERED]
    here = f"p2ptrain join --group {group} --peer {others[0] if others else 'HOST:PORT'}"
    return (
        f"start the peer with the other device's address: {here}; "
        f"or there with this one's: --peer {own_address(observed)}"
    )


def interface_findings(observed: Observations) -> Iterator[Finding]:
    """Is there a network at all?"""
    if observed.interfaces is None:
        return
    good = usable(observed)
    for each in good:
        yield fine("interface", f"{each.name} has {', '.join(each.networks)}")
    if good:
        return
    states = [_state(each) for each in observed.interfaces]
    yield problem(
        "interface",
        "this device has no network address but loopback"
        + (f": {', '.join(states)}" if states else ""),
        why="no other device can reach it",
        next_step="connect it to the network of the other devices and run p2ptrain doctor again",
    )


def wifi_findings(observed: Observations) -> Iterator[Finding]:
    """Is the radio asleep or far away?"""
    for each in usable(observed):
        if each.power_save:
            yield problem(
                "wifi",
                f"power saving is on for {each.name}",
                why="the radio sleeps between beacons: every answer takes up to 0.3 s longer, and "
                "multicast is lost",
                next_step=f"switch it off: iw dev {each.name} set power_save off",
            )
        if each.signal_dbm is not None and each.signal_dbm < limits.DOCTOR_SIGNAL_DBM_MIN:
            yield hint(
                "wifi",
                f"the signal at {each.name} is weak: {each.signal_dbm} dBm",
                why="a slow device takes the air from all others on that access point",
                next_step="move it closer to the access point, or use a cable",
            )
        if each.power_save is False:
            yield fine("wifi", f"power saving is off for {each.name}")


def multicast_findings(observed: Observations) -> Iterator[Finding]:
    """Do announcements of others arrive?"""
    broken = [each for each in usable(observed) if each.multicast_error is not None]
    for each in broken:
        yield problem(
            "multicast",
            f"{each.name} does not take part in multicast: {each.multicast_error}",
            why=_ALONE_WHY,
            next_step=join_with_peer(observed),
        )
    if observed.peer is not None and not observed.peer.discovery_works:
        yield from _peer_discovery(observed, said_already=bool(broken))
    heard = observed.multicast
    if heard is None or broken or not usable(observed):
        return
    if heard.error is not None:
        yield problem(
            "multicast",
            f"listening for other devices failed: {heard.error}",
            why=_ALONE_WHY,
            next_step=join_with_peer(observed),
        )
    elif heard.heard:
        yield fine("multicast", f"heard {counted(len(heard.heard), 'other peer')}")
    else:
        yield _nobody_heard(observed, heard.seconds)


def _peer_discovery(observed: Observations, *, said_already: bool) -> Iterator[Finding]:
    said = observed.peer.discovery if observed.peer is not None else ""
    if said == "switched off":
        yield hint(
            "multicast",
            "the peer was started with --no-discovery",
            why="it only knows the addresses that it was given or has met before",
            next_step="start it without --no-discovery, or give it --peer HOST:PORT",
        )
    elif not said_already and said != "starting":
        yield problem(
            "multicast",
            f"the peer says: {said}",
            why=_ALONE_WHY,
            next_step=join_with_peer(observed),
        )


def _nobody_heard(observed: Observations, seconds: float) -> Finding:
    names = ", ".join(each.name for each in usable(observed))
    said = f"no other peer was heard by multicast on {names} within {seconds:g} s"
    answered = [dial.address for dial in observed.dials if dial.end is DialEnd.ANSWERED]
    is_linked = observed.peer is not None and bool(observed.peer.members_alive)
    if answered:
        return (hint if is_linked else problem)(
            "multicast",
            f"{said}, but {answered[0]} answers when it is dialled",
            why="this network filters multicast, as guest networks and many access points do: "
            + _ALONE_WHY,
            next_step=join_with_peer(observed),
        )
    return (hint if observed.peer is None else problem)(
        "multicast",
        said,
        why="either no other peer runs there, or this network filters multicast, as guest networks "
        "and many access points do",
        next_step=join_with_peer(observed),
    )


def port_findings(observed: Observations) -> Iterator[Finding]:
    """Can the peer listen where others can reach it?"""
    if observed.peer is not None:
        host, port = observed.peer.listen_host, observed.peer.port
        if host.startswith(LOOPBACK_PREFIXES):
            yield problem(
                "port",
                f"the peer listens at {host} only",
                why="no other device can dial it",
                next_step="start it without --listen",
            )
        else:
            yield fine("port", f"the peer listens at port {port}")
    elif observed.port is not None and not observed.port.is_free:
        yield problem(
            "port",
            f"port {observed.port.port} is taken by {observed.port.owner or 'another program'}",
            why="the peer of this device cannot start there",
            next_step="p2ptrain join --port 0 takes any free port; or end the other program",
        )
    elif observed.port is not None:
        yield fine("port", f"port {observed.port.port} is free")


def firewall_findings(observed: Observations) -> Iterator[Finding]:
    """Would this device's own firewall let others in?"""
    port = int(own_address(observed).rpartition(":")[2])
    if observed.firewall_hidden:
        yield hint(
            "firewall",
            "the firewall of this device can only be read by root",
            why="if it keeps others out, they find this device and get no answer",
            next_step=f"look at it: sudo nft list ruleset, or sudo iptables -S; TCP port {port} "
            f"and UDP port {MULTICAST_DNS_PORT} must pass",
        )
    if observed.firewall is None:
        return
    blockers = {
        protocol: observed.firewall.blocker(protocol, number)
        for protocol, number in (("tcp", port), ("udp", MULTICAST_DNS_PORT))
    }
    program = observed.firewall.program
    if blockers["tcp"] is not None:
        yield problem(
            "firewall",
            f"the firewall of this device ({program}, {blockers['tcp']}) keeps TCP port {port} out",
            why="other devices find this one and get no answer",
            next_step=_let_in(program, blockers["tcp"], "tcp", port),
        )
    if blockers["udp"] is not None:
        yield problem(
            "firewall",
            f"the firewall of this device ({program}, {blockers['udp']}) keeps multicast DNS "
            f"(UDP port {MULTICAST_DNS_PORT}) out",
            why="this device does not hear the others announce themselves",
            next_step=_let_in(program, blockers["udp"], "udp", MULTICAST_DNS_PORT),
        )
    if not any(blockers.values()):
        yield fine("firewall", f"{program} lets TCP port {port} and multicast DNS in")


def _let_in(program: str, chain: str, protocol: str, port: int) -> str:
    if program == "nftables":
        return f"let it in: nft insert rule inet {chain} {protocol} dport {port} accept"
    return f"let it in: iptables -I {chain} -p {protocol} --dport {port} -j ACCEPT"


def _is_on(interface: Interface) -> bool:
    return interface.is_up and interface.has_carrier is not False


def _state(interface: Interface) -> str:
    if not interface.is_up:
        return f"{interface.name} is switched off"
    if interface.has_carrier is False:
        return f"{interface.name} is not connected"
    return f"{interface.name} has no IPv4 address"
