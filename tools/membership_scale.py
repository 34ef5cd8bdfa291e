"""Measure membership: simulated groups of 10 to 1,000 peers, or real peers on this machine.

    python tools/membership_scale.py                 # 10, 32, 100, 320 and 1,000 simulated peers
    python tools/membership_scale.py --sizes 10,100
    python tools/membership_scale.py --real 32       # processes of `p2ptrain join` over loopback

Simulated peers are the production core in virtual time (`tools/bench/membership_world.py`): how
long until all know all, until all know of a killed and of a stopped one, and what it costs in
messages. Real peers are processes with links over TLS: seconds until they are one group, memory,
CPU while idle, and how soon they notice that one was killed or stopped. Nothing else should run.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import trio
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from p2ptrain.membership.states import State
from tools.bench.membership_world import MembershipWorld
from tools.bench.real_group import RealGroup, RealGroupCost

SIZES: Final = (10, 32, 100, 320, 1000)
KNOW_LIMIT_S: Final = 120.0
SETTLE_S: Final = 40.0
COUNT_S: Final = 20.0
DEATH_LIMIT_S: Final = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedCost:
    """One simulated group."""

    peers: int
    links_per_peer: float
    know_all_s: float | None
    """From the first start, all within a second, until everybody holds everybody alive."""
    killed_known_s: float | None
    """From a kill -9 until everybody holds it dead."""
    stopped_known_s: float | None
    """From a stop (silence on standing links) until everybody holds it dead."""
    false_deaths: int
    """Peers held dead by somebody without being so, at the end."""
    messages_per_peer_s: float
    """At rest, 40 s after the start."""
    bytes_per_peer_s: float
    by_name: dict[str, float]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 when some group did not come together or missed a death."""
    parser = argparse.ArgumentParser(description="measure membership in simulated or real groups")
    parser.add_argument("--sizes", type=_sizes, default=SIZES, help="simulated peers: 10,32,100")
    parser.add_argument("--seed", type=int, default=1, help="of the simulation")
    parser.add_argument("--real", type=int, metavar="N", help="start N real peers instead")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    if options.real is not None:
        real = trio.run(measure_real, options.real, console)
        print(json.dumps(asdict(real)) if options.json else real_table(real))
        return 0 if real.stopped_known_s is not None else 1
    costs = simulate_all(options.sizes, options.seed, console)
    if options.json:
        print(json.dumps([asdict(cost) for cost in costs]))
    else:
        Console().print(simulated_table(costs))
    return 0 if all(cost.stopped_known_s is not None for cost in costs) else 1


def _sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(int(word) for word in text.split(","))
    if not all(4 <= size <= 1000 for size in sizes):
        raise argparse.ArgumentTypeError("sizes lie between 4 and 1000")
    return sizes


def simulate_all(sizes: Sequence[int], seed: int, console: Console) -> list[SimulatedCost]:
    """One group after the other, smallest first."""
    steps = 5
    costs = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("simulating", total=steps * sum(sizes))
        for size in sorted(sizes):
            progress.update(task, description=f"simulating {size} peers")
            costs.append(simulate(size, seed, lambda s=size: progress.advance(task, s)))
    return costs


