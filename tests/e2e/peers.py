"""Groups of real peer processes, and the commands that a person would type beside them.

Every process ends with its group, however the test ends; a failure prints what the peers said.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import trio

from p2ptrain.demo.demo import demo_bundle
from p2ptrain.demo.group import (
    GROUP_NAME,
    DemoPeer,
    make_peers,
    wait_started,
    wait_together,
    write_invites,
)
from p2ptrain.net.control_socket import call
from p2ptrain.runtime.reports import PeerStatus, StepReport, TrainRequest, TrainResult
from p2ptrain.store.bundles import load_bundle
from p2ptrain.training.contract import OptimizerChoice
from p2ptrain.wire.codec import from_plain, to_plain
from tests.bundles import write_bundle
from tests.shipped_training import short_context

ROOT: Final = Path(__file__).resolve().parents[2]
BUNDLE: Final = demo_bundle()
TOGETHER_S: Final = 60.0
TRAIN_TIMEOUT_S: Final = 90.0
POLL_S: Final = 0.05
STEPS: Final = 20
CLIP_NORM: Final = 1.0
DROPOUT: Final = 0.1
TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Member(DemoPeer):
    """A peer with a choice of interpreter and of further options of `join`."""

    python: str = sys.executable
    options: tuple[str, ...] = ()
    module: str = "p2ptrain"
    variables: dict[str, str] = field(default_factory=dict)
    """Of the process's environment, beside everybody's."""

    def command(self, addresses: tuple[str, ...]) -> list[str]:
        """Discovery is off where an address is given, so that tests do not depend on it."""
        _, _, _, *line = DemoPeer.command(self, addresses)
        line = ["-m", self.module, *line]
        return [self.python, *line, *(("--no-discovery",) if addresses else ()), *self.options]


class PeerProcess:
    """One peer's process; a test may end it, stop it and start it again."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.process: trio.Process | None = None

    @property
    def name(self) -> str:
        return self.member.name

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    async def start(self, *addresses: str) -> PeerStatus:
        """Start it and wait for its first status."""
        with self.member.log.open("ab") as log:
            self.process = await trio.lowlevel.open_process(
                self.member.command(addresses),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**environment(self.member), **self.member.variables},
                start_new_session=True,
            )
        return await wait_started(self.member)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        os.kill(self.pid, number)

    @property
    def is_running(self) -> bool:
        """Whether its process is there, stopped or not."""
        return self.process is not None and self.process.poll() is None

    def resume(self) -> None:
        """Let it go on if it was stopped; one that is gone stays so."""
        if self.is_running:
            self.send(signal.SIGCONT)

    async def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        if self.process is not None:
            self.process.kill()
            await self.process.wait()

    async def status(self) -> PeerStatus:
        """What it says about itself; it must be running."""
        status = await self.member.status()
        assert status is not None, f"{self.name} does not answer"
        return status

    async def wait_status(self, holds: Callable[[PeerStatus], bool], timeout_s: float) -> float:
        """Poll until a status fulfils a condition; the seconds that it took."""
        began_s = time.monotonic()
        with trio.fail_after(timeout_s):
            while not holds(await self.status()):  # noqa: ASYNC110 another process
                await trio.sleep(POLL_S)
        return time.monotonic() - began_s

    def cpu_seconds(self) -> float:
        """User and system time of the process so far (proc(5), fields 14 and 15 of stat)."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S

    @property
    def log(self) -> str:
        """What it printed."""
        path = self.member.log
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


@contextlib.asynccontextmanager
async def peer_group(
    directory: Path,
    count: int,
    *,
    change: Callable[[Member], Member] = lambda member: member,
) -> AsyncIterator[tuple[PeerProcess, ...]]:
    """A new group of `count` running peers that see each other; all have ended afterwards.

    Args:
        change: Applied to every member before it starts.
    """
    made = make_peers(directory, count)
    peers = tuple(
        PeerProcess(change(Member(name=peer.name, home=peer.home))) for peer in made
    )  # fmt: skip
    async with ended_afterwards(peers):
        first = await peers[0].start()
        write_invites(made, first.address)
        async with trio.open_nursery() as nursery:
            for peer in peers[1:]:
                nursery.start_soon(peer.start, first.address)
        await wait_all_together(peers)
        yield peers


@contextlib.asynccontextmanager
async def ended_afterwards(peers: tuple[PeerProcess, ...]) -> AsyncIterator[None]:
    """End every process at the end of the block; when that fails, print what each one said."""
    try:
        yield
    except BaseException:
        for peer in peers:
            print(f"---- {peer.name}: {peer.process!r}\n{peer.log}")
        raise
    finally:
        with trio.CancelScope(shield=True):
            for peer in peers:
                await peer.kill()


async def wait_all_together(peers: tuple[PeerProcess, ...]) -> None:
    """Wait until each of these peers sees as many others alive as are given."""
    members: tuple[DemoPeer, ...] = tuple(peer.member for peer in peers)
    assert await wait_together(members, TOGETHER_S), "the peers do not see each other"


def environment(member: DemoPeer) -> dict[str, str]:
    """The environment of a shell on that device."""
    return {**os.environ, "P2PTRAIN_HOME": str(member.home), "PYTHONUNBUFFERED": "1"}


def job(text: Path, *, stages: int | None = None, seed: int = 5) -> TrainRequest:
    """Twenty steps of gpt-nano, four samples each, with dropout and clipping active."""
    return TrainRequest(
        bundle=str(BUNDLE),
        data=str(text),
        steps=STEPS,
        stages=stages,
        microbatches=4,
        microbatch_size=1,
        seed=seed,
        threads=1,
        dropout=DROPOUT,
        optimizer=OptimizerChoice(warmup_steps=4, clip_norm=CLIP_NORM),
        checkpoint_every=5,
    )


def short_job(text: Path, *, stages: int | None = None) -> TrainRequest:
    """The same on texts of 16 tokens and with the checkpoint at the end only: half of the cost,
    for tests in which nothing happens on the way."""
    bundle = text.parent / "gpt-nano"
    if not bundle.exists():
        write_bundle(bundle, short_context(load_bundle(BUNDLE)))
    usual = job(text, stages=stages)
    return dataclasses.replace(usual, bundle=str(bundle), checkpoint_every=STEPS)


def resumed(run: str, *, stages: int | None = None) -> TrainRequest:
    """Go on with a run of this device."""
    return TrainRequest(bundle="", data="", resume=run, stages=stages)


@dataclass(slots=True)
class Watched:
    """The events of one run, as they came."""

    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # Any: JSON values
    reached: int = 0
    """The greatest step that is done."""
    _changed: trio.Event = field(default_factory=trio.Event)

    def take(self, name: str, data: dict[str, Any]) -> None:  # Any: JSON values
        """Note one event."""
        self.events.append((name, data))
        if name == "step":
            self.reached = max(self.reached, int(data["step"]))
        self._changed.set()
        self._changed = trio.Event()

    @property
    def steps(self) -> list[StepReport]:
        """Every step so far."""
        return [from_plain(StepReport, data) for name, data in self.events if name == "step"]

    def named(self, name: str) -> list[dict[str, Any]]:  # Any: JSON values
        """The data of every event of one kind."""
        return [data for kind, data in self.events if kind == name]

    async def wait_step(self, step: int, timeout_s: float = 120.0) -> None:
        """Wait until that many steps are done."""
        with trio.fail_after(timeout_s):
            while self.reached < step:
                await self._changed.wait()


async def train(
    peer: PeerProcess,
    request: TrainRequest,
    watched: Watched | None = None,
    *,
    timeout_s: float = TRAIN_TIMEOUT_S,
) -> tuple[TrainResult, Watched]:
    """Have a peer conduct a run, as the command does; P2PTrainError as it was reported."""
    watched = Watched() if watched is None else watched
    with trio.fail_after(timeout_s):
        answer = await call(peer.member.socket(), "train", to_plain(request), watched.take)
    return from_plain(TrainResult, answer), watched


def command_line(*arguments: str) -> list[str]:
    """A command of p2ptrain with this interpreter."""
    return [sys.executable, "-m", "p2ptrain", *arguments]


@dataclass(slots=True)
class RunningCommand:
    """A command while it runs, and what it has said and printed so far."""

    process: trio.Process
    said: str = ""
    printed: str = ""
    ended_at_s: float | None = None
    _more: trio.Event = field(default_factory=trio.Event)
    _ended: trio.Event = field(default_factory=trio.Event)

    async def follow(self) -> None:
        """Read what it says and prints to its end."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read_stderr)
            nursery.start_soon(self._read_stdout)
            await self.process.wait()
            self.ended_at_s = time.monotonic()
        self._ended.set()

    async def wait_said(self, wanted: str) -> None:
        """Wait until it has said something on stderr; it must not end before."""
        while wanted not in self.said:
            assert not self._ended.is_set(), f"it ended without {wanted!r}: {self.said}"
            await self._more.wait()

    async def wait_ended(self) -> subprocess.CompletedProcess[str]:
        """How it ended, with all that it said and printed."""
        await self._ended.wait()
        code = self.process.returncode
        assert code is not None
        return subprocess.CompletedProcess(self.process.args, code, self.printed, self.said)

    async def _read_stderr(self) -> None:
        assert self.process.stderr is not None
        async for chunk in self.process.stderr:
            self.said += chunk.decode()
            self._more.set()
            self._more = trio.Event()
        self._more.set()

    async def _read_stdout(self) -> None:
        assert self.process.stdout is not None
        async for chunk in self.process.stdout:
            self.printed += chunk.decode()


