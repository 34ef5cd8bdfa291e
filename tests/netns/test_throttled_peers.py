"""Throttled peers on this machine: held to their quotas, and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

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


RATE_MBIT = 50


def said(home: str, group: str, command: str, *options: str) -> dict[str, Any]:  # Any: JSON values
    """What a command at one of the peers prints."""
    line = [sys.executable, "-m", "p2ptrain", command, "--group", group, "--json", *options]
    environment = {**os.environ, "P2PTRAIN_HOME": home}
    ended = subprocess.run(
        line, env=environment, check=True, capture_output=True, timeout=120, cwd=ROOT
    )
    found: dict[str, Any] = json.loads(ended.stdout)  # Any: JSON values
    return found


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
    if len(Path("/proc/swaps").read_text().splitlines()) > 1:
        pytest.skip("this machine swaps, where a limit on memory slows and does not end")
    with cgroups.groups(["one"], where) as made:
        made["one"].limit(Limits(cores=0.5, memory_bytes=1 << 26))
        line = [*made["one"].prefix, sys.executable, "-c", "bytearray(1 << 28)"]
        assert subprocess.run(line, check=False, timeout=60).returncode == -signal.SIGKILL
        assert made["one"].out_of_memory


def test_peers_train_below_limits_measure_their_link_and_leave_nothing_behind(
    where: cgroups.Hierarchy,
) -> None:
    line = [sys.executable, "tools/throttled_peers.py", "--json", "--rate", str(RATE_MBIT)]
    line += ["--cores", "0.6", "--cores", "0.6", "--memory", "600MiB"]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True) as tool:
        assert tool.stdout is not None
        up = json.loads(tool.stdout.readline())
        home = up["homes"]["peer-1"]
        ask = ["train", "--model", "onnx_models/gpt-nano", "--data", str(ROOT / "README.md")]
        ask += ["--steps", "4", "--stages", "2", "--threads", "1"]
        result = said(home, up["group"], *ask)
        prediction = result["prediction"]
        assert prediction["predicted_step_s"] > 0
        assert prediction["measured_step_s"] > 0
        (other,) = (m for m in said(home, up["group"], "status")["members"] if m["bytes_per_s"])
        assert 0.3 < other["bytes_per_s"] / (RATE_MBIT * 1e6 / 8) < 1.5
        tool.send_signal(signal.SIGINT)
        assert tool.wait(60) == 0
    owned = f"-{tool.pid}-"
    left = [path for root in where.roots for path in root.iterdir() if owned in path.name]
    assert left == []
    assert [name for name in os.listdir(NAMED) if owned in name] == []
    assert not any(Path(f"/proc/{pid}").exists() for pid in up["pids"].values())
