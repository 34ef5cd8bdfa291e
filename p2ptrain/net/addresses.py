"""Where this device can be reached: the addresses of its interfaces."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from p2ptrain.net.listener import join_address

WILDCARDS = ("0.0.0.0", "::", "")
ADDRESSES_MAX = 8


def reachable_addresses(host: str, port: int) -> tuple[str, ...]:
    """host:port for every address that others may dial, most useful first.

    A peer that listens on one address is reached there; one that listens on all is reached at
    every interface's address, the loopback one last (peers on the same machine).
    """
    if host not in WILDCARDS:
        return (join_address(host, port),)
    found = sorted(_interface_addresses(), key=lambda ip: (ip.is_loopback, ip.version, str(ip)))
    return tuple(join_address(str(ip), port) for ip in found[:ADDRESSES_MAX])


def wifi_medium(host: str, root: Path = Path("/")) -> str:
    """`wifi` and the subnet of the wireless interface that has this address; empty: none has it.

    Whoever is in the same subnet through Wi-Fi is taken to share its air. Two access points of one
    network are taken for one, and an access point that is bridged to a cable is not seen: a name
    for what is shared, no measurement. Linux lists wireless interfaces; elsewhere it is empty.
    """
    import ifaddr

    for adapter in ifaddr.get_adapters():
        interface = root / "sys/class/net" / adapter.name
        if not (interface / "wireless").exists() and not (interface / "phy80211").exists():
            continue
        for ip in adapter.ips:
            text = ip.ip if isinstance(ip.ip, str) else ip.ip[0]
            if text == host:
                return f"wifi {ipaddress.ip_network((text, ip.network_prefix), strict=False)}"
    return ""


def _interface_addresses() -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    import ifaddr  # with zeroconf, which depends on it; imported late: not every peer listens

    found: list[ipaddress.IPv4Address | ipaddress.IPv6Address] = []
    for adapter in ifaddr.get_adapters():
        for ip in adapter.ips:
            text = ip.ip if isinstance(ip.ip, str) else ip.ip[0]
            address = ipaddress.ip_address(text)
            if not address.is_link_local:
                found.append(address)
    return found
