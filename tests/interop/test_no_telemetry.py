"""A peer that trains writes into its state directory only, and speaks to nobody.

A child process founds a group, opens a peer, trains one step of gpt-nano and ends. What this can
see: files in every folder that programs are told to use (home, XDG, temporary and working
directory), by whatever code; packets, and attempts to send some, that the kernel counted in a
network namespace without any interface, until the child had ended. What it cannot see: a file
that native code writes at an absolute path of its own choosing, and anything that would be sent
later. The control test shows that both kinds of observation notice what they are for.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]
TIMEOUT_S: Final = 120.0
QUIET_BY_THEMSELVES: Final = (
    "CI", "GITHUB_ACTIONS", "TF_BUILD", "ORT_DISABLE_TELEMETRY", "XDG_DATA_HOME", "XDG_STATE_HOME"
)  # fmt: skip
"""CI would hide a regression: onnxruntime 1.29 and later stay quiet there by themselves."""

TRAIN: Final = """
import sys, trio, p2ptrain
from p2ptrain.store.groups import create_group
from p2ptrain.store.home import open_home

async def main():
    create_group(open_home(), "home", "a passphrase for the test", "laptop")
    config = p2ptrain.PeerConfig(port=0, discovery=False)
    async with p2ptrain.open_peer("home", config=config) as peer:
        request = p2ptrain.TrainRequest(
            bundle="gpt-nano", data=sys.argv[1], steps=1, microbatches=1, microbatch_size=1,
            heldout_microbatches=1, threads=1,
        )
        result = await peer.train(request)
    print(len(result.losses), sys.modules["onnxruntime"].__version__)

trio.run(main)
"""
PHONE_HOME: Final = """
import contextlib, pathlib, socket
(pathlib.Path.home() / ".cache").mkdir()
(pathlib.Path.home() / ".cache" / "deviceid").write_text("me")
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one, contextlib.suppress(OSError):
    one.sendto(b"me", ("192.0.2.1", 443))
print("done")
"""
WATCH: Final = """
import json, subprocess, sys
subprocess.run([sys.executable, "-B", "-c", *sys.argv[1:]], check=True)
lines = open("/proc/net/snmp").read().splitlines()
counted = {}
for names, values in zip(lines[::2], lines[1::2], strict=True):
    protocol, *names = names.split()
    counted |= {protocol + n: int(v) for n, v in zip(names, values.split()[1:], strict=True)}
counted |= {n: int(v) for n, v in map(str.split, open("/proc/net/snmp6").read().splitlines())}
print(json.dumps(counted))
"""
SENDING: Final = (
    "Ip:OutRequests", "Ip:OutNoRoutes", "Tcp:ActiveOpens", "Udp:OutDatagrams",
    "Ip6OutRequests", "Ip6OutNoRoutes", "Udp6OutDatagrams",
)  # fmt: skip
"""Counters of the kernel that move when a process sends, or tries to (proc(5), /proc/net/snmp)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What a child left behind."""

    printed: str
    files: tuple[str, ...]
    """Below the folder that holds every folder it was told to use."""
    sent: dict[str, int]
    """Counters that are not zero."""


def observe(code: str, directory: Path, *arguments: str) -> Observed:
    """Run a child in empty folders and without a network, and look at what it did."""
    folders = {
        "HOME": "home", "TMPDIR": "tmp", "XDG_CACHE_HOME": "home/cache",
        "XDG_CONFIG_HOME": "home/config", "XDG_RUNTIME_DIR": "run", "P2PTRAIN_HOME": "state",
    }  # fmt: skip
    work = directory / "work"
    for name in (*folders.values(), work.name):
        (directory / name).mkdir(parents=True, exist_ok=True, mode=0o700)
    kept = {k: v for k, v in os.environ.items() if k not in QUIET_BY_THEMSELVES}
    told = {name: str(directory / path) for name, path in folders.items()}
    line = ["unshare", "--net", sys.executable, "-B", "-c", WATCH, code, *arguments]
    ended = subprocess.run(
        line, env={**kept, **told, "PYTHONPATH": str(ROOT)}, cwd=work, capture_output=True,
        text=True, check=False, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    printed, counters = ended.stdout.splitlines()
    counted = json.loads(counters)
    files = sorted(
        str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()
    )
    return Observed(
        printed=printed,
        files=tuple(files),
        sent={name: counted[name] for name in SENDING if counted[name]},
    )


@pytest.fixture(autouse=True, scope="module")
def _network_namespace() -> None:
    if shutil.which("unshare") is None:
        pytest.skip("no network namespace here: unshare (util-linux) is missing")
    line = ["unshare", "--net", "true"]
    tried = subprocess.run(line, capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"no network namespace is permitted here: {tried.stderr.strip()}")


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder short enough for the control socket below it (108 bytes)."""
    with tempfile.TemporaryDirectory(prefix="p2t-") as folder:
        yield Path(folder)


def test_peer_that_trains_writes_only_its_state_and_sends_nothing(short_path: Path) -> None:
    text = short_path / "notes.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 100)
    seen = observe(TRAIN, short_path / "device", str(text))
    assert seen.printed.startswith("1 "), "one step was trained"
    assert any(name.endswith("trained.onnx") for name in seen.files)
    assert [name for name in seen.files if not name.startswith("state/")] == []
    assert seen.sent == {}


def test_files_and_packets_of_a_child_that_phones_home_are_seen(tmp_path: Path) -> None:
    seen = observe(PHONE_HOME, tmp_path)
    assert seen.files == ("home/.cache/deviceid",)
    assert seen.sent == {"Ip:OutNoRoutes": 1}
