"""Find members on the local network that show a code now. Hints only: the code decides."""

from __future__ import annotations

import queue
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import trio

from p2ptrain import limits
from p2ptrain.ids import is_base32
from p2ptrain.net.discovery import SERVICE, TXT_VERSION, own_addresses, require_multicast

if TYPE_CHECKING:  # Imported lazily: only a device that joins by a code needs it.
    from zeroconf import Zeroconf

SPONSORS_MAX = 4
"""Each of them gets one guess at the code: not more than could be honest."""


async def find_sponsors(interfaces: Sequence[str] | None) -> tuple[tuple[str, ...], ...]:
    """Addresses of each member that announces an open code; empty when none does in time.

    Waits at most limits.SPONSOR_SEARCH_S, and a moment after the first was found. Cancelling
    leaves a thread that ends by itself within that time.

    Args:
        interfaces: IPv4 addresses to listen at; None: all but loopback.
    """
    return await trio.to_thread.run_sync(_search, interfaces, abandon_on_cancel=True)


def sponsor_of(
    properties: Mapping[bytes, bytes | None], addresses: Sequence[str], port: int | None
) -> tuple[str, tuple[str, ...]] | None:
    """(device, its host:port) of an announcement of an open code; None for any other."""
    device = (properties.get(b"id") or b"").decode("ascii", "replace")
    if properties.get(b"v") != TXT_VERSION.encode() or properties.get(b"inv") != b"1":
        return None
    if not is_base32(device, 26) or port is None or not 0 < port < 65_536 or not addresses:
        return None
    return device, tuple(f"[{a}]:{port}" if ":" in a else f"{a}:{port}" for a in addresses[:8])


def _search(interfaces: Sequence[str] | None) -> tuple[tuple[str, ...], ...]:
    import zeroconf

    try:
        listening = list(interfaces) if interfaces is not None else own_addresses()
        for address in listening:
            require_multicast(address)
        running = zeroconf.Zeroconf(interfaces=listening, ip_version=zeroconf.IPVersion.V4Only)
    except (zeroconf.Error, OSError, ValueError, RuntimeError):
        return ()  # no multicast here: --peer says where the sponsor is
    try:
        return tuple(_collect(running).values())
    finally:
        running.close()


def _collect(running: Zeroconf) -> dict[str, tuple[str, ...]]:
    import zeroconf

    names: queue.Queue[str] = queue.Queue(limits.DISCOVERED_ADDRESSES_MAX)

    def changed(*, name: str, state_change: zeroconf.ServiceStateChange, **_: object) -> None:
        if state_change.name != "Removed" and not names.full():
            names.put_nowait(name)

    zeroconf.ServiceBrowser(running, SERVICE, handlers=[changed])
    found: dict[str, tuple[str, ...]] = {}
    until_s = time.monotonic() + limits.SPONSOR_SEARCH_S
    while (left_s := until_s - time.monotonic()) > 0 and len(found) < SPONSORS_MAX:
        try:
            name = names.get(timeout=left_s)
        except queue.Empty:
            break
        info = running.get_service_info(SERVICE, name, round(left_s * 1000))
        if info is None:
            continue
        addresses = info.parsed_addresses(zeroconf.IPVersion.V4Only)
        sponsor = sponsor_of(info.properties, addresses, info.port)
        if sponsor is not None:
            found[sponsor[0]] = sponsor[1]
            until_s = min(until_s, time.monotonic() + limits.SPONSOR_GRACE_S)
    return found
