"""`p2ptrain --help` is quick because it imports next to nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from p2ptrain.cli import planning_options
from p2ptrain.cli.main import run
from p2ptrain.planner.objective import GOALS
from p2ptrain.schedule.actions import SCHEDULES
from p2ptrain.training.contract import CODECS_OF_RUNS, PARALLELISMS

HEAVY = ("numpy", "onnxruntime", "zeroconf", "trio", "cryptography", "rich", "msgpack")


def _imported_by(*arguments: str) -> set[str]:
    line = [sys.executable, "-X", "importtime", "-m", "p2ptrain", *arguments]
    process = subprocess.run(line, capture_output=True, text=True, check=True, timeout=60)
    return {entry.rsplit("|", 1)[-1].strip().split(".")[0] for entry in process.stderr.splitlines()}


@pytest.mark.parametrize(
    "line",
    [
        "--help",
        "train --help",
        "join --help",
        "bundle verify --help",
        "demo --help",
        "doctor --help",
    ],
)
def test_help_imports_nothing_heavy(line: str) -> None:
    imported = _imported_by(*line.split())
    assert "click" in imported
    assert imported.isdisjoint(HEAVY)


def test_choices_are_those_of_the_cores() -> None:
    assert planning_options.GOALS == GOALS
    assert planning_options.SCHEDULES == SCHEDULES
    assert planning_options.CODECS == CODECS_OF_RUNS
    assert planning_options.PARALLELISMS == PARALLELISMS


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    printed = capsys.readouterr().out
    for name in ("group", "join", "train", "status", "energy", "doctor", "bundle", "demo"):
        assert f"\n  {name} " in printed
    assert "..." not in printed.partition("Commands:")[2]


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    for line in ([], ["group"], ["bundle"]):
        assert run(line) == 0
        assert "Usage: p2ptrain" in capsys.readouterr().out
