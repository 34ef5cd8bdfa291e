"""Find other members on the local network by zeroconf: hints of addresses to dial, no more.

zeroconf runs in its own threads; everything it says crosses over by `run_sync_soon` into a bounded
channel. It is unauthenticated: whatever it names is dialled, and the certificate decides. Where
multicast does not work this says so and `--peer host:port` does the job.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import trio

from p2ptrain import limits
from p2ptrain.ids import DeviceId, GroupId
from p2ptrain.net.inviting import Inviting, nobody_invited

if TYPE_CHECKING:  # Imported lazily: `p2ptrain --help` and peers without discovery skip it.
    from zeroconf import ServiceInfo, Zeroconf

SERVICE: Final = "_p2ptrain._tcp.local."
MULTICAST_ADDRESS: Final = "224.0.0.251"
"""RFC 6762, section 3."""
TXT_VERSION: Final = "1"


@dataclass(slots=True)
class DiscoveryState:
    """How others are found, or why that does not work; read by `status`."""

    text: str = "starting"
    working: bool = False
    names: set[str] = field(default_factory=set)
    """Instances seen of any group; bounded."""
    dropped_count: int = 0
    """Announcements not looked at because too many came."""

    def announcing(self, addresses: Sequence[str]) -> None:
        self.text, self.working = f"announcing on {', '.join(addresses)}", True

    def failed(self, error: BaseException) -> None:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        self.text = f"multicast is not available: {reason}; use --peer host:port"
        self.working = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """What this peer says of itself on the network."""

    group: GroupId
    device: DeviceId
    port: int
    inviting: bool

    @property
    def instance(self) -> str:
        return f"{_label(self.device)}{self.group[:8]}.{SERVICE}"

    @property
    def properties(self) -> dict[str, str]:
        invites = "1" if self.inviting else "0"
        return {"v": TXT_VERSION, "g": self.group[:8], "id": self.device, "inv": invites}


def is_of(name: str, device: DeviceId) -> bool:
    """Whether an announced name is that of a device, in whatever group."""
    return name.startswith(_label(device))


def _label(device: DeviceId) -> str:
    return f"{device[:16]}-"


def hints_of(
    own: Announcement,
    properties: Mapping[bytes, bytes | None],
    addresses: Sequence[str],
    port: int | None,
) -> tuple[str, ...]:
    """host:port to dial for one announcement; empty when it is ours or not for this group."""
    ours = {key.encode(): value.encode() for key, value in own.properties.items()}
    if any(properties.get(key) != ours[key] for key in (b"v", b"g")):
        return ()
    if properties.get(b"id") in (None, ours[b"id"]) or port is None or not 0 < port < 65536:
        return ()
    return tuple(f"[{a}]:{port}" if ":" in a else f"{a}:{port}" for a in addresses[:8])


async def discover(
    *,
    group: GroupId,
    device: DeviceId,
    port: int,
    interfaces: tuple[str, ...] | None,
    found: trio.MemorySendChannel[str],
    state: DiscoveryState,
    inviting: Inviting | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Announce this peer and send host:port of other members of the group to `found`.

    Runs until cancelled; a failure is put into `state` and tried again later. `started` comes after
    the first attempt, whatever its outcome. An address may be sent more than once. Cancelled: the
    announcement is withdrawn first, within limits.DISCOVERY_CLOSE_TIMEOUT_S.

    Args:
        interfaces: IPv4 addresses to announce on and listen at; None: all but loopback.
        inviting: Whether a code is open here, which the announcement follows.
    """
    own = Announcement(group=group, device=device, port=port, inviting=False)
    invites = nobody_invited() if inviting is None else inviting
    while True:
        try:
            await _announce(own, invites, interfaces, found, state, task_status)
        except (OSError, ImportError, _ZeroconfFailed) as error:
            state.failed(error)
            task_status.started()
            task_status = trio.TASK_STATUS_IGNORED
        await trio.sleep(limits.DISCOVERY_RETRY_S)


class _ZeroconfFailed(Exception):
    """Whatever zeroconf raised, so that the caller need not import it."""


async def _announce(
    own: Announcement,
    inviting: Inviting,
    interfaces: tuple[str, ...] | None,
    found: trio.MemorySendChannel[str],
    state: DiscoveryState,
    task_status: trio.TaskStatus[None],
) -> None:
    send, names = trio.open_memory_channel[str](limits.DISCOVERED_ADDRESSES_MAX)
    token = trio.lowlevel.current_trio_token()

    def seen(name: str) -> None:  # in the trio thread
        try:
            send.send_nowait(name)
        except trio.WouldBlock:
            state.dropped_count += 1

    def on_name(name: str) -> None:  # in zeroconf's thread
        token.run_sync_soon(seen, name)

    inviting.look()
    own = replace(own, inviting=inviting.is_open)
    addresses, zeroconf = await trio.to_thread.run_sync(_open, own, interfaces, on_name)
    try:
        state.announcing(addresses)
        task_status.started()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_follow_invites, own, inviting, zeroconf, addresses)
            async for name in names:
                await _resolve(own, zeroconf, name, found, state)
    finally:
        state.text, state.working = "stopped", False
        with trio.CancelScope(shield=True) as cleanup:
            cleanup.deadline = trio.current_time() + limits.DISCOVERY_CLOSE_TIMEOUT_S
            await trio.to_thread.run_sync(zeroconf.close, abandon_on_cancel=True)


