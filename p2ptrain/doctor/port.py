"""Who has the port that a peer would listen at?"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator
from pathlib import Path

from p2ptrain.diagnosis.observations import PortUse
from p2ptrain.power.sysfs import read_text

_LISTENING = "0A"
"""The state in proc(5), /proc/net/tcp."""


def port_use(port: int) -> PortUse | None:
    """Whether a TCP port is free, and who has it otherwise; None for 0, which is always free."""
    if port == 0:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as trying:
        trying.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trying.bind(("", port))
            trying.listen()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return None
            return PortUse(port=port, is_free=False, owner=_owner(port))
    return PortUse(port=port, is_free=True)


def _owner(port: int) -> str | None:
    """`name (process 123)` of the program that listens; None when it belongs to another user."""
    wanted = {f"socket:[{inode}]" for inode in _inodes(port)}
    for process in Path("/proc").glob("[0-9]*"):
        if wanted & _held(process):
            name = read_text(process / "comm") or "a program"
            return f"{name} (process {process.name})"
    return None


def _held(process: Path) -> set[str]:
    """What a process has open; empty when it is another user's."""
    held = set()
    with contextlib.suppress(OSError):
        for entry in (process / "fd").iterdir():
            with contextlib.suppress(OSError):  # closed in the meantime
                held.add(str(entry.readlink()))
    return held


def _inodes(port: int) -> Iterator[str]:
    for table in ("tcp", "tcp6"):
        for line in (read_text(Path("/proc/net") / table) or "").splitlines()[1:]:
            fields = line.split()
            listens = len(fields) > 9 and fields[3] == _LISTENING
            if listens and int(fields[1].rpartition(":")[2], 16) == port:
                yield fields[9]
