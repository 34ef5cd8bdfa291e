"""The aarch64 guest that every test of this folder needs: built once, kept for the next time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.arm.guest import TOOL

IMPOSSIBLE = 3


@pytest.fixture(scope="session", autouse=True)
def guest() -> None:
    """A guest that is built. Only a machine that cannot have one skips; a failed build fails."""
    checked = _tool("check")
    if checked.returncode == IMPOSSIBLE:
        pytest.skip(checked.stderr.strip())
    assert checked.returncode == 0, checked.stderr
    built = _tool("build")
    assert built.returncode == 0, built.stderr


def _tool(action: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(TOOL), action]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=600)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """English to train on, from this checkout, so that host and guest have the same."""
    source = Path(__file__).resolve().parents[2] / "LICENSE"
    path = tmp_path_factory.mktemp("text") / "english.txt"
    path.write_bytes(source.read_bytes())
    return path
