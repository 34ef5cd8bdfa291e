"""Run every check of this repository, environment by environment, and sum up.

    python tools/check.py full      what `make test` runs
    python tools/check.py lint      ruff and mypy
    python tools/check.py sim       the simulator's tests and 5,000 seeds of it

Every step is a plain command that can be run by hand; a failing step does not hide the later
ones. The last line counts tests as pytest does.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

ROOT: Final = Path(__file__).resolve().parents[1]
RUNTIME: Final = ROOT / ".venv"
EXPORT: Final = ROOT / ".venv-export"
STOCK: Final = (ROOT / ".venv-stock", ROOT / ".venv-stock-3.13")
STOCK_VARIABLES: Final = ("P2PTRAIN_STOCK_PYTHON", "P2PTRAIN_STOCK_PYTHON_3_13")
STOCK_FOLDERS: Final = ("tests/unit", "tests/numerics", "tests/interop")
"""The unit tests say nothing about the other runtime, but something about a newer Python."""
SOAK: Final = "tests/netns/test_soak.py"
THROTTLED: Final = "tests/netns/test_throttled_peers.py"
SIM_SEEDS: Final = 5000
LANES: Final = 4
"""On two cores: what runs real peers waits for timers and networks, so that a tenth of both cores
was free beside two lanes that compute."""
YIELDING: Final = ("nice", "-n", "10")
"""Before what only computes: real peers have deadlines, and go first where both want a core."""
MEMORY: Final = Path("/dev/shm")
MEMORY_FREE_BYTES_MIN: Final = 4 << 30
RUNNING: Final[set[subprocess.Popen[str]]] = set()
"""Steps under way, so that none outlives a program that is ended."""
OUTCOMES: Final = ("passed", "failed", "errors", "skipped", "deselected", "xfailed", "xpassed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One command with a name."""

    name: str
    command: tuple[str, ...]
    is_pytest: bool = False
    yields: bool = False
    """Whether it only computes, so that others with real peers go first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one step ended."""

    step: Step
    code: int
    seconds: float
    counts: Counter[str]


def main() -> int:
    """Run the steps of one level; 0 when all of them passed."""
    parser = argparse.ArgumentParser(description="run checks")
    parser.add_argument("level", choices=["full", "lint", "sim"])
    levels = {
        "full": run_everything,
        "lint": lambda: run_in_turn(lint_steps()),
        "sim": lambda: run_in_turn(sim_steps()),
    }
    started_s = time.monotonic()
    run_level = levels[parser.parse_args().level]
    hear_signals()
    outcomes = run_level()
    return report(outcomes, time.monotonic() - started_s)


def run_everything() -> list[Outcome]:
    """What computes, in lanes; then what waits for emulated networks; then what measures.

    The latter two stay on the disk: files in memory would count against the limits of peers.
    """
    with folder_in_memory() as folder:
        outcomes = run_together(steps_that_compute(), folder)
    outcomes += run_together(steps_on_a_network())
    return outcomes + run_in_turn(steps_that_measure())


@contextlib.contextmanager
def folder_in_memory(
    parent: Path = MEMORY, free_bytes_min: int = MEMORY_FREE_BYTES_MIN
) -> Iterator[Path | None]:
    """A folder for the tests' temporary files while the block runs; None where there is no room.

    A run of a few peers syncs hundreds of files, and on a disk the tests mostly wait for that. None
    shows less in memory: they kill processes, which loses no more there, and never cut the power.
    """
    if not parent.is_dir() or shutil.disk_usage(parent).free < free_bytes_min:
        yield None
        return
    # A short name: sockets of peers are below it, and their paths have 108 bytes.
    with tempfile.TemporaryDirectory(prefix="p2p", dir=parent, ignore_cleanup_errors=True) as made:
        yield Path(made)


