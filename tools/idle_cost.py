"""Measure what an idle peer costs: resident memory, CPU, and the time of `p2ptrain --help`.

    python tools/idle_cost.py [--peers 2] [--seconds 20] [--json]

Starts a throwaway group on loopback, waits until the peers see each other, leaves them alone and
reads /proc. Linux only. Nothing else should compute meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import trio

from p2ptrain.demo.group import DemoPeer, make_peers, wait_started, wait_together, write_invites
from p2ptrain.errors import PeerLost

TOGETHER_S: Final = 60.0
SETTLE_S: Final = 5.0
HELP_RUNS: Final = 5
RESIDENT_BYTES_LIMIT: Final = 120 * 1024 * 1024
CPU_LIMIT: Final = 0.01
HELP_S_LIMIT: Final = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerCost:
    """One idle peer."""

    name: str
    resident_bytes: int
    resident_bytes_peak: int
    cpu_fraction: float
    """Of one core."""
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class IdleCost:
    """All that was measured, and how."""

    peers: tuple[PeerCost, ...]
    help_s: float
    """The fastest of several runs."""
    seconds: float
    python: str
    cores: int


def main() -> int:
    """Measure and print; 1 when a limit is passed."""
    parser = argparse.ArgumentParser(description="measure what an idle peer costs")
    parser.add_argument("--peers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    cost = measure(options.peers, options.seconds)
    print(json.dumps(asdict(cost)) if options.json else table(cost))
    return 0 if within_limits(cost) else 1


def measure(count: int, seconds: float) -> IdleCost:
    """Start the peers, watch them being idle for `seconds`, end them."""
    help_s = min(time_of_help() for _ in range(HELP_RUNS))
    with tempfile.TemporaryDirectory(prefix="p2ptrain-idle-") as folder:
        peers = make_peers(Path(folder), count)
        with running(peers) as processes:
            peer_costs = watch(peers, processes, seconds)
    return IdleCost(
        peers=peer_costs,
        help_s=help_s,
        seconds=seconds,
        python=sys.version.split()[0],
        cores=os.cpu_count() or 1,
    )


@contextmanager
def running(peers: tuple[DemoPeer, ...]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The peers as processes that see each other; they are ended in any case."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        processes.append(start(peers[0], ()))
        first = trio.run(wait_started, peers[0])
        write_invites(peers, first.address)
        processes += [start(peer, (first.address,)) for peer in peers[1:]]
        if not trio.run(wait_together, peers, TOGETHER_S):
            raise PeerLost("the peers did not find each other")
        yield processes
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(timeout=30)


def start(peer: DemoPeer, addresses: tuple[str, ...]) -> subprocess.Popen[bytes]:
    """One peer's process, writing into its log."""
    environment = {**os.environ, "P2PTRAIN_HOME": str(peer.home)}
    with peer.log.open("ab") as log:
        return subprocess.Popen(
            peer.command(addresses), env=environment, stdin=subprocess.DEVNULL, stdout=log,
            stderr=log,
        )  # fmt: skip


def watch(
    peers: tuple[DemoPeer, ...], processes: list[subprocess.Popen[bytes]], seconds: float
) -> tuple[PeerCost, ...]:
    """Wait until the start is over, then compare CPU time before and after."""
    time.sleep(SETTLE_S)
    before = [cpu_seconds(process.pid) for process in processes]
    started_s = time.monotonic()
    time.sleep(seconds)
    elapsed_s = time.monotonic() - started_s
    return tuple(
        peer_cost(peer.name, process.pid, (cpu_seconds(process.pid) - cpu_s) / elapsed_s)
        for peer, process, cpu_s in zip(peers, processes, before, strict=True)
    )


def peer_cost(name: str, pid: int, cpu_fraction: float) -> PeerCost:
    """The memory of a process as the kernel counts it."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return PeerCost(
        name=name,
        resident_bytes=int(status["VmRSS"].split()[0]) * 1024,
        resident_bytes_peak=int(status["VmHWM"].split()[0]) * 1024,
        cpu_fraction=cpu_fraction,
        threads=int(status["Threads"]),
    )


def cpu_seconds(pid: int) -> float:
    """User and system time of a process since its start."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def time_of_help() -> float:
    """Seconds of one `p2ptrain --help`, interpreter start included."""
    started_s = time.monotonic()
    subprocess.run([sys.executable, "-m", "p2ptrain", "--help"], capture_output=True, check=True)
    return time.monotonic() - started_s


def within_limits(cost: IdleCost) -> bool:
    """Whether every figure is below its limit."""
    return cost.help_s < HELP_S_LIMIT and all(
        peer.resident_bytes < RESIDENT_BYTES_LIMIT and peer.cpu_fraction < CPU_LIMIT
        for peer in cost.peers
    )


def table(cost: IdleCost) -> str:
    """For people: each figure beside its limit."""
    lines = [f"Python {cost.python}, {cost.cores} cores, watched for {cost.seconds:.0f} s"]
    for peer in cost.peers:
        lines.append(
            f"{peer.name}: {peer.resident_bytes / 2**20:.1f} MiB resident "
            f"(peak {peer.resident_bytes_peak / 2**20:.1f}, limit {RESIDENT_BYTES_LIMIT >> 20}), "
            f"{peer.cpu_fraction:.2%} of a core (limit {CPU_LIMIT:.0%}), {peer.threads} threads"
        )
    lines.append(f"p2ptrain --help: {cost.help_s:.2f} s (limit {HELP_S_LIMIT} s)")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