@contextlib.asynccontextmanager
async def running_command(
    member: DemoPeer, *arguments: str, timeout_s: float
) -> AsyncIterator[RunningCommand]:
    """A command on a device while the block runs; ended by kill if it is still there then."""
    process = await trio.lowlevel.open_process(
        command_line(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(member),
    )
    running = RunningCommand(process)
    try:
        with trio.fail_after(timeout_s):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(running.follow)
                yield running
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    await trio.aclose_forcefully(stream)


def typed(request: TrainRequest) -> list[str]:
    """The command line that asks for a job, and for one JSON object as its result."""
    line = [
        "train",
        "--json",
        "--group",
        GROUP_NAME,
        "--model",
        request.bundle,
        "--data",
        request.data,
    ]
    line += ["--steps", str(request.steps), "--stages", str(request.stages)]
    line += ["--microbatches", str(request.microbatches)]
    line += ["--microbatch-size", str(request.microbatch_size), "--threads", "1"]
    line += ["--seed", str(request.seed), "--dropout", str(request.dropout)]
    line += ["--clip-norm", str(request.optimizer.clip_norm)]
    line += ["--warmup-steps", str(request.optimizer.warmup_steps)]
    return [*line, "--checkpoint-every", str(request.checkpoint_every)]


async def command(
    member: DemoPeer, *arguments: str, python_path_first: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run one command on a device to its end; modules are looked for in a given folder first."""
    variables = environment(member)
    if python_path_first is not None:
        variables["PYTHONPATH"] = f"{python_path_first}{os.pathsep}{variables['PYTHONPATH']}"
    with trio.fail_after(120):
        ended = await trio.run_process(
            command_line(*arguments),
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env=variables,
        )
    return subprocess.CompletedProcess(
        ended.args, ended.returncode, ended.stdout.decode(), ended.stderr.decode()
    )


def assert_refused(ended: subprocess.CompletedProcess[str], code: int, *said: str) -> None:
    """A clear end: the exit code, one sentence, one hint, no traceback, nothing on stdout."""
    lines = ended.stderr.splitlines()
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    assert re.match(r"p2ptrain: (?!hint: )\S", lines[-2]), ended.stderr
    assert re.match(r"p2ptrain: hint: \S", lines[-1]), ended.stderr
    for words in said:
        assert words in "\n".join(lines[-2:]), ended.stderr
    assert ended.stdout == ""