def hear_signals() -> None:
    """SIGTERM ends the steps, too; they hear SIGINT though a background job's shell ignores it."""
    signal.signal(signal.SIGTERM, end_what_runs)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def end_what_runs(number: int, _frame: object) -> NoReturn:
    """At SIGTERM: interrupt every step, as Ctrl-C does, so that its peers end with it, and exit."""
    for process in tuple(RUNNING):
        process.send_signal(signal.SIGINT)
    sys.exit(128 + number)


def lint_steps() -> list[Step]:
    """Style and types."""
    folders = [name for name in ("p2ptrain", "tests", "tools") if (ROOT / name).is_dir()]
    ruff, mypy = str(RUNTIME / "bin" / "ruff"), str(RUNTIME / "bin" / "mypy")
    return [
        Step(name="ruff check", command=(ruff, "check", *folders), yields=True),
        Step(name="ruff format", command=(ruff, "format", "--check", *folders), yields=True),
        Step(name="mypy", command=(mypy,), yields=True),
    ]


def sim_steps() -> list[Step]:
    """The simulator: its tests, then many seeds of runs that change their views."""
    python = str(RUNTIME / "bin" / "python")
    campaign = (python, "-m", "tests.sim.run", "--story", "run", "--seeds", str(SIM_SEEDS))
    return [
        tests("simulator", RUNTIME, "tests/sim"),
        Step(name=f"{SIM_SEEDS} runs", command=campaign),
    ]


def steps_that_compute() -> list[Step]:
    """What fills a core: first what also waits, then what computes, the longest first, so that
    both cores are busy to the end."""
    others = ("export", "arm", "e2e", "netns", "shell")
    elsewhere = [f"--ignore=tests/{name}" for name in others]
    exact = "tests/e2e/test_exact_recovery.py"
    return [
        tests("end to end", RUNTIME, "tests/e2e", f"--ignore={exact}"),
        tests("exact recovery", RUNTIME, exact),
        yielding("shell, R to Z", RUNTIME, "tests/shell", "--ignore-glob=tests/shell/test_[a-q]*"),
        yielding("runtime", RUNTIME, "tests", *elsewhere),
        tests("arm", RUNTIME, "tests/arm", "-rs"),
        yielding("export", EXPORT, "tests/export"),
        yielding("shell, A to Q", RUNTIME, "tests/shell", "--ignore-glob=tests/shell/test_[r-z]*"),
    ]


def steps_on_a_network() -> list[Step]:
    """What emulates networks: each takes half a core and waits for its delays the rest of the
    time, so two of them together are no slower, and what needs no clock has a core beside them."""
    elsewhere = [f"--ignore={each}" for each in (SOAK, THROTTLED)]
    return [
        tests("network", RUNTIME, "tests/netns", *elsewhere, "-rs"),
        tests("soak", RUNTIME, SOAK, "-rs"),
        *stock_steps(),
        *lint_steps(),
    ]


def stock_steps(folders: Sequence[Path] = STOCK) -> list[Step]:
    """The other runtime: the newest Python that is there runs everything, and the others, where
    the same release computes, only what two runtimes have to agree on."""
    newest, *older = [folder for folder in reversed(folders) if folder.is_dir()] or [None]
    if newest is None:
        return []
    steps = [stock_tests(newest, STOCK_FOLDERS)]
    return steps + [stock_tests(folder, ["tests/interop"]) for folder in older]


def stock_tests(folder: Path, kept: Sequence[str]) -> Step:
    """Some folders of tests in a stock environment."""
    name = folder.name.removeprefix(".venv-")
    return yielding(name, folder, *kept, "--ignore=tests/unit/test_tidy.py")


def steps_that_measure() -> list[Step]:
    """What compares rates with limits, alone on the machine."""
    return [tests("throttled", RUNTIME, THROTTLED, "-rs")]


def tests(name: str, environment: Path, *arguments: str) -> Step:
    """One run of pytest in one environment."""
    pytest = str(environment / "bin" / "pytest")
    command = (pytest, "-q", "--durations=5", *arguments)
    return Step(name=f"{name} tests", command=command, is_pytest=True)


