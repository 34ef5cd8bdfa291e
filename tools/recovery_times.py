"""Kill a peer of a run again and again, and say how long the run stood still, and on what.

    python tools/recovery_times.py --kills 30

Three real peers over TLS on loopback, default settings; the killed one is started again and taken
in before the next kill. Prints minimum, median and maximum of each part: noticing, agreement,
getting ready (transfer and replay are in it), the first new step. `--stop` stops the process
(SIGSTOP) instead and lets it go on afterwards; `--json` prints every single recovery.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import pydoc_data.topics
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Final

import trio
from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from p2ptrain.runtime.reports import RecoveryReport, TrainRequest
from tests.e2e.peers import PeerProcess, Watched, job, peer_group, train

STEPS: Final = 1_000_000
BETWEEN: Final = 12
"""Steps between a return and the next kill: at least one more replica set is whole then."""
PARTS: Final = ("whole", "notice", "agreement", "ready", "transfer", "replay", "step")


async def measure(kills: int, how: signal.Signals, progress: Progress) -> list[dict[str, float]]:
    """One row per kill."""
    rows: list[dict[str, float]] = []
    task = progress.add_task("recoveries", total=kills)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        text = directory / "english.txt"
        topics = pydoc_data.topics.topics
        text.write_text("\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
        async with peer_group(directory, 3) as peers:
            watched = Watched()
            asked = replace(job(text, stages=3), steps=STEPS, checkpoint_every=10_000)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(train_for_ever, peers[0], asked, watched)
                for index in range(kills):
                    rows.append(await one(peers, index, how, watched))
                    progress.update(task, advance=1)
                nursery.cancel_scope.cancel()
    return rows


async def train_for_ever(peer: PeerProcess, asked: TrainRequest, watched: Watched) -> None:
    """Until it is cancelled."""
    await train(peer, asked, watched, timeout_s=math.inf)


async def one(
    peers: tuple[PeerProcess, ...], index: int, how: signal.Signals, watched: Watched
) -> dict[str, float]:
    """Kill one peer that has a stage in a protected run, wait for new steps, let it come back."""
    first = peers[0]
    await watched.wait_step(watched.reached + BETWEEN)
    await first.wait_status(
        lambda s: (
            s.run_status is not None
            and len(s.run_status.members) == 3
            and s.run_status.safety.startswith("protected")
        ),
        120,
    )
    plan = (await first.status()).plan
    named = set() if plan is None else {stage.name for stage in plan.stages}
    victims = [peer for peer in peers[1:] if peer.name in named]
    if not victims:
        raise SystemExit("recovery_times: only the home peer has a stage; try again")
    victim = victims[index % len(victims)]
    before, killed_at_s = watched.reached, time.time()
    victim.send(how)
    await watched.wait_step(before + 2)
    whole_s = time.time() - killed_at_s
    survivors = [peer for peer in peers if peer is not victim]
    reports = [(await peer.status()).run_status for peer in survivors]
    seen = [report.last_recovery for report in reports if report and report.last_recovery]
    if how is signal.SIGKILL:
        await victim.kill()
        await victim.start(await address_of(first))
    else:
        victim.send(signal.SIGCONT)
    return row(whole_s, killed_at_s, seen)


async def address_of(peer: PeerProcess) -> str:
    """Where it listens."""
    return (await peer.status()).address.split(",")[0]


def row(whole_s: float, killed_at_s: float, seen: list[RecoveryReport]) -> dict[str, float]:
    """The slowest survivor's parts."""
    return {
        "whole": whole_s,
        "notice": min(each.noticed_at_s for each in seen) - killed_at_s,
        "agreement": max(each.agreement_s for each in seen),
        "ready": max(each.ready_s for each in seen),
        "transfer": max(each.transfer_s for each in seen),
        "replay": max(each.replay_s for each in seen),
        "step": max(each.step_s for each in seen),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--stop", action="store_true", help="SIGSTOP instead of kill -9")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    how = signal.SIGSTOP if chosen.stop else signal.SIGKILL
    with Progress(console=Console(stderr=True)) as progress:
        rows = trio.run(functools.partial(measure, chosen.kills, how, progress))
    if chosen.json:
        print(json.dumps({"version": 1, "how": how.name, "recoveries": rows}))
        return
    print(f"{len(rows)} recoveries after {how.name}, seconds: least, median, greatest")
    for part in PARTS:
        values = sorted(each[part] for each in rows)
        print(f"{part:10} {values[0]:7.2f} {statistics.median(values):7.2f} {values[-1]:7.2f}")


if __name__ == "__main__":
    main()
