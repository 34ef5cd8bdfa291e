"""A home of its own for every test, and commands as a person's shell runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from p2ptrain.net.control_socket import Handler, serve_control
from p2ptrain.store.groups import create_group
from p2ptrain.store.home import control_socket_path, open_home

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """P2PTRAIN_HOME and the run-time folder, both empty and private."""
    path, runtime = tmp_path / "home", tmp_path / "run"
    for folder in (path, runtime):
        folder.mkdir(mode=0o700)
    monkeypatch.setenv("P2PTRAIN_HOME", str(path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)
    return path


@pytest.fixture
def member(home: Path) -> str:
    """The name of a group that this device is in."""
    create_group(open_home(home), "family", "a passphrase long enough", "attic")
    return "family"


def command_line(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "p2ptrain", *arguments]


async def run_command(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Run one command as its own process, without a terminal."""
    with trio.fail_after(60):
        return await trio.run_process(
            command_line(*arguments),
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env={**os.environ},
        )


@asynccontextmanager
async def peer_answering(home: Path, group_name: str, handler: Handler) -> AsyncIterator[None]:
    """The control socket of this device's peer, answered by `handler`."""
    from p2ptrain.store.groups import load_group

    opened = open_home(home)
    path = control_socket_path(opened, load_group(opened, group_name).id)
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control, path, handler)
        yield
        nursery.cancel_scope.cancel()
