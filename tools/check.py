"""Run every check of this repository, environment by environment, and sum up.

    python tools/check.py full      what `make test` runs
    python tools/check.py lint      ruff and mypy
    python tools/check.py sim       the simulator's tests and 5,000 seeds of it

Every step is a plain command that can be run by hand; a failing step does not hide the later
ones. The last line counts tests as pytest does.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
RUNTIME: Final = ROOT / ".venv"
EXPORT: Final = ROOT / ".venv-export"
STOCK: Final = (ROOT / ".venv-stock", ROOT / ".venv-stock-3.13")
STOCK_VARIABLES: Final = ("P2PTRAIN_STOCK_PYTHON", "P2PTRAIN_STOCK_PYTHON_3_13")
STOCK_FOLDERS: Final = ("tests/unit", "tests/property", "tests/numerics", "tests/interop")
STOCK_SKIPS: Final = (("tests/unit", "tests/property"), ("tests/property",))
"""What says nothing about the other runtime; the unit tests run once more on Python 3.13."""
SOAK: Final = "tests/netns/test_soak.py"
THROTTLED: Final = "tests/netns/test_throttled_peers.py"
SIM_SEEDS: Final = 5000
LANES: Final = 3
"""On two cores: what runs real peers waits for disks and timers, so that beside two lanes most of a
core was free."""
OUTCOMES: Final = ("passed", "failed", "errors", "skipped", "deselected", "xfailed", "xpassed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One command with a name."""

    name: str
    command: tuple[str, ...]


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
    outcomes = levels[parser.parse_args().level]()
    return report(outcomes, time.monotonic() - started_s)


def run_everything() -> list[Outcome]:
    """What computes, in lanes; then what waits for emulated networks; then what measures."""
    outcomes = run_together(steps_that_compute())
    outcomes += run_together(steps_on_a_network())
    return outcomes + run_in_turn(steps_that_measure())


def lint_steps() -> list[Step]:
    """Style and types."""
    folders = [name for name in ("p2ptrain", "tests", "tools") if (ROOT / name).is_dir()]
    ruff, mypy = str(RUNTIME / "bin" / "ruff"), str(RUNTIME / "bin" / "mypy")
    return [
        Step(name="ruff check", command=(ruff, "check", *folders)),
        Step(name="ruff format", command=(ruff, "format", "--check", *folders)),
        Step(name="mypy", command=(mypy,)),
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
    """What fills a core, the longest first, so that lanes end together."""
    elsewhere = [f"--ignore=tests/{name}" for name in ("export", "arm", "e2e", "netns")]
    exact = "tests/e2e/test_exact_recovery.py"
    steps = [
        tests("runtime", RUNTIME, "tests", *elsewhere),
        tests("end to end", RUNTIME, "tests/e2e", f"--ignore={exact}"),
        tests("export", EXPORT, "tests/export"),
        tests("exact recovery", RUNTIME, exact),
        tests("arm", RUNTIME, "tests/arm", "-rs"),
    ]
    for folder, skipped in reversed(list(zip(STOCK, STOCK_SKIPS, strict=True))):
        if folder.is_dir():
            name = folder.name.removeprefix(".venv-")
            kept = [each for each in STOCK_FOLDERS if each not in skipped]
            steps.append(tests(name, folder, *kept, "--ignore=tests/unit/test_tidy.py"))
    return [*steps, *lint_steps()]


def steps_on_a_network() -> list[Step]:
    """What emulates networks: each takes half a core and waits for its delays the rest of the
    time, so two of them together are no slower."""
    elsewhere = [f"--ignore={each}" for each in (SOAK, THROTTLED)]
    return [
        tests("network", RUNTIME, "tests/netns", *elsewhere, "-rs"),
        tests("soak", RUNTIME, SOAK, "-rs"),
    ]


def steps_that_measure() -> list[Step]:
    """What compares rates with limits, alone on the machine."""
    return [tests("throttled", RUNTIME, THROTTLED, "-rs")]


def tests(name: str, environment: Path, *arguments: str) -> Step:
    """One run of pytest in one environment."""
    pytest = str(environment / "bin" / "pytest")
    return Step(name=f"{name} tests", command=(pytest, "-q", "--durations=5", *arguments))


def run_in_turn(steps: Sequence[Step]) -> list[Outcome]:
    """Run steps one after the other; each prints as it goes."""
    return [run(step, print_line=_print_now) for step in steps]


def run_together(steps: Sequence[Step]) -> list[Outcome]:
    """Run steps in lanes, each taking the next that nobody has begun; each prints when done."""
    printing = threading.Lock()

    def run_one(step: Step) -> Outcome:
        lines: list[str] = []
        outcome = run(step, print_line=lines.append)
        with printing:
            _print_now("".join(lines))
        return outcome

    with ThreadPoolExecutor(LANES) as pool:
        return list(pool.map(run_one, steps))


def _print_now(text: str) -> None:
    print(text, end="", flush=True)


def run(step: Step, *, print_line: Callable[[str], None]) -> Outcome:
    """Run one step; its output goes to `print_line` as it comes."""
    print_line(f"\n== {step.name}: {' '.join(step.command).replace(f'{ROOT}/', '')}\n")
    started_s = time.monotonic()
    # A few hundred processes are started: without bytecode each would compile all of p2ptrain.
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1", "PYTHONDONTWRITEBYTECODE": ""}
    for variable, folder in zip(STOCK_VARIABLES, STOCK, strict=True):
        environment.setdefault(variable, str(folder / "bin" / "python"))
    counts: Counter[str] = Counter()
    with subprocess.Popen(
        step.command, cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        for line in process.stdout or ():
            print_line(line)
            counts = count(line) or counts
    seconds = time.monotonic() - started_s
    return Outcome(step=step, code=process.returncode, seconds=seconds, counts=counts)


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
