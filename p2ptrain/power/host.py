"""What the machine is: its identity, free memory, power source and CPU time."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path
from typing import Final

from p2ptrain.power.cgroups import cpu_quota, memory_rooms
from p2ptrain.power.sysfs import directories, read_integer, read_text
from p2ptrain.units import KIB, NS_PER_S

CLOCK_TICKS_PER_S: Final = 100
"""USER_HZ, fixed at 100 on every architecture that Linux shows to programs we run on."""


def host_identity(root: Path = Path("/")) -> str:
    """16 hex digits that are equal for all peers on one running machine.

    The boot id names the running kernel, so that containers on one machine, which share its
    cores and its energy, are recognised although their machine-id and hostname differ. Without
    one: machine-id and hostname. Only a hash leaves the machine.
    """
    boot = read_text(root / "proc/sys/kernel/random/boot_id")
    if boot:
        return _hash(f"boot {boot}")
    machine = read_text(root / "etc/machine-id") or ""
    name = read_text(root / "proc/sys/kernel/hostname") or socket.gethostname()
    return _hash(f"machine {machine} {name}")


def quota_identity(root: Path = Path("/")) -> str:
    """16 hex digits for each group of processes with a CPU quota; empty where we are below none.

    Peers below different quotas do not take cores from each other: what each may use is fixed.
    """
    quota = cpu_quota(root)
    return "" if quota is None else _hash(f"{host_identity(root)} {quota.group}")


def available_memory_bytes(root: Path = Path("/")) -> int | None:
    """What a process may still use: MemAvailable, and the room below every limit of a cgroup.

    None when the platform does not say; the caller then asks the user or uses its default.
    """
    rooms = [_meminfo_bytes(root), *memory_rooms(root)]
    known = [room for room in rooms if room is not None]
    return min(known) if known else None


def power_source(root: Path = Path("/")) -> str:
    """`mains`, `battery`, or `unknown` when no power supply of the machine itself is listed."""
    on_mains = on_battery = False
    for supply in directories(root / "sys/class/power_supply"):
        if read_text(supply / "scope") == "Device":  # a mouse's or headset's battery
            continue
        kind = read_text(supply / "type")
        if kind in ("Mains", "USB"):
            on_mains |= read_integer(supply / "online") == 1
        elif kind == "Battery":
            status = read_text(supply / "status")
            on_battery |= status == "Discharging"
            on_mains |= status in ("Charging", "Full", "Not charging")
    if on_battery:
        return "battery"
    return "mains" if on_mains else "unknown"


def machine_cpu_ns(root: Path = Path("/")) -> int | None:
    """CPU time of all processes since boot; None when /proc/stat does not say."""
    fields = (read_text(root / "proc/stat") or "").split("\n", 1)[0].split()
    if len(fields) < 8 or fields[0] != "cpu" or not all(f.isdigit() for f in fields[1:8]):
        return None
    user, nice, system, _idle, _iowait, irq, softirq = (int(field) for field in fields[1:8])
    return (user + nice + system + irq + softirq) * NS_PER_S // CLOCK_TICKS_PER_S


def _hash(text: str) -> str:
    return hashlib.sha256(f"p2ptrain host {text}".encode()).hexdigest()[:16]


def _meminfo_bytes(root: Path) -> int | None:
    for line in (read_text(root / "proc/meminfo") or "").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if name == "MemAvailable" and words and words[0].isdigit():
            return int(words[0]) * KIB
    return None
