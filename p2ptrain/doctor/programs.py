"""Run the system's own programs that know what no file says."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Final

from p2ptrain import limits

_SYSTEM_FOLDERS: Final = ("/usr/sbin", "/sbin")
"""Where such programs are, also when a user's PATH does not name it."""


def find_program(name: str) -> str | None:
    """Where a program is; None when it is not installed."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *_SYSTEM_FOLDERS])
    return shutil.which(name, path=path)


def run_program(name: str, *arguments: str) -> str | None:
    """What a program prints; None when it is missing, fails or takes too long."""
    program = find_program(name)
    if program is None:
        return None
    try:
        ended = subprocess.run(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=limits.DOCTOR_COMMAND_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ended.stdout.decode(errors="replace") if ended.returncode == 0 else None
