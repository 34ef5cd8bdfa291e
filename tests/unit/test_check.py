"""The tools that set up environments and sum up test runs, as far as they only compute."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def tool(name: str) -> ModuleType:
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("===== 12 passed, 1 skipped in 3.21s =====", "12 passed, 1 skipped"),
        ("12 passed in 3s", "12 passed"),
        ("1 failed, 2 errors in 75.01s (0:01:15)", "1 failed, 2 errors"),
        ("1 error in 0.10s", "1 errors"),
        ("3 passed, 2 warnings in 0.10s", "3 passed"),
        ("0.55s call tests/x.py::test_y", ""),
        ("12 passed", ""),
    ],
)
def test_closing_line_is_counted(line: str, words: str) -> None:
    check = tool("check")
    assert check.words(check.count(line)) == words


def test_failing_step_shows_in_the_closing_line(capsys: pytest.CaptureFixture[str]) -> None:
    check = tool("check")
    step = check.Step(name="says no", command=(sys.executable, "-c", "raise SystemExit(3)"))
    assert check.report([check.run(step, print_line=print)], 1.0) == 1
    printed = capsys.readouterr().out
    assert "exit 3" in printed
    assert printed.rstrip().endswith("===== 1 errors in 1.00s =====")


def test_passing_steps_are_summed(capsys: pytest.CaptureFixture[str]) -> None:
    check = tool("check")
    says = (sys.executable, "-c", "print('2 passed, 1 skipped in 0.1s')")
    outcomes = check.run_in_turn([check.Step(name=name, command=says) for name in ("a", "b")])
    assert check.report(outcomes, 9.0) == 0
    assert capsys.readouterr().out.rstrip().endswith("===== 4 passed, 2 skipped in 9.00s =====")


def test_stock_environment_has_exactly_one_runtime() -> None:
    environment = tool("make_environment")
    project = environment.read_project()
    for name, recipe in environment.RECIPES.items():
        lines = environment.requirements(project, recipe)
        runtimes = [line for line in lines if line.startswith("onnxruntime")]
        assert len(runtimes) == (1 if "stock" in name else 2), name
        if "stock" in name:
            assert ";" not in runtimes[0]
            assert "training" not in runtimes[0]


def test_torch_is_only_in_the_export_environment() -> None:
    environment = tool("make_environment")
    project = environment.read_project()
    with_torch = [
        name
        for name, recipe in environment.RECIPES.items()
        if any(line.startswith("torch") for line in environment.requirements(project, recipe))
    ]
    assert with_torch == ["export"]


def test_demo_environment_is_part_of_the_runtime_one() -> None:
    environment = tool("make_environment")
    demo, runtime = environment.RECIPES["demo"], environment.RECIPES["runtime"]
    assert demo.folder == runtime.folder
    assert environment.stamp_of(demo) < environment.stamp_of(runtime)


def test_interpreter_that_does_not_start_is_passed_over(tmp_path: Path) -> None:
    environment = tool("make_environment")
    broken = tmp_path / "python3.13"
    broken.write_text("#!/bin/sh\nexit 127\n")
    broken.chmod(0o755)
    assert environment.python_version(str(broken)) is None
    assert environment.python_version(str(tmp_path / "absent")) is None
    found = environment.python_version(sys.executable)
    assert found == f"{sys.version_info[0]}.{sys.version_info[1]}"


def test_lanes_keep_each_others_output_apart(capsys: pytest.CaptureFixture[str]) -> None:
    check = tool("check")
    steps = [
        check.Step(name=name, command=("echo", f"{number} passed in 0.1s"))
        for number, name in ((1, "a"), (2, "b"), (3, "c"))
    ]
    outcomes = check.run_together(steps)
    assert [outcome.counts["passed"] for outcome in outcomes] == [1, 2, 3]
    printed = capsys.readouterr().out
    for name, count in (("a", 1), ("b", 2), ("c", 3)):
        assert f"== {name}: echo {count} passed in 0.1s\n{count} passed in 0.1s\n" in printed


def test_two_steps_run_at_once(tmp_path: Path) -> None:
    check = tool("check")
    first, second = tmp_path / "first", tmp_path / "second"
    for path in (first, second):
        os.mkfifo(path)
    meet = "import sys; open(sys.argv[1], 'w').close(); open(sys.argv[2]).close()"
    answer = "import sys; open(sys.argv[1]).close(); open(sys.argv[2], 'w').close()"
    steps = [
        check.Step(name=code, command=(sys.executable, "-c", code, str(first), str(second)))
        for code in (meet, answer)
    ]
    assert [outcome.code for outcome in check.run_together(steps)] == [0, 0]


def test_what_has_real_peers_goes_before_what_only_computes() -> None:
    check = tool("check")
    steps = [*check.steps_that_compute(), *check.steps_on_a_network()]
    first = {step.name for step in steps if step.is_pytest and not step.yields}
    assert first == {f"{name} tests" for name in (
        "end to end", "exact recovery", "arm", "network", "soak",
    )}  # fmt: skip
    printed = list[str]()
    says = (sys.executable, "-c", "import os; print('niceness', os.nice(0))")
    for yields in (False, True):
        check.run(check.Step(name="says", command=says, yields=yields), print_line=printed.append)
    values = [int(line.split()[1]) for line in printed if line.startswith("niceness")]
    assert values == [os.nice(0), min(os.nice(0) + 10, 19)]


def test_every_folder_of_tests_is_run_by_some_step() -> None:
    check = tool("check")
    steps = [
        *check.steps_that_compute(), *check.steps_on_a_network(), *check.steps_that_measure()
    ]  # fmt: skip
    (rest,) = (step for step in steps if step.name == "runtime tests")
    assert "tests" in rest.command
    assert "tests/shell" in ignored_by(rest.command)
    for each in steps:
        if each.name in ("runtime tests", "end to end tests", "network tests"):
            others = {word for step in steps if step is not each for word in step.command}
            assert ignored_by(each.command) <= others, each.name


def ignored_by(command: tuple[str, ...]) -> set[str]:
    prefix = "--ignore="
    return {each.removeprefix(prefix) for each in command if each.startswith(prefix)}


def test_temporary_files_are_in_memory_while_steps_run_and_gone_afterwards(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    check = tool("check")
    says = (sys.executable, "-c", "import sys, tempfile; print(tempfile.gettempdir(), *sys.argv)")
    step = check.Step(name="says", command=says, is_pytest=True)
    with check.folder_in_memory(tmp_path, 0) as folder:
        check.run_together([step], folder)
        assert folder.parent == tmp_path
        (own,) = folder.iterdir()
        assert f"\n{folder} -c --basetemp={own} -o " in capfd.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_temporary_files_stay_on_the_disk_without_room_in_memory(tmp_path: Path) -> None:
    check = tool("check")
    for parent, free_bytes_min in ((tmp_path, 1 << 62), (tmp_path / "absent", 0)):
        with check.folder_in_memory(parent, free_bytes_min) as folder:
            assert folder is None
    assert list(tmp_path.iterdir()) == []


ENDED = """
import sys
sys.path.insert(0, sys.argv[1])
import check
check.hear_signals()
check.LANES = 1
line = (sys.executable, "-c", "import os, signal; os.kill(os.getppid(), signal.SIGTERM); "
        "import time; time.sleep(600)")
