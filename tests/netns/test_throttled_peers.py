"""Throttled peers on this machine: held to their quotas, and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tools.throttle import cgroups
from tools.throttle.cgroups import Limits
from tools.wifi_emulator.namespaces import NAMED, Unavailable

ROOT = Path(__file__).resolve().parents[2]
SPIN = (
    "import time\n"
    "wall, cpu = time.monotonic(), time.process_time()\n"
    "while time.monotonic() - wall < 1: pass\n"
    "print((time.process_time() - cpu) / (time.monotonic() - wall))\n"
)


@pytest.fixture(scope="module")
def where(permitted: None) -> cgroups.Hierarchy:
    """Nothing here runs without control groups."""
    try:
        return cgroups.require_permitted()
    except Unavailable as error:
        pytest.skip(f"no peer can be throttled here: {error}")


def test_group_gets_no_more_than_its_quota(where: cgroups.Hierarchy) -> None:
    with cgroups.groups(["one"], where) as made:
        made["one"].limit(Limits(cores=0.3, memory_bytes=1 << 28))
        line = [*made["one"].prefix, sys.executable, "-c", SPIN]
        used = float(subprocess.run(line, check=True, capture_output=True, timeout=60).stdout)
        assert 0 < used < 0.36
        assert not made["one"].out_of_memory


def test_memory_limit_ends_who_passes_it(where: cgroups.Hierarchy) -> None:
    with cgroups.groups(["one"], where) as made:
        made["one"].limit(Limits(cores=0.5, memory_bytes=1 << 26))
        line = [*made["one"].prefix, sys.executable, "-c", "bytearray(1 << 28)"]
        assert subprocess.run(line, check=False, timeout=60).returncode == -signal.SIGKILL
        assert made["one"].out_of_memory


def test_peers_see_each_other_below_limits_and_a_signal_ends_everything(
    where: cgroups.Hierarchy,
) -> None:
    line = [sys.executable, "tools/throttled_peers.py", "--json", "--rate", "100"]
    line += ["--cores", "0.5", "--cores", "0.5", "--memory", "600MiB"]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True) as tool:
        assert tool.stdout is not None
        up = json.loads(tool.stdout.readline())
        environment = {**os.environ, "P2PTRAIN_HOME": up["homes"]["peer-1"]}
        asked = subprocess.run(
            [sys.executable, "-m", "p2ptrain", "status", "--group", up["group"], "--json"],
            env=environment, check=True, capture_output=True, timeout=60, cwd=ROOT,
        )  # fmt: skip
        states = [member["state"] for member in json.loads(asked.stdout)["members"]]
        assert sorted(states) == ["alive", "self"]
        tool.send_signal(signal.SIGINT)
        assert tool.wait(60) == 0
    owned = f"-{tool.pid}-"
    left = [path for root in where.roots for path in root.iterdir() if owned in path.name]
    assert left == []
    assert [name for name in os.listdir(NAMED) if owned in name] == []
    assert not any(Path(f"/proc/{pid}").exists() for pid in up["pids"].values())
