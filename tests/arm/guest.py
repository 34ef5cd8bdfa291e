"""Command lines that run in the aarch64 guest."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

TOOL: Final = Path(__file__).resolve().parents[2] / "tools" / "arm_guest"
PYTHON: Final = "python3.11"
VARIABLES: Final = ("P2PTRAIN_HOME", "XDG_RUNTIME_DIR", "PYTHONUNBUFFERED")


def in_guest(directory: Path, *arguments: str) -> list[str]:
    """The guest's Python with arguments; it sees `directory` where it is."""
    line = [sys.executable, str(TOOL), "run", "--bind", str(directory)]
    for name in VARIABLES:
        line += ["--env", name]
    return [*line, "--", PYTHON, *arguments]