def yielding(name: str, environment: Path, *arguments: str) -> Step:
    """The same for tests that only compute."""
    return dataclasses.replace(tests(name, environment, *arguments), yields=True)


def run_in_turn(steps: Sequence[Step]) -> list[Outcome]:
    """Run steps one after the other; each prints as it goes."""
    return [run(step, print_line=_print_now) for step in steps]


def run_together(steps: Sequence[Step], folder: Path | None = None) -> list[Outcome]:
    """Run steps in lanes, each taking the next that nobody has begun; each prints when done.

    Interrupted it begins no other, and waits for those that run. Temporary files go into `folder`.
    """
    printing = threading.Lock()

    def run_one(step: Step) -> Outcome:
        lines: list[str] = []
        outcome = run(step, print_line=lines.append, folder=folder)
        with printing:
            _print_now("".join(lines))
        return outcome

    with ThreadPoolExecutor(LANES) as pool:
        return list(pool.map(run_one, steps))


def _print_now(text: str) -> None:
    print(text, end="", flush=True)


def run(step: Step, *, print_line: Callable[[str], None], folder: Path | None = None) -> Outcome:
    """Run one step; its output goes to `print_line` as it comes, its temporary files to `folder`,
    or where they usually go."""
    print_line(f"\n== {step.name}: {' '.join(step.command).replace(f'{ROOT}/', '')}\n")
    started_s = time.monotonic()
    # A few hundred processes are started: without bytecode each would compile all of p2ptrain.
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1", "PYTHONDONTWRITEBYTECODE": ""}
    for variable, stock in zip(STOCK_VARIABLES, STOCK, strict=True):
        environment.setdefault(variable, str(stock / "bin" / "python"))
    command = step.command
    if step.yields and shutil.which(YIELDING[0]) is not None:
        command = (*YIELDING, *command)
    if folder is not None:
        environment["TMPDIR"] = str(folder)
        command += in_folder(folder) if step.is_pytest else ()
    counts: Counter[str] = Counter()
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        RUNNING.add(process)
        for line in process.stdout or ():
            print_line(line)
            counts = count(line) or counts
    RUNNING.discard(process)
    seconds = time.monotonic() - started_s
    return Outcome(step=step, code=process.returncode, seconds=seconds, counts=counts)


def in_folder(parent: Path) -> tuple[str, ...]:
    """Options of pytest: a folder of its own, in which what passes leaves nothing."""
    own = tempfile.mkdtemp(prefix="", dir=parent)
    return (f"--basetemp={own}", "-o", "tmp_path_retention_policy=failed")


def count(line: str) -> Counter[str]:
    """Tests by outcome in pytest's closing line; empty for any other line."""
    if not re.search(r"\bin \d+(\.\d+)?s\b", line):
        return Counter()
    pairs = re.findall(r"(\d+) ([a-z]+)", line)
    plural = {"error": "errors"}
    found = {plural.get(word, word): int(number) for number, word in pairs}
    return Counter({word: found[word] for word in OUTCOMES if word in found})


def report(outcomes: list[Outcome], seconds: float) -> int:
    """Print a table of steps and one closing line; 0 when every step passed."""
    print("\n== summary")
    total: Counter[str] = Counter()
    for outcome in outcomes:
        total += outcome.counts
        verdict = "ok" if outcome.code == 0 else f"exit {outcome.code}"
        took = f"{outcome.seconds:7.1f} s"
        print(f"{outcome.step.name:<24} {took}  {verdict:<8} {words(outcome.counts)}")
    failed = [outcome for outcome in outcomes if outcome.code != 0]
    if failed and not total["failed"] and not total["errors"]:
        total["errors"] = len(failed)
    print(f"total {seconds:.0f} s")
    print(f"===== {words(total) or 'no tests ran'} in {seconds:.2f}s =====")
    return 1 if failed else 0


def words(counts: Counter[str]) -> str:
    """`12 passed, 1 skipped`."""
    return ", ".join(f"{counts[word]} {word}" for word in OUTCOMES if counts[word])


if __name__ == "__main__":
    sys.exit(main())