async def _follow_invites(
    own: Announcement, inviting: Inviting, zeroconf: Zeroconf, addresses: Sequence[str]
) -> None:
    """Say on the network when a code is opened or closed."""
    while True:
        if own.inviting == inviting.is_open:
            await inviting.wait_changed()
            continue
        own = replace(own, inviting=inviting.is_open)
        await trio.to_thread.run_sync(_update, zeroconf, own, addresses)


async def _resolve(
    own: Announcement,
    zeroconf: Zeroconf,
    name: str,
    found: trio.MemorySendChannel[str],
    state: DiscoveryState,
) -> None:
    if name == own.instance:
        return
    if name not in state.names and len(state.names) >= limits.DISCOVERED_ADDRESSES_MAX:
        state.dropped_count += 1
        return
    state.names.add(name)
    for hint in await trio.to_thread.run_sync(_look_up, own, zeroconf, name):
        await found.send(hint)


# In worker threads, because zeroconf's calls block.


def _open(
    own: Announcement, interfaces: tuple[str, ...] | None, on_name: Callable[[str], None]
) -> tuple[list[str], Zeroconf]:
    """Announce and browse; the addresses announced, and what to close in the end.

    Raises:
        OSError, _ZeroconfFailed: no multicast here; nothing is left open.
    """
    import zeroconf

    addresses = list(interfaces) if interfaces is not None else own_addresses()
    for address in addresses:
        require_multicast(address)
    try:
        running = zeroconf.Zeroconf(interfaces=addresses, ip_version=zeroconf.IPVersion.V4Only)
    except (zeroconf.Error, ValueError, RuntimeError) as error:
        raise _ZeroconfFailed(str(error) or type(error).__name__) from error
    try:
        _register(running, own, addresses)
        _browse(running, on_name)
    except (zeroconf.Error, OSError, ValueError) as error:
        running.close()
        raise _ZeroconfFailed(str(error) or type(error).__name__) from error
    return addresses, running


def require_multicast(address: str) -> None:
    """OSError when no interface with this address takes part in multicast.

    zeroconf would find out as well, but leaves sockets open when it does.
    """
    try:
        _join_multicast(address)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} on {address}") from error


def multicast_error(address: str) -> str | None:
    """Why the interface with this address does not take part in multicast; None: it does."""
    try:
        _join_multicast(address)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _join_multicast(address: str) -> None:
    membership = socket.inet_aton(MULTICAST_ADDRESS) + socket.inet_aton(address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)


def _register(running: Zeroconf, own: Announcement, addresses: Sequence[str]) -> None:
    # Instance names are hashes of keys, so nobody need be asked whether they are free.
    running.register_service(_info(own, addresses), cooperating_responders=True)


def _update(running: Zeroconf, own: Announcement, addresses: Sequence[str]) -> None:
    """Best effort: whoever joins may also give an address."""
    import zeroconf

    with contextlib.suppress(zeroconf.Error, OSError, ValueError):
        running.update_service(_info(own, addresses))


def _info(own: Announcement, addresses: Sequence[str]) -> ServiceInfo:
    import zeroconf

    return zeroconf.ServiceInfo(
        SERVICE,
        own.instance,
        port=own.port,
        properties=own.properties,
        server=own.instance,
        parsed_addresses=list(addresses),
    )


def _browse(running: Zeroconf, on_name: Callable[[str], None]) -> None:
    import zeroconf

    def changed(
        *,
        zeroconf: Zeroconf,
        service_type: str,
        name: str,
        state_change: zeroconf.ServiceStateChange,
    ) -> None:
        if state_change.name != "Removed":
            on_name(name)

    zeroconf.ServiceBrowser(running, SERVICE, handlers=[changed])


def _look_up(own: Announcement, running: Zeroconf, name: str) -> tuple[str, ...]:
    import zeroconf

    wait_ms = round(limits.DISCOVERY_RESOLVE_TIMEOUT_S * 1000)
    try:
        info = running.get_service_info(SERVICE, name, wait_ms)
    except (zeroconf.Error, OSError, ValueError):
        return ()  # A hint that cannot be read is no hint; it is announced again.
    if info is None:
        return ()
    addresses = info.parsed_addresses(zeroconf.IPVersion.V4Only)
    return hints_of(own, info.properties, addresses, info.port)


def own_addresses() -> list[str]:
    """IPv4 addresses of this machine, loopback only when there is no other."""
    import zeroconf

    list_addresses = zeroconf.get_all_addresses  # type: ignore[attr-defined]  # not in __all__
    every = [str(address) for address in list_addresses()]
    outside = [a for a in every if not ipaddress.ip_address(a).is_loopback]
    return outside or every
