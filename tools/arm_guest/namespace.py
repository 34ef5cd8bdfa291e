"""Enter the guest: mounts in a namespace of one command's own, then chroot, then the command.

Nothing is ever mounted where the rest of the machine sees it, so nothing can be left mounted and
deleting the guest's folder cannot reach through a mount.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

CHECKOUT = "/src"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One command to run in the guest."""

    system: str
    """The guest's file system."""
    checkout: str
    """What the guest sees, read only, at CHECKOUT."""
    binds: tuple[str, ...]
    """Folders that it sees at their own paths, to read and write."""
    environment: dict[str, str]
    command: tuple[str, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Entry:
        found = json.loads(text)
        found |= {name: tuple(found[name]) for name in ("binds", "command")}
        return cls(**found)


def enter_command(entry: Entry) -> list[str]:
    """A command line that runs an entry; each link of the chain replaces the one before, so that
    a signal to its process reaches the command."""
    unshare = ["unshare", "--mount", "--propagation", "private", "--"]
    return [*unshare, sys.executable, str(Path(__file__).parent), "enter", entry.to_json()]


def enter(entry: Entry) -> NoReturn:
    """Mount, change the root and become the command; runs in a new mount namespace."""
    for line in mounts(entry):
        Path(line[-1]).mkdir(parents=True, exist_ok=True)
        subprocess.run(line, check=True)
    os.chroot(entry.system)
    os.chdir(CHECKOUT)
    path = entry.environment["PATH"]
    program = shutil.which(entry.command[0], path=path)
    if program is None:
        raise FileNotFoundError(f"the guest has no command {entry.command[0]!r}")
    os.execve(program, entry.command, entry.environment)


def mounts(entry: Entry) -> list[list[str]]:
    """The mount commands, in order; the target comes last.

    /sys stays empty: onnxruntime 1.28 and later crash under emulation when they find the host's
    processor topology there.
    """
    system = Path(entry.system)
    lines = [
        ["mount", "-t", "proc", "proc", str(system / "proc")],
        ["mount", "--bind", "/dev", str(system / "dev")],
        ["mount", "-t", "tmpfs", "tmpfs", str(system / "tmp")],
        ["mount", "--bind", "-o", "ro", entry.checkout, f"{system}{CHECKOUT}"],
    ]
    return lines + [["mount", "--bind", path, f"{system}{path}"] for path in entry.binds]