with check.folder_in_memory(check.Path(sys.argv[2]), 0) as folder:
    check.run_together([check.Step(name=name, command=line) for name in ("a", "b")], folder)
"""


def test_program_that_is_ended_interrupts_its_steps_and_leaves_nothing(tmp_path: Path) -> None:
    """Also where the program was started with SIGINT ignored, as a shell's background jobs are."""
    ignoring = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    again = "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    line = [
        *(sys.executable, "-c", ignoring + again),
        *("-c", ENDED, str(ROOT / "tools"), str(tmp_path)),
    ]
    ended = subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 128 + signal.SIGTERM, ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_newest_stock_environment_runs_all_and_others_what_two_runtimes_agree_on(
    tmp_path: Path,
) -> None:
    check = tool("check")
    folders = [tmp_path / ".venv-stock", tmp_path / ".venv-stock-3.13"]
    assert check.stock_steps(folders) == []
    folders[0].mkdir()
    (only,) = check.stock_steps(folders)
    assert only.name == "stock tests"
    assert {"tests/unit", "tests/numerics", "tests/interop"} <= set(only.command)
    folders[1].mkdir()
    newest, older = check.stock_steps(folders)
    assert newest.command[1:] == only.command[1:]
    assert "tests/interop" in older.command
    assert not {"tests/unit", "tests/numerics"} & set(older.command)


def test_processes_keep_their_bytecode(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check = tool("check")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    says = (sys.executable, "-c", "import sys; print(sys.dont_write_bytecode)")
    assert check.run(check.Step(name="keeps", command=says), print_line=print).code == 0
    assert capfd.readouterr().out.endswith("False\n\n")
