"""Real `p2ptrain join` processes of one group on one machine, watched through their status."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from p2ptrain import limits
from p2ptrain.demo.group import DemoPeer, make_peers, wait_started, write_invites
from p2ptrain.errors import PeerLost
from p2ptrain.runtime.reports import MemberReport, PeerStatus

TOGETHER_LIMIT_S: Final = 600.0
NOTICE_LIMIT_S: Final = 60.0
POLL_S: Final = 0.5
IDLE_S: Final = 20.0
END_S: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RealGroupCost:
    """What a real group took."""

    peers: int
    started_s: float
    """Until every process had enrolled and answered; four enrol at a time."""
    together_s: float
    """Until every peer had a link with every other and held it alive."""
    restarted_s: float
    """The same once more, all members started at once."""
    restarted_cpu_s: float
    """CPU time of all peers together until then, which a busy machine does not change much."""
    resident_bytes: tuple[int, ...]
    proportional_bytes: tuple[int, ...]
    """Shared pages counted once for all processes together (PSS)."""
    idle_cpu_fractions: tuple[float, ...]
    killed_known_s: float | None
    stopped_known_s: float | None
    returned_known_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """One process, as the kernel counts it."""

    resident_bytes: int
    proportional_bytes: int


class RealGroup:
    """Starts processes, and ends all of them with `end`, whatever happened."""

    def __init__(self, folder: Path, count: int) -> None:
        self._peers = make_peers(folder, count)
        self._processes: list[subprocess.Popen[bytes]] = []

    async def start(self, progress: Callable[[int], None]) -> None:
        """The founder, then the others, as many at a time as may enrol at once.

        Raises:
            PeerLost: a peer did not start.
        """
        self._start_one(self._peers[0], ())
        address = (await wait_started(self._peers[0])).address
        progress(1)
        size = limits.ENROLMENTS_MAX
        for first in range(1, len(self._peers), size):
            batch = self._peers[first : first + size]
            write_invites((self._peers[0], *batch), address)  # they hold for ten minutes
            for peer in batch:
                self._start_one(peer, (address,))
            for peer in batch:
                await wait_started(peer)
            progress(first + len(batch))

    def _start_one(self, peer: DemoPeer, addresses: tuple[str, ...]) -> None:
        environment = {**os.environ, "P2PTRAIN_HOME": str(peer.home)}
        command = [*peer.command(addresses), "--no-discovery"]
        with peer.log.open("ab") as log:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._processes.append(process)

    async def together(self, progress: Callable[[int], None]) -> None:
        """Wait until all see all alive over a link; PeerLost when they do not in time."""
        waiting = list(self._peers)
        with trio.move_on_after(TOGETHER_LIMIT_S):
            while waiting:
                waiting = [
                    p for p in waiting if _linked_count(await p.status()) < len(self._peers) - 1
                ]
                progress(len(self._peers) - len(waiting))
                await trio.sleep(POLL_S)
            return
        names = ", ".join(peer.name for peer in waiting)
        raise PeerLost(f"these peers do not see all others: {names}")

    def memory(self) -> list[Memory]:
        """Of every process, now."""
        return [_memory_of(process.pid) for process in self._processes]

    def cpu_s(self) -> float:
        """CPU time of all processes since each began."""
        return sum(_cpu_seconds(process.pid) for process in self._processes)

    async def idle_cpu(self) -> tuple[float, ...]:
        """Share of a core that each process used over some seconds."""
        before = [_cpu_seconds(process.pid) for process in self._processes]
        began_s = time.monotonic()
        await trio.sleep(IDLE_S)
        elapsed_s = time.monotonic() - began_s
        return tuple(
            (_cpu_seconds(process.pid) - used_s) / elapsed_s
            for process, used_s in zip(self._processes, before, strict=True)
        )

    async def notice(self, index: int, number: signal.Signals) -> float | None:
        """Send a signal to one peer; seconds until all others that answer hold it dead."""
        began_s = time.monotonic()
        os.kill(self._processes[index].pid, number)
        return await self._entered("dead", index, began_s)

    async def notice_return(self, index: int) -> float | None:
        """Let a stopped peer go on; seconds until all others hold it alive."""
        began_s = time.monotonic()
        os.kill(self._processes[index].pid, signal.SIGCONT)
        return await self._entered("alive", index, began_s)

    async def _entered(self, state: str, index: int, began_s: float) -> float | None:
        """When the last of the others entered that state, by what each says of its age."""
        name, slowest_s = self._peers[index].name, 0.0
        waiting = [
            peer
            for other, peer in enumerate(self._peers)
            if other != index and self._processes[other].poll() is None
        ]
        with trio.move_on_after(NOTICE_LIMIT_S):
            while waiting:
                for peer in list(waiting):
                    line = _line_of(await peer.status(), name)
                    if line is not None and line.state.startswith(state):
                        waiting.remove(peer)
                        age_s = line.state_s or 0.0
                        slowest_s = max(slowest_s, time.monotonic() - age_s - began_s)
                await trio.sleep(POLL_S)
            return slowest_s
        return None

    async def restart(self) -> None:
        """End all processes and start them at once: members already, nobody enrols."""
        self.end()
        self._processes.clear()
        self._start_one(self._peers[0], ())
        address = (await wait_started(self._peers[0])).address
        for peer in self._peers[1:]:
            self._start_one(peer, (address,))

    def end(self) -> None:
        """End every process that was started here."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
        for process in self._processes:
            try:
                process.wait(timeout=END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _linked_count(status: PeerStatus | None) -> int:
    members = () if status is None else status.members
    return sum(member.state == "alive" and member.linked for member in members)


def _line_of(status: PeerStatus | None, name: str) -> MemberReport | None:
    members = () if status is None else status.members
    return next((member for member in members if member.name == name), None)


def _memory_of(pid: int) -> Memory:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return Memory(resident_bytes=kib["Rss"] * 1024, proportional_bytes=kib["Pss"] * 1024)


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
