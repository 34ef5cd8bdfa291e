"""The measurement itself: every contender takes a turn in every round."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import trio

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.bundle.reading import parse_manifest
from p2ptrain.errors import ConfigError
from p2ptrain.planner.profile import KindCost
from p2ptrain.runtime.reports import PlanReport
from p2ptrain.wire.codec import from_plain
from tools.bench.peer_contender import PeerGroup, open_group
from tools.bench.processes import peak_bytes
from tools.bench.ratios import TORCH, TORCH_1F1B, TORCH_ZERO_BUBBLE, Case, Turn, cases
from tools.bench.torch_contender import (
    TorchChoice,
    eager_choices,
    open_torch,
    pipeline_choices,
    zero_bubble_choices,
)
from tools.bench.workload import ROOT, Texts, Workload, write_texts, write_torch_inputs

Note = Callable[[str], None]
Take = Callable[[], Awaitable[Turn]]
PROFILE_TIMEOUT_S: Final = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to measure, where, with which interpreters."""

    workload: Workload
    long_microbatches: int | None
    rounds: int
    torch_python: str
    peer_python: str
    bundle: Path
    folder: Path
    """For homes, data and logs; the caller removes it."""


@dataclass(slots=True, kw_only=True)
class Measured:
    """Everything one run of the benchmark found."""

    manifest: Manifest
    turns: dict[str, list[Turn]] = field(default_factory=dict)
    """By contender, one per round."""
    peaks_bytes: dict[str, list[tuple[int | None, ...]]] = field(default_factory=dict)
    """By contender, one per round: the peak of each process since it started."""
    plans: dict[str, list[PlanReport]] = field(default_factory=dict)
    """Of our contenders, one per round: the planner measures anew in each session."""
    digests: dict[str, set[str]] = field(default_factory=dict)
    """Of our contenders: hashes of parameters and optimizer state after each session."""
    costs: list[dict[str, KindCost]] = field(default_factory=list)
    """One profile per round, by segment kind."""
    trials: dict[str, float] = field(default_factory=dict)
    """Seconds per step of every way to train with torch that was tried."""
    chosen: dict[str, TorchChoice] = field(default_factory=dict)
    torch_version: str = ""
    runtime: str = ""


async def measure(settings: Settings, note: Note) -> Measured:
    """Choose torch's fastest ways, start every contender, then let them take turns."""
    manifest = parse_manifest((settings.bundle / "manifest.json").read_bytes())
    texts = write_texts(settings.folder)
    write_torch_inputs(settings.folder, settings.workload, manifest, texts)
    measured = Measured(manifest=manifest)
    await _choose_torch(settings, measured, note)
    async with contextlib.AsyncExitStack() as stack:
        takes, pids = await _open_all(stack, settings, measured, texts, note)
        for number in range(settings.rounds):
            measured.costs.append(await _profile(settings, measured))
            for name in turn_order(list(takes), number):
                turn = await takes[name]()
                measured.turns.setdefault(name, []).append(turn)
                peaks = tuple(peak_bytes(pid) for pid in pids[name])
                measured.peaks_bytes.setdefault(name, []).append(peaks)
                seconds = turn.median_s(dropped=settings.workload.warm_up)
                note(f"round {number + 1} of {settings.rounds}: {name}: {seconds:.3f} s per step")
    return measured


def turn_order(names: Sequence[str], round_index: int) -> list[str]:
    """Every name once; each round begins with another one, so that none is always first."""
    shift = round_index % len(names)
    return [*names[shift:], *names[:shift]]


async def _choose_torch(settings: Settings, measured: Measured, note: Note) -> None:
    """Give torch its best: try each way for one turn, keep the fastest."""
    eager = await _fastest(eager_choices(), settings, measured, note)
    layers = settings.workload.model.layers
    pipelines = pipeline_choices(eager.attention, layers)
    pipeline = await _fastest(pipelines, settings, measured, note)
    delayed = await _fastest(zero_bubble_choices(eager.attention, layers), settings, measured, note)
    measured.chosen = {TORCH: eager, TORCH_1F1B: pipeline, TORCH_ZERO_BUBBLE: delayed}