def simulate(count: int, seed: int, advance: Callable[[], None] = lambda: None) -> SimulatedCost:
    """One group from its start to two deaths."""
    world = MembershipWorld(count=count, seed=seed)
    know_all_s = world.run_until(world.all_know_all, within_s=KNOW_LIMIT_S)
    advance()
    world.run(max(0.0, SETTLE_S - world.now))
    advance()
    links, traffic = world.mean_links(), world.traffic(COUNT_S)
    advance()
    killed, stopped = list(world.nodes)[count // 2], list(world.nodes)[count // 3]
    world.kill(killed)
    killed_s = world.run_until(lambda: world.all_hold(killed, State.DEAD), within_s=DEATH_LIMIT_S)
    advance()
    world.stop(stopped)
    stopped_s = world.run_until(lambda: world.all_hold(stopped, State.DEAD), within_s=DEATH_LIMIT_S)
    advance()
    return SimulatedCost(
        peers=count,
        links_per_peer=links,
        know_all_s=know_all_s,
        killed_known_s=killed_s,
        stopped_known_s=stopped_s,
        false_deaths=world.false_deaths({killed, stopped}),
        messages_per_peer_s=traffic.messages_per_peer_s,
        bytes_per_peer_s=traffic.bytes_per_peer_s,
        by_name=traffic.by_name,
    )


def simulated_table(costs: Sequence[SimulatedCost]) -> Table:
    """One row per size."""
    table = Table()
    for heading in (
        "peers", "links each", "all know all, s", "a kill, s", "a stop, s", "false deaths",
        "messages per peer and s", "bytes per peer and s",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for cost in costs:
        table.add_row(
            str(cost.peers), f"{cost.links_per_peer:.1f}", _seconds(cost.know_all_s),
            _seconds(cost.killed_known_s), _seconds(cost.stopped_known_s),
            str(cost.false_deaths), f"{cost.messages_per_peer_s:.1f}",
            f"{cost.bytes_per_peer_s:.0f}",
        )  # fmt: skip
    return table


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.2f}"


async def measure_real(count: int, console: Console) -> RealGroupCost:
    """Start the peers, watch them, kill one, stop one, end them all in any case."""
    with tempfile.TemporaryDirectory(prefix="p2ptrain-scale-") as folder:
        group = RealGroup(Path(folder), count)
        try:
            with Progress(console=console, transient=True) as progress:
                started = progress.add_task("peers started", total=count)
                seen = progress.add_task("peers that see all", total=count)
                began_s = time.monotonic()
                await group.start(lambda number: progress.update(started, completed=number))
                started_s = time.monotonic() - began_s
                await group.together(lambda number: progress.update(seen, completed=number))
                together_s = time.monotonic() - began_s
                progress.update(seen, completed=0, description="peers that see all again")
                began_s = time.monotonic()
                await group.restart()
                await group.together(lambda number: progress.update(seen, completed=number))
                restarted_s, restarted_cpu_s = time.monotonic() - began_s, group.cpu_s()
            memory = group.memory()
            console.print("watching idle peers, then stopping one and killing one")
            cpu = await group.idle_cpu()
            stopped_s = await group.notice(count - 2, signal.SIGSTOP)
            returned_s = await group.notice_return(count - 2)
            killed_s = await group.notice(count - 1, signal.SIGKILL)
        finally:
            group.end()
    return RealGroupCost(
        peers=count,
        started_s=started_s,
        together_s=together_s,
        restarted_s=restarted_s,
        restarted_cpu_s=restarted_cpu_s,
        resident_bytes=tuple(each.resident_bytes for each in memory),
        proportional_bytes=tuple(each.proportional_bytes for each in memory),
        idle_cpu_fractions=cpu,
        killed_known_s=killed_s,
        stopped_known_s=stopped_s,
        returned_known_s=returned_s,
    )


def real_table(cost: RealGroupCost) -> str:
    """For people."""
    mib = 1024 * 1024
    resident = sorted(each / mib for each in cost.resident_bytes)
    shared = sorted(each / mib for each in cost.proportional_bytes)
    cpu = sorted(cost.idle_cpu_fractions)
    middle = len(resident) // 2
    return "\n".join((
        f"{cost.peers} peers: all started after {cost.started_s:.1f} s, "
        f"one group after {cost.together_s:.1f} s; all started at once again, one group after "
        f"{cost.restarted_s:.1f} s and {cost.restarted_cpu_s:.1f} s of CPU of all together",
        f"memory of a peer: RSS {resident[middle]:.1f} MiB ({resident[0]:.1f} to "
        f"{resident[-1]:.1f}), PSS {shared[middle]:.1f} MiB ({shared[0]:.1f} to "
        f"{shared[-1]:.1f}), all together PSS {sum(shared):.0f} MiB",
        f"CPU of an idle peer: {cpu[middle]:.2%} of a core ({cpu[0]:.2%} to {cpu[-1]:.2%})",
        f"a killed peer is dead for all after {_seconds(cost.killed_known_s)} s, a stopped one "
        f"after {_seconds(cost.stopped_known_s)} s, back after "
        f"{_seconds(cost.returned_known_s)} s",
    ))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
