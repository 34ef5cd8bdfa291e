"""Disturb a run at random for a while, and hold its result against an undisturbed one.

    python tools/soak.py --minutes 20 --seed 1

Four real peers on an emulated Wi-Fi (root is needed: tools/wifi_emulator). Peers are killed and
started again, leave and come back, are stopped for a while, lose the network or the way to one
other; one thing at a time, the next when the run is protected again. In the end model and losses
must be those of one undisturbed peer. The same seed gives the same story, but not the same moments.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pydoc_data.topics
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import trio
from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from p2ptrain.errors import P2PTrainError
from p2ptrain.runtime.reports import TrainRequest, TrainResult
from tests.bundles import tiny_bundle, write_bundle
from tests.e2e.peers import TRAIN_TIMEOUT_S, PeerProcess, job, train
from tests.netns.stations import running_peers, wait_found
from tools.wifi_emulator.medium import Air
from tools.wifi_emulator.namespaces import Unavailable, require_permitted
from tools.wifi_emulator.wifi import Wifi, wifi

ROOT: Final = Path(__file__).resolve().parents[1]
STATIONS: Final = ("a", "b", "c", "d")
STEPS_PER_MINUTE: Final = 240
"""With a disturbance every quarter of a minute; measured on two cores that others used, too."""
QUIET_S: Final = (0.5, 4.0)
AWAY_S: Final = (2.0, 12.0)
PROTECTED_WITHIN_S: Final = 120.0
POLL_S: Final = 0.2
STEP_TIMEOUT_S: Final = 2.0
"""A step of a run that is disturbed takes longer only where the run has stopped for good."""
Say = Callable[[str], None]


class SoakFailed(AssertionError):
    """The disturbed run is not the undisturbed one."""


class Soak:
    """One campaign: the run, and who disturbs it."""

    def __init__(self, air: Wifi, peers: tuple[PeerProcess, ...], seed: int, say: Say) -> None:
        self._air, self._peers, self._say = air, peers, say
        self._rng = random.Random(seed)
        self.counts: Counter[str] = Counter()

    async def disturb(self) -> None:
        """One thing after the other, until it is cancelled."""
        deeds: tuple[Callable[[int], Awaitable[None]], ...] = (
            self._kill, self._leave, self._stop, self._cut_off, self._cut_way,
        )  # fmt: skip
        while True:
            await self._wait_protected()
            await trio.sleep(self._rng.uniform(*QUIET_S))
            deed, whom = self._rng.choice(deeds), self._rng.randrange(len(self._peers))
            name = deed.__name__.removeprefix("_")
            self.counts[name] += 1
            self._say(f"{name} {self._peers[whom].name}")
            await deed(whom)

    async def _wait_protected(self) -> None:
        """Some member says that any one device may vanish, and everybody takes part."""
        with trio.move_on_after(PROTECTED_WITHIN_S):
            while not await self._is_protected():  # noqa: ASYNC110 other processes
                await trio.sleep(POLL_S)
            return
        told = "; ".join([await self._told(peer) for peer in self._peers])
        raise SoakFailed(f"not protected {PROTECTED_WITHIN_S:.0f} s after everything works: {told}")

    async def _told(self, peer: PeerProcess) -> str:
        """What a peer says of its run and of the others, in one line."""
        status = await peer.member.status()
        if status is None:
            return f"{peer.name} does not answer"
        run = status.run_status
        if run is None:
            return f"{peer.name} has no run, it is {status.run_state}"
        return f"{peer.name}: {run}"

    async def _is_protected(self) -> bool:
        for peer in self._peers:
            status = await peer.member.status()
            run = None if status is None else status.run_status
            if run is not None and len(run.members) == len(self._peers):
                return run.safety.startswith("protected")
        return False

    async def _away(self) -> None:
        await trio.sleep(self._rng.uniform(*AWAY_S))

    async def _kill(self, whom: int) -> None:
        await self._peers[whom].kill()
        await self._away()
        await self._peers[whom].start()

    async def _leave(self, whom: int) -> None:
        peer = self._peers[whom]
        peer.send(signal.SIGTERM)
        with trio.move_on_after(PROTECTED_WITHIN_S):
            if peer.process is not None:
                await peer.process.wait()
        await peer.kill()
        await self._away()
        await peer.start()

    async def _stop(self, whom: int) -> None:
        self._peers[whom].send(signal.SIGSTOP)
        await self._away()
        self._peers[whom].send(signal.SIGCONT)

    async def _cut_off(self, whom: int) -> None:
        others = ",".join(s for i, s in enumerate(STATIONS) if i != whom)
        self._air.tell(f"partition {STATIONS[whom]} {others}")
        await self._away()
        self._air.tell("heal")

    async def _cut_way(self, whom: int) -> None:
        other = STATIONS[(whom + 1) % len(STATIONS)]
        self._air.tell(f"cut {STATIONS[whom]} {other}")
        await self._away()
        self._air.tell("heal")


async def soak(steps: int, seed: int, directory: Path, say: Say) -> Counter[str]:
    """A whole campaign; SoakFailed when the result is not that of an undisturbed run."""
    limit_s = TRAIN_TIMEOUT_S + steps * STEP_TIMEOUT_S
    with wifi(STATIONS, Air(rate_mbit=100, delay_ms=30, loss_percent=1), seed=seed) as air:
        async with running_peers(air, directory) as peers:
            await wait_found(peers)
            campaign = Soak(air, peers, seed, say)
            began_s = time.monotonic()
            async with trio.open_nursery() as nursery:
                asked = request(directory, steps, stages=3)
                nursery.start_soon(conduct, peers[0], asked, limit_s, say)
                nursery.start_soon(campaign.disturb)
                while not models(peers):  # noqa: ASYNC110 other processes
                    await trio.sleep(POLL_S)
                nursery.cancel_scope.cancel()
            say(f"finished after {time.monotonic() - began_s:.0f} s; now undisturbed")
            found = models(peers)
            await restore(air, peers)
            undisturbed = request(directory, steps, stages=1)
            alone, _ = await train(peers[0], undisturbed, timeout_s=limit_s)
    await trio.to_thread.run_sync(check, found, alone)
    return campaign.counts


def check(found: list[Path], alone: TrainResult) -> None:
    """SoakFailed when a model or a loss is not that of the undisturbed run."""
    content = Path(alone.model_path or "").read_bytes()
    if any(path.read_bytes() != content for path in found):
        raise SoakFailed("the trained model differs")
    for path in found:
        losses = written(path.parent)
        if not losses or any(alone.losses[step - 1] != loss for step, loss in losses):
            raise SoakFailed("the losses differ, or nobody wrote them down")


async def restore(air: Wifi, peers: tuple[PeerProcess, ...]) -> None:
    """Everything works again, whatever was being done at the end."""
    air.tell("heal")
    for peer in peers:
        await peer.kill()
    await peers[0].start()


async def conduct(peer: PeerProcess, asked: TrainRequest, limit_s: float, say: Say) -> None:
    """Start the run; when its home peer is hit, others go on with it."""
    try:
        await train(peer, asked, timeout_s=limit_s)
    except P2PTrainError as error:
        say(f"who asked for the run was told: {error.message}")


def models(peers: tuple[PeerProcess, ...]) -> list[Path]:
    """What has been trained so far, by whoever fed the run at its end."""
    return [path for peer in peers for path in peer.member.home.glob("runs/*/trained.onnx")]


def written(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) as the data holder wrote them down."""
    lines = [json.loads(line) for line in (folder / "progress.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def request(directory: Path, steps: int, *, stages: int) -> TrainRequest:
    """A tiny model on English."""
    text = directory / "english.txt"
    topics = pydoc_data.topics.topics
    text.write_text("\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    bundle = write_bundle(directory / f"bundle-{stages}", tiny_bundle(blocks=4))
    return replace(job(text, stages=stages), bundle=str(bundle), steps=steps)


def main() -> int:
    """Run one campaign; 0 when nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="about how long to train")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    try:
        require_permitted()
    except Unavailable as error:
        print(f"soak: no network can be emulated here: {error}", file=sys.stderr)
        return 3
    os.environ["PYTHONPATH"] = str(ROOT)
    steps = max(20, int(chosen.minutes * STEPS_PER_MINUTE))
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder, Progress(console=console) as progress:
        progress.add_task(f"soak, seed {chosen.seed}, {steps} steps", total=None)
        os.environ["XDG_RUNTIME_DIR"] = folder
        run = functools.partial(soak, steps, chosen.seed, Path(folder), console.print)
        counts = trio.run(run)
    if chosen.json:
        print(json.dumps({"version": 1, "seed": chosen.seed, "steps": steps, "deeds": counts}))
    else:
        deeds = ", ".join(f"{count} x {name}" for name, count in sorted(counts.items()))
        print(
            f"{steps} steps, {sum(counts.values())} disturbances ({deeds}): equal to the last bit"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
