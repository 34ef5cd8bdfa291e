"""Our side of the benchmark: real peers, asked to train through their control socket."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from p2ptrain.demo.group import (
    GROUP_NAME,
    LOOPBACK,
    DemoPeer,
    make_peers,
    wait_started,
    wait_together,
    write_invites,
)
from p2ptrain.errors import PeerLost
from p2ptrain.net.control_socket import call
from p2ptrain.runtime.reports import PeerStatus, PlanReport, StepReport, TrainRequest, TrainResult
from p2ptrain.wire.codec import from_plain, to_plain
from tools.bench import processes
from tools.bench.ratios import Turn
from tools.bench.workload import ROOT, Texts, Workload

TOGETHER_TIMEOUT_S: Final = 60.0
TURN_TIMEOUT_S: Final = 900.0
NO_CHECKPOINT: Final = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One `train`: what it was asked, what it told."""

    plan: PlanReport
    turn: Turn
    result: TrainResult
    cpu_s: tuple[float, ...] = ()
    """Of all peers together, read as each step was told; empty where the system does not tell."""


class PeerGroup:
    """Running peers that see each other; the first one is the home peer."""

    def __init__(self, peers: tuple[DemoPeer, ...], pids: tuple[int, ...]) -> None:
        self._peers = peers
        self.pids = pids

    async def train(
        self,
        workload: Workload,
        microbatches: int,
        bundle: Path,
        texts: Texts,
        *,
        schedule: str = "1f1b",
        replicate_every: int | None = None,
    ) -> Session:
        """Train one turn from the start over all peers, and remove the run that it leaves.

        Args:
            workload: Model and steps.
            microbatches: Of one step.
            bundle: The model's.
            texts: What to train on.
            schedule: Of the stages.
            replicate_every: Steps between replica sets; None: as the planner chooses.

        Raises:
            PeerLost: a step was not reported, or a peer went away.
            P2PTrainError: as the peers report it.
        """
        events: list[tuple[str, dict[str, Any]]] = []  # Any: JSON values
        cpu_s: list[float | None] = []
        request = _request(workload, len(self._peers), microbatches, bundle, texts)
        request = dataclasses.replace(request, schedule=schedule, replicate_every=replicate_every)

        def note(name: str, data: dict[str, Any]) -> None:  # Any: JSON values
            events.append((name, data))
            if name == "step":
                cpu_s.append(self._cpu_s())

        with trio.fail_after(TURN_TIMEOUT_S):
            answer = await call(
                self._peers[0].socket(),
                "train",
                to_plain(request),
                note,
            )
        result = from_plain(TrainResult, answer)
        for peer in self._peers:
            shutil.rmtree(peer.home / "runs" / result.run, ignore_errors=True)
        told = session(events, result, steps=workload.steps_all)
        return dataclasses.replace(told, cpu_s=tuple(each for each in cpu_s if each is not None))

    async def status(self) -> PeerStatus | None:
        """What the home peer says of itself."""
        return await self._peers[0].status()

    def _cpu_s(self) -> float | None:
        each = [processes.cpu_s(pid) for pid in self.pids]
        return sum(cpu or 0.0 for cpu in each) if None not in each else None


def session(
    events: list[tuple[str, dict[str, Any]]],  # Any: JSON values
    result: TrainResult,
    *,
    steps: int,
) -> Session:
    """Put together what a session told.

    Raises:
        PeerLost: the plan or a step is missing; the turn must not be counted.
    """
    plans = [from_plain(PlanReport, data) for name, data in events if name == "plan"]
    told = [from_plain(StepReport, data) for name, data in events if name == "step"]
    if len(plans) != 1 or [report.step for report in told] != list(range(1, steps + 1)):
        raise PeerLost(f"a session of {steps} steps reported {len(told)} and {len(plans)} plans")
    turn = Turn(
        seconds=tuple(report.seconds for report in told),
        losses=tuple(report.loss for report in told),
    )
    return Session(plan=plans[0], turn=turn, result=result)


def _request(
    workload: Workload, stages: int, microbatches: int, bundle: Path, texts: Texts
) -> TrainRequest:
    return TrainRequest(
        bundle=str(bundle),
        data=str(texts.train),
        heldout=str(texts.heldout),
        steps=workload.steps_all,
        stages=stages,
        microbatches=microbatches,
        microbatch_size=workload.microbatch_size,
        seed=workload.seed,
        threads=workload.threads,
        form=workload.form,
        optimizer=workload.optimizer,
        heldout_microbatches=1,
        checkpoint_every=NO_CHECKPOINT,
    )


@contextlib.asynccontextmanager
async def open_group(
    count: int, *, folder: Path, python: str, threads: int, module: str = "p2ptrain"
) -> AsyncIterator[PeerGroup]:
    """Found a group of `count` peers on loopback; they are ended when the block is left.

    Args:
        count: Of peers.
        folder: New; for their homes and logs.
        python: Their interpreter.
        threads: Of each.
        module: The command line that they run.

    Raises:
        PeerLost: a peer does not start, or they do not find each other.
    """
    peers = _homes(folder, count)
    started: list[trio.Process] = []
    start = [python, "-m", module, "join", "--threads", str(threads)]
    try:
        started.append(await _start(peers[0], (), start))
        first = await wait_started(peers[0])
        write_invites(peers, first.address)
        for peer in peers[1:]:
            started.append(await _start(peer, (first.address,), start))
        if not await wait_together(peers, TOGETHER_TIMEOUT_S):
            raise PeerLost(f"the peers do not find each other; see the logs in {folder}")
        yield PeerGroup(peers, tuple(process.pid for process in started))
    finally:
        await _end(started)


def _homes(folder: Path, count: int) -> tuple[DemoPeer, ...]:
    folder.mkdir(parents=True)
    return make_peers(folder, count)


async def _start(peer: DemoPeer, addresses: tuple[str, ...], start: list[str]) -> trio.Process:
    command = [*start, "--group", GROUP_NAME, "--port", "0"]
    command += ["--name", peer.name, "--listen", LOOPBACK, "--no-discovery"]
    if peer.invite.exists():
        command += ["--invite", str(peer.invite)]
    for address in addresses:
        command += ["--peer", address]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "P2PTRAIN_HOME": str(peer.home)}
    with peer.log.open("ab") as log:
        return await trio.lowlevel.open_process(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, env=environment
        )


async def _end(started: list[trio.Process]) -> None:
    with trio.CancelScope(shield=True):
        for process in started:
            process.terminate()
        for process in started:
            with trio.move_on_after(10):
                await process.wait()
            process.kill()
            await process.wait()