async def _fastest(
    choices: Sequence[TorchChoice], settings: Settings, measured: Measured, note: Note
) -> TorchChoice:
    seconds: dict[TorchChoice, float] = {}
    for choice in choices:
        async with open_torch(
            choice,
            folder=settings.folder,
            python=settings.torch_python,
            threads=settings.workload.threads,
        ) as contender:
            turn = await contender.turn()
        seconds[choice] = turn.median_s(dropped=settings.workload.warm_up)
        measured.trials[str(choice)] = seconds[choice]
        note(f"torch tried: {choice}: {seconds[choice]:.3f} s per step")
    return min(seconds, key=seconds.__getitem__)


async def _open_all(
    stack: contextlib.AsyncExitStack,
    settings: Settings,
    measured: Measured,
    texts: Texts,
    note: Note,
) -> tuple[dict[str, Take], dict[str, tuple[int, ...]]]:
    """Start the processes of every contender; gives how each takes its turn, and its pids."""
    takes: dict[str, Take] = {}
    pids: dict[str, tuple[int, ...]] = {}
    threads = settings.workload.threads
    for name, choice in measured.chosen.items():
        contender = await stack.enter_async_context(
            open_torch(
                choice, folder=settings.folder, python=settings.torch_python, threads=threads
            )
        )
        takes[name], pids[name] = contender.turn, contender.pids
        measured.torch_version = contender.version
    for count in (1, 2):
        group = await stack.enter_async_context(
            open_group(
                count,
                folder=settings.folder / f"group-{count}",
                python=settings.peer_python,
                threads=threads,
            )
        )
        for case in cases(settings.workload.microbatches, settings.long_microbatches):
            if case.peers == count:
                takes[str(case)] = _peer_take(group, case, settings, measured, texts)
                pids[str(case)] = group.pids
        note(f"{count} p2ptrain {'peer runs' if count == 1 else 'peers run'}")
    return takes, pids


def _peer_take(
    group: PeerGroup,
    case: Case,
    settings: Settings,
    measured: Measured,
    texts: Texts,
) -> Take:
    name = str(case)

    async def take() -> Turn:
        session = await group.train(
            settings.workload,
            case.microbatches,
            settings.bundle,
            texts,
            schedule=case.schedule,
        )
        measured.plans.setdefault(name, []).append(session.plan)
        measured.digests.setdefault(name, set()).add(session.result.state_digest)
        return session.turn

    return take


async def _profile(settings: Settings, measured: Measured) -> dict[str, KindCost]:
    """Time every segment kind in a fresh process of the peers' interpreter."""
    workload = settings.workload
    command = [settings.peer_python, "-m", "tools.bench.profile_worker"]
    command += ["--bundle", str(settings.bundle), "--form", workload.form]
    command += ["--batch", str(workload.microbatch_size), "--threads", str(workload.threads)]
    with trio.fail_after(PROFILE_TIMEOUT_S):
        ended = await trio.run_process(
            command,
            capture_stdout=True,
            check=False,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    if ended.returncode != 0:
        raise ConfigError(
            "the segments could not be profiled; the reason is above",
            hint="give an interpreter that has p2ptrain's dependencies with --peer-python",
        )
    document: dict[str, Any] = json.loads(ended.stdout)  # Any: JSON values
    build: Mapping[str, str] = document["build"]
    measured.runtime = f"{build['runtime']} {build['version']} ({build['isa']})"
    return {kind: from_plain(KindCost, cost) for kind, cost in document["kinds"].items()}


def python_has_torch(python: str) -> bool:
    """Whether an interpreter finds torch: a peer must not, or its memory is torch's."""
    code = "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is not None)"
    return subprocess.run([python, "-c", code], check=False).returncode != 0
