"""Torch's side of the benchmark: worker processes that are asked for one turn at a time."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from p2ptrain.errors import ConfigError
from tools.bench.ratios import Turn
from tools.bench.workload import ROOT

TURN_TIMEOUT_S: Final = 900.0
START_TIMEOUT_S: Final = 120.0
_RECEIVE_BYTES: Final = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchChoice:
    """A way to train with torch; the benchmark tries several and keeps the fastest."""

    attention: str
    """plain (the operators of onnx_models.gpt) or fused (scaled_dot_product_attention)."""
    pipeline: str = "none"
    """none, own (1F1B written by hand), or one of torch.distributed.pipelining: torch (1F1B),
    interleaved or v (zero-bubble, two parts of the chain on each rank)."""
    cuts: tuple[int, ...] = ()
    """Links of the chain embedding, (attention, mlp)..., head before the end of each part."""

    def __str__(self) -> str:
        if self.pipeline == "none":
            return f"eager, {self.attention} attention"
        links = " and ".join(map(str, self.cuts))
        return f"{_MADE[self.pipeline]}, {self.attention} attention, cut after {links} links"

    @property
    def ranks(self) -> int:
        return 1 if self.pipeline == "none" else 2


_MADE: Final = {
    "own": "own 1F1B",
    "torch": "Schedule1F1B",
    "interleaved": "ScheduleInterleavedZeroBubble",
    "v": "ScheduleZBVZeroBubble",
}


def eager_choices() -> tuple[TorchChoice, ...]:
    """The ways to train in one process."""
    return tuple(TorchChoice(attention=attention) for attention in ("plain", "fused"))


def pipeline_choices(attention: str, layers: int) -> tuple[TorchChoice, ...]:
    """1F1B by hand and by torch, cut at the middle block and half a block later.

    The head outweighs the embedding, so that the balanced cut is never before the middle.
    """
    middle = 1 + 2 * (layers // 2)
    return tuple(
        TorchChoice(attention=attention, pipeline=pipeline, cuts=(cut,))
        for pipeline in ("own", "torch")
        for cut in (middle, middle + 1)
    )


def zero_bubble_choices(attention: str, layers: int) -> tuple[TorchChoice, ...]:
    """Both zero-bubble schedules of torch, each with two ways to cut the chain into four parts.

    Under `v` a rank holds the first and last part, or both inner ones; under `interleaved` every
    second one. The last part holds the head, so the first of them is the longer one.
    """
    first, middle, last = 1 + 2 * layers // 3, 2 + layers, 2 * layers
    ways = {
        "v": ((first, middle, last), (first - 1, middle, last - 1)),
        "interleaved": ((first, middle, last - 1), (first - 1, middle - 1, last - 1)),
    }
    return tuple(
        TorchChoice(attention=attention, pipeline=pipeline, cuts=cuts)
        for pipeline, both in ways.items()
        for cuts in both
    )


class TorchProcess:
    """One worker, spoken to in lines."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._received = bytearray()
        self.pid = process.pid

    async def ask(self) -> None:
        """Let it train; cancelling may leave half a line, after which it is only killed."""
        if self._process.stdin is not None:
            await self._process.stdin.send_all(b"go\n")

    async def answer(self) -> dict[str, Any]:  # Any: JSON values
        """Its next line.

        Raises:
            ConfigError: it ended instead.
        """
        while (end := self._received.find(b"\n")) < 0:
            stdout = self._process.stdout
            chunk = b"" if stdout is None else await stdout.receive_some(_RECEIVE_BYTES)
            if not chunk:
                raise ConfigError(
                    "a torch process ended; its own words are above",
                    hint="give an interpreter that has torch with --torch-python",
                )
            self._received += chunk
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        document: dict[str, Any] = json.loads(line)  # Any: as above
        return document


class TorchContender:
    """All ranks of one way to train with torch."""

    def __init__(self, processes: tuple[TorchProcess, ...], version: str) -> None:
        self._processes = processes
        self.version = version

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(process.pid for process in self._processes)

    async def turn(self) -> Turn:
        """Train all steps from the start: times of the first rank, losses of whoever has them.

        Raises:
            trio.TooSlowError, ConfigError: a rank hangs or ended.
        """
        with trio.fail_after(TURN_TIMEOUT_S):
            for process in self._processes:
                await process.ask()
            answers = [await process.answer() for process in self._processes]
        losses = zip(*(answer["losses"] for answer in answers), strict=True)
        return Turn(seconds=tuple(answers[0]["seconds"]), losses=tuple(map(sum, losses)))


@contextlib.asynccontextmanager
async def open_torch(
    choice: TorchChoice, *, folder: Path, python: str, threads: int
) -> AsyncIterator[TorchContender]:
    """Start the processes of one choice; they are killed and gone when the block is left."""
    rendezvous = folder / f"rendezvous-{os.urandom(4).hex()}"
    processes: list[trio.Process] = []
    try:
        for rank in range(choice.ranks):
            command = [python, "-m", "tools.bench.torch_worker", "--workload", str(folder)]
            command += ["--threads", str(threads), "--attention", choice.attention]
            command += ["--pipeline", choice.pipeline]
            for cut in choice.cuts:
                command += ["--cut", str(cut)]
            command += ["--rank", str(rank), "--rendezvous", str(rendezvous)]
            processes.append(
                await trio.lowlevel.open_process(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    cwd=ROOT,
                    env=_environment(threads),
                )
            )
        workers = tuple(TorchProcess(process) for process in processes)
        with trio.fail_after(START_TIMEOUT_S):
            ready = [await worker.answer() for worker in workers]
        yield TorchContender(workers, str(ready[0]["torch"]))
    finally:
        await _end(processes)


async def _end(processes: list[trio.Process]) -> None:
    with trio.CancelScope(shield=True):
        for process in processes:
            process.kill()
        for process in processes:
            await process.wait()


def _environment(threads: int) -> dict[str, str]:
    """Threads pinned for every library torch may use; gloo on loopback."""
    count = str(threads)
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "GLOO_SOCKET_IFNAME": "lo",
    }
