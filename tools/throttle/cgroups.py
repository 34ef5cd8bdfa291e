"""Groups of processes with a CPU quota and a memory limit, in cgroup v1 or v2, and a clean end.

Names hold the process that made them, so that whatever a killed one left is removed by the next.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tools.wifi_emulator.namespaces import Unavailable

MOUNT: Final = Path("/sys/fs/cgroup")
PREFIX: Final = "p2t"
PERIOD_US: Final = 10_000
"""Short, so that a quota is like a slower processor: an action spans many periods."""
QUOTA_US_MIN: Final = 1000
SHARES: Final = 100_000
"""A hundred times anybody's: on a busy machine the quota is what holds a group back."""
WEIGHT: Final = 10_000
_GONE_WITHIN_S: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the processes of a group may use."""

    cores: float | None = None
    """Processor seconds per second; None: no quota, but preferred to other programs."""
    memory_bytes: int | None = None
    """None: no limit."""

    def __post_init__(self) -> None:
        if self.cores is not None and self.cores * PERIOD_US < QUOTA_US_MIN:
            raise ValueError(f"a quota is at least {QUOTA_US_MIN / PERIOD_US:g} cores")
        if self.memory_bytes is not None and self.memory_bytes < 1:
            raise ValueError("a memory limit is at least 1 byte")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hierarchy:
    """Where groups are made on this machine: one folder for all, or one for each resource."""

    version: int
    cpu: Path
    memory: Path

    @property
    def roots(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys((self.cpu, self.memory)))

    def settings(self, limits: Limits) -> list[tuple[Path, str, str]]:
        """(root, file, content) of everything that holds a group to its limits."""
        cores, memory = limits.cores, limits.memory_bytes
        if self.version == 1:
            quota = -1 if cores is None else round(cores * PERIOD_US)
            return [
                (self.cpu, "cpu.cfs_period_us", str(PERIOD_US)),
                (self.cpu, "cpu.cfs_quota_us", str(quota)),
                (self.cpu, "cpu.shares", str(SHARES)),
                (self.memory, "memory.limit_in_bytes", "-1" if memory is None else str(memory)),
            ]
        used = "max" if cores is None else str(round(cores * PERIOD_US))
        return [
            (self.cpu, "cpu.max", f"{used} {PERIOD_US}"),
            (self.cpu, "cpu.weight", str(WEIGHT)),
            (self.memory, "memory.max", "max" if memory is None else str(memory)),
        ]


class Group:
    """One group of processes; `prefix` starts a command in it."""

    def __init__(self, hierarchy: Hierarchy, name: str) -> None:
        self._hierarchy = hierarchy
        self._paths = {root: root / name for root in hierarchy.roots}

    @property
    def prefix(self) -> list[str]:
        """What goes before a command that is to run, with all its children, in the group."""
        enter = " && ".join(f"echo $$ > '{path}/cgroup.procs'" for path in self._paths.values())
        return ["sh", "-c", f'{enter} && exec "$@"', "enter"]

    def limit(self, limits: Limits) -> None:
        """Hold the group to these limits from now on."""
        for root, file, content in self._hierarchy.settings(limits):
            (self._paths[root] / file).write_text(content)

    def take(self, process: int) -> None:
        """Move a process that runs already; children that it has stay where they are."""
        for path in self._paths.values():
            (path / "cgroup.procs").write_text(str(process))

    @property
    def out_of_memory(self) -> bool:
        """Whether the kernel has ended a process because of the memory limit."""
        v2 = self._hierarchy.version == 2
        text = (self._paths[self._hierarchy.memory] / _OOM_FILE[v2]).read_text()
        counts = dict(line.split()[:2] for line in text.splitlines())
        return int(counts.get("oom_kill", "0")) > 0


_OOM_FILE: Final = {False: "memory.oom_control", True: "memory.events"}


def hierarchy(mount: Path = MOUNT) -> Hierarchy:
    """Which version can limit both processor and memory here.

    Raises:
        Unavailable: neither can; the reason.
    """
    if os.geteuid() != 0:
        raise Unavailable("control groups with limits need root")
    v1 = Hierarchy(version=1, cpu=mount / "cpu", memory=mount / "memory")
    if all((root / "cgroup.procs").exists() for root in v1.roots):
        return v1
    controllers = mount / "cgroup.controllers"
    if not controllers.exists():
        raise Unavailable(f"no control groups for processor and memory are mounted at {mount}")
    lacking = {"cpu", "memory"} - set(controllers.read_text().split())
    if lacking:
        raise Unavailable(f"control groups here cannot limit: {', '.join(sorted(lacking))}")
    return Hierarchy(version=2, cpu=mount, memory=mount)


def require_permitted() -> Hierarchy:
    """The hierarchy in which a group with limits was made on trial.

    Raises:
        Unavailable: it was refused; the reason.
    """
    found = hierarchy()
    try:
        with groups(["trial"], found) as made:
            made["trial"].limit(Limits(cores=0.5, memory_bytes=1 << 26))
    except OSError as error:
        raise Unavailable(f"a control group with limits cannot be made: {error}") from error
    return found


@contextlib.contextmanager
def groups(names: list[str], where: Hierarchy) -> Iterator[Mapping[str, Group]]:
    """One group per name; whatever runs in them is killed, and they are gone, at the end.

    Raises:
        OSError: the kernel refused; nothing is left behind.
    """
    sweep(where)
    if where.version == 2:
        (where.cpu / "cgroup.subtree_control").write_text("+cpu +memory")
    with contextlib.ExitStack() as stack:
        made = {}
        for name in names:
            own = f"{PREFIX}-{os.getpid()}-{name}"
            for root in where.roots:
                (root / own).mkdir()
                stack.callback(_remove, root / own)
            made[name] = Group(where, own)
        yield made


def sweep(where: Hierarchy) -> list[Path]:
    """Remove groups whose maker is gone; gives their folders."""
    found = [path for root in where.roots for path in sorted(root.glob(f"{PREFIX}-*-*"))]
    gone = [path for path in found if not Path(f"/proc/{path.name.split('-')[1]}").exists()]
    for path in gone:
        _remove(path)
    return gone


def _remove(path: Path) -> None:
    """Kill what is in a group and remove it; a process that was killed stays in it for a moment."""
    ends_at_s = time.monotonic() + _GONE_WITHIN_S
    while True:
        for process in (path / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        try:
            path.rmdir()
        except OSError:
            if time.monotonic() > ends_at_s:
                raise
            time.sleep(0.02)
        else:
            return
