"""What control groups of Linux leave to this process: memory, and time of the cores.

Version 2 has one hierarchy, version 1 one for each resource; containers and services live in
either. A group outside our namespace is not visible; then the topmost one that is stands for it,
since that is where such a container finds its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from p2ptrain.power.sysfs import read_integer, read_text

_MOUNT: Final = "sys/fs/cgroup"
_UNLIMITED_BYTES: Final = 1 << 60
"""Version 1 writes the largest multiple of a page where there is no limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuQuota:
    """The tightest limit on processor time that we are under."""

    cores: float
    """Processor seconds per second, of all our threads together."""
    group: str
    """Names the group that has the limit, on this machine."""


def memory_rooms(root: Path = Path("/")) -> list[int]:
    """Room below the limit of our group and each of its parents that has one; bytes."""
    rooms = [_room_v2(path) for path in _groups(root, "")]
    rooms += [_room_v1(path) for path in _groups(root, "memory")]
    return [room for room in rooms if room is not None]


def cpu_quota(root: Path = Path("/")) -> CpuQuota | None:
    """The quota that holds us back most; None where there is none, or the platform has no such."""
    space = _namespace(root)
    found = [
        CpuQuota(cores=quota_us / period_us, group=f"{space} {path.relative_to(root)}")
        for controller, read in (("", _quota_v2), ("cpu", _quota_v1))
        for path in _groups(root, controller)
        if (limit := read(path)) is not None
        for quota_us, period_us in [limit]
    ]
    return min(found, key=lambda quota: quota.cores, default=None)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Our group and its parents, in version 2's hierarchy or in that of a version 1 controller."""
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        names, _, own = rest.partition(":")
        if controller not in names.split(",") or not own.startswith("/"):
            continue
        place = PurePosixPath(own[1:])
        if ".." not in place.parts:  # a group outside our namespace: not visible from here
            for part in (place, *place.parents):
                yield root / _MOUNT / controller / part


def _namespace(root: Path) -> str:
    """Containers see their own group as the root, each in a namespace of its own."""
    try:
        return os.readlink(root / "proc/self/ns/cgroup")
    except OSError:
        return ""


def _quota_v2(group: Path) -> tuple[int, int] | None:
    words = (read_text(group / "cpu.max") or "").split()  # "max 100000" is no limit
    if len(words) != 2 or not all(word.isdigit() for word in words):
        return None
    return _positive(int(words[0]), int(words[1]))


def _quota_v1(group: Path) -> tuple[int, int] | None:
    quota_us = read_integer(group / "cpu.cfs_quota_us")  # -1 is no limit
    period_us = read_integer(group / "cpu.cfs_period_us")
    return None if quota_us is None or period_us is None else _positive(quota_us, period_us)


def _positive(quota_us: int, period_us: int) -> tuple[int, int] | None:
    return (quota_us, period_us) if quota_us > 0 and period_us > 0 else None


def _room_v2(group: Path) -> int | None:
    limit = read_integer(group / "memory.max")  # "max" is no limit
    if limit is None:
        return None
    used = read_integer(group / "memory.current") or 0
    return max(0, limit - max(0, used - _reclaimable_bytes(group, "inactive_file")))


def _room_v1(group: Path) -> int | None:
    limit = read_integer(group / "memory.limit_in_bytes")
    if limit is None or limit >= _UNLIMITED_BYTES:
        return None
    used = read_integer(group / "memory.usage_in_bytes") or 0
    return max(0, limit - max(0, used - _reclaimable_bytes(group, "total_inactive_file")))


def _reclaimable_bytes(group: Path, name: str) -> int:
    """File pages nobody has used lately: the kernel gives them up before it refuses memory."""
    for line in (read_text(group / "memory.stat") or "").splitlines():
        words = line.split()
        if len(words) == 2 and words[0] == name and words[1].isdigit():
            return int(words[1])
    return 0
