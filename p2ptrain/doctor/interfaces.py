"""Look at the network interfaces of this device."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from p2ptrain.diagnosis.observations import Interface
from p2ptrain.doctor.programs import run_program
from p2ptrain.net.discovery import multicast_error
from p2ptrain.power.sysfs import read_text

if os.name == "posix":
    import fcntl

_SIOCGIFFLAGS: Final = 0x8913
_UP, _LOOPBACK, _RUNNING = 0x1, 0x8, 0x40
_IFREQ: Final = struct.Struct("16sH22x")


def interfaces(root: Path = Path("/")) -> tuple[Interface, ...]:
    """Every interface but loopback, those with an address first.

    Args:
        root: Where /sys and /proc are, for what is read of radios.
    """
    addresses = dict(_addresses())
    names = dict.fromkeys([*addresses, *(name for _, name in _indexed())])
    found = [_interface(name, addresses.get(name, ()), root) for name in names]
    return tuple(sorted((each for each in found if each), key=lambda each: not each.networks))


def _interface(name: str, networks: tuple[str, ...], root: Path) -> Interface | None:
    flags = _flags(name)
    if (flags is not None and flags & _LOOPBACK) or _all_loopback(networks):
        return None
    is_wireless = (root / "sys/class/net" / name / "wireless").is_dir()
    errors = [multicast_error(network.partition("/")[0]) for network in networks]
    return Interface(
        name=name,
        networks=networks,
        is_up=flags is None or bool(flags & _UP),
        has_carrier=None if flags is None else bool(flags & _RUNNING),
        multicast_error=next((error for error in errors if error is not None), None),
        is_wireless=is_wireless,
        power_save=_power_save(name) if is_wireless else None,
        signal_dbm=_signal_dbm(name, root) if is_wireless else None,
    )


def _addresses() -> Iterator[tuple[str, tuple[str, ...]]]:
    import ifaddr  # with zeroconf, which depends on it

    for adapter in ifaddr.get_adapters():
        networks = tuple(f"{ip.ip}/{ip.network_prefix}" for ip in adapter.ips if ip.is_IPv4)
        yield adapter.nice_name, networks


def _all_loopback(networks: tuple[str, ...]) -> bool:
    return bool(networks) and all(ipaddress.ip_interface(n).is_loopback for n in networks)


def _indexed() -> list[tuple[int, str]]:
    try:
        return socket.if_nameindex()
    except OSError:
        return []


def _flags(name: str) -> int | None:
    """The kernel's flags of an interface; None where it cannot be asked."""
    if os.name != "posix":
        return None
    request = _IFREQ.pack(name.encode()[:15], 0)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            answer = fcntl.ioctl(asking, _SIOCGIFFLAGS, request)
    except OSError:
        return None
    _, flags = _IFREQ.unpack(answer)
    return int(flags)


def _power_save(name: str) -> bool | None:
    """What `iw` says; None where it is not installed or does not know."""
    said = run_program("iw", "dev", name, "get", "power_save") or ""
    found = re.search(r"Power save: (on|off)", said)
    return None if found is None else found[1] == "on"


def _signal_dbm(name: str, root: Path) -> int | None:
    """The signal level in /proc/net/wireless; None when it is not in dBm."""
    for line in (read_text(root / "proc/net/wireless") or "").splitlines():
        label, _, rest = line.partition(":")
        fields = rest.split()
        if label.strip() == name and len(fields) > 2:
            level = fields[2].rstrip(".")
            return int(level) if re.fullmatch(r"-\d{1,3}", level) else None
    return None
