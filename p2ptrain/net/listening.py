"""Hear who announces a peer by multicast, without announcing one; blocking, for a thread."""

from __future__ import annotations

import ipaddress
import queue
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from p2ptrain import limits
from p2ptrain.diagnosis.observations import Announcement, Multicast
from p2ptrain.ids import DeviceId, is_base32
from p2ptrain.net.discovery import SERVICE, TXT_VERSION, is_of, multicast_error
from p2ptrain.net.listener import join_address

if TYPE_CHECKING:
    from zeroconf import Zeroconf

_RESOLVE_MS = 1500
_HEARD_MAX = 64


def hear_peers(addresses: Sequence[str], *, seconds: float, own: DeviceId | None) -> Multicast:
    """Announcements of other devices that arrive within some seconds.

    It ends early once somebody was heard and DOCTOR_SETTLED_S later nobody new.

    Args:
        addresses: IPv4 addresses whose interfaces to listen on.
        own: This device in the group; its own announcement is not counted.
    """
    import zeroconf

    for address in addresses:  # zeroconf leaves sockets open where one has no multicast
        if (refused := multicast_error(address)) is not None:
            return Multicast(heard=(), seconds=seconds, error=f"{refused} on {address}")
    try:
        running = zeroconf.Zeroconf(
            interfaces=list(addresses), ip_version=zeroconf.IPVersion.V4Only
        )
    except (zeroconf.Error, OSError, ValueError, RuntimeError) as error:
        said = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return Multicast(heard=(), seconds=seconds, error=said)
    names: queue.SimpleQueue[str] = queue.SimpleQueue()

    def changed(
        *,
        zeroconf: zeroconf.Zeroconf,
        service_type: str,
        name: str,
        state_change: zeroconf.ServiceStateChange,
    ) -> None:
        names.put(name)

    try:
        zeroconf.ServiceBrowser(running, SERVICE, handlers=[changed])
        found = {
            each
            for name in names_within(names, seconds, own=own)
            for each in _announcements(running, name)
            if each.device != own
        }
    finally:
        running.close()
    return Multicast(heard=tuple(sorted(found, key=lambda each: each.address)), seconds=seconds)


def names_within(
    names: queue.SimpleQueue[str], seconds: float, *, own: DeviceId | None
) -> Iterator[str]:
    """Different names of others as they come, until the time is over or no more seem to come.

    Our own peer is heard at once wherever it runs, which says nothing of when others will be.
    """
    ends_s = time.monotonic() + seconds
    seen: set[str] = set()
    while (left_s := ends_s - time.monotonic()) > 0 and len(seen) < _HEARD_MAX:
        try:
            name = names.get(timeout=left_s)
        except queue.Empty:
            return
        if name not in seen and not (own and is_of(name, own)):
            seen.add(name)
            yield name
            ends_s = min(ends_s, time.monotonic() + limits.DOCTOR_SETTLED_S)


def _announcements(running: Zeroconf, name: str) -> Iterator[Announcement]:
    import zeroconf

    try:
        info = running.get_service_info(SERVICE, name, _RESOLVE_MS)
    except (zeroconf.Error, OSError, ValueError):
        return
    if info is None or info.port is None or info.properties.get(b"v") != TXT_VERSION.encode():
        return
    group, device = (_text(info.properties.get(key)) for key in (b"g", b"id"))
    if not is_base32(group, 8) or not is_base32(device, 26):
        return
    addresses = info.parsed_addresses(zeroconf.IPVersion.V4Only)
    # Multicast on loopback reaches every socket of a machine; nobody else can dial what it names.
    outside = [each for each in addresses if not ipaddress.ip_address(each).is_loopback]
    for address in outside[:1]:
        at = join_address(address, info.port)
        yield Announcement(group=group, device=DeviceId(device), address=at)


def _text(value: bytes | None) -> str:
    return "" if value is None else value.decode("ascii", "replace")
