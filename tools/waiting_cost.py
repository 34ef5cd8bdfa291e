"""Measure what the survivors of a run compute while they can only wait.

    python tools/waiting_cost.py [--seconds 20] [--json]

Three real peers over TLS on loopback train with `--keep-data-here`. First one is stopped (SIGSTOP),
and the others are watched until silence has told them so; it goes on. Then the home peer is killed:
the run is paused, and they are watched for as long as asked. Linux only: reads /proc.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import signal
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import trio

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from p2ptrain.errors import P2PTrainError
from p2ptrain.runtime.reports import PeerStatus, TrainRequest
from tests.e2e.peers import PeerProcess, Watched, job, peer_group, train

STEPS: Final = 1_000_000
BEGUN: Final = 20
"""Steps before the first measurement."""
SILENT_S: Final = 3.5
"""Silence is a loss 4.5 s after a stop, at the earliest."""
SETTLE_S: Final = 1.0
"""Until what had arrived is computed, and a pause is agreed on."""
READY_S: Final = 180.0
CPU_LIMIT: Final = 0.05
TEXT: Final = "A run waits for a device that is gone, and costs next to nothing meanwhile. "


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """One survivor's processor time while it waited, as a fraction of one core."""

    peer: str
    waits_for: str
    """`silence` or `pause`."""
    seconds: float
    cpu_fraction: float


async def measure(seconds: float) -> list[Waiting]:
    """Both waits, each survivor."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        text = directory / "text.txt"
        text.write_text(TEXT * 400, encoding="utf-8")
        async with peer_group(directory, 3) as peers:
            asked = replace(job(text, stages=3), steps=STEPS, keep_data_here=True)
            async with trio.open_nursery() as nursery:
                watched = Watched()
                nursery.start_soon(_train, peers[0], asked, watched)
                await watched.wait_step(BEGUN)
                found = await _while_silent(peers)
                await peers[0].wait_status(_is_whole, READY_S)
                found += await _while_paused(peers, seconds, nursery.cancel_scope)
    return found


async def _train(peer: PeerProcess, asked: TrainRequest, watched: Watched) -> None:
    with contextlib.suppress(P2PTrainError):  # it is killed
        await train(peer, asked, watched, timeout_s=math.inf)


async def _while_silent(peers: tuple[PeerProcess, ...]) -> list[Waiting]:
    peers[2].send(signal.SIGSTOP)
    try:
        return await _watch(peers[:2], "silence", SILENT_S - SETTLE_S)
    finally:
        peers[2].send(signal.SIGCONT)


async def _while_paused(
    peers: tuple[PeerProcess, ...], seconds: float, training: trio.CancelScope
) -> list[Waiting]:
    await peers[0].kill()
    training.cancel()
    with trio.CancelScope(shield=True):
        for peer in peers[1:]:
            await peer.wait_status(_is_paused, READY_S)
        return await _watch(peers[1:], "pause", seconds)


async def _watch(peers: tuple[PeerProcess, ...], what: str, seconds: float) -> list[Waiting]:
    """Compare processor time before and after; the peers are not asked anything meanwhile."""
    await trio.sleep(SETTLE_S)
    before = [peer.cpu_seconds() for peer in peers]
    began_s = trio.current_time()
    await trio.sleep(seconds)
    took_s = trio.current_time() - began_s
    return [
        Waiting(
            peer=peer.name,
            waits_for=what,
            seconds=took_s,
            cpu_fraction=(peer.cpu_seconds() - cpu_s) / took_s,
        )
        for peer, cpu_s in zip(peers, before, strict=True)
    ]


def _is_whole(status: PeerStatus) -> bool:
    run = status.run_status
    return run is not None and len(run.members) == 3 and run.safety.startswith("protected")


def _is_paused(status: PeerStatus) -> bool:
    run = status.run_status
    return run is not None and (run.waits_for or "").startswith("paused")


def within_limit(found: list[Waiting]) -> bool:
    """Whether every survivor stayed below the limit."""
    return all(each.cpu_fraction < CPU_LIMIT for each in found)


def table(found: list[Waiting]) -> str:
    """For people."""
    return "\n".join(
        f"{each.peer}: {each.cpu_fraction:.2%} of a core (limit {CPU_LIMIT:.0%}), "
        f"watched for {each.seconds:.1f} s of {each.waits_for}"
        for each in found
    )


def main() -> int:
    """Measure and print; 1 when the limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = trio.run(functools.partial(measure, options.seconds))
    rows = [asdict(each) for each in found]
    print(json.dumps({"version": 1, "waiting": rows}) if options.json else table(found))
    return 0 if within_limit(found) else 1


if __name__ == "__main__":
    sys.exit(main())
