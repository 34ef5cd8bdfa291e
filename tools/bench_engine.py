"""Compare whole training steps on one device with torch: `--help` says how."""

from __future__ import annotations

import contextlib
import datetime
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from p2ptrain.bundle.reading import parse_manifest
from p2ptrain.errors import ConfigError, P2PTrainError
from tools.bench.engine_report import Case, Reading, markdown, print_cases, to_json
from tools.bench.engine_workloads import WORKLOADS, EngineWorkload, exported, write_workload
from tools.bench.line_worker import LineWorker
from tools.bench.processes import machine
from tools.bench.ratios import Turn
from tools.bench.rounds import python_has_torch, turn_order
from tools.bench.workload import ROOT

_COUNT = click.IntRange(min=1)
EAGER, COMPILED, OURS, STOCK = "torch eager", "torch.compile", "p2ptrain", "p2ptrain, stock"


@click.command()
@click.option(
    "--workload",
    "names",
    type=click.Choice(sorted(WORKLOADS)),
    multiple=True,
    help="Repeatable. [default: all]",
)
@click.option("--threads", type=_COUNT, multiple=True, default=(1, 2), help="Repeatable.")
@click.option("--rounds", type=_COUNT, default=5, show_default=True, help="Turns of each.")
@click.option("--steps", type=_COUNT, default=3, show_default=True, help="Counted, per turn.")
@click.option("--warm-up", type=_COUNT, default=1, show_default=True, help="Steps not counted.")
@click.option("--no-compile", is_flag=True, help="Leave torch.compile out.")
@click.option(
    "--torch-python",
    default=str(ROOT / ".venv-export" / "bin" / "python"),
    help="Interpreter with torch and the exporter. [default: .venv-export of the checkout]",
)
@click.option(
    "--peer-python",
    default=str(ROOT / ".venv" / "bin" / "python"),
    help="Interpreter of a peer, without torch. [default: .venv of the checkout]",
)
@click.option(
    "--stock-python",
    default=str(ROOT / ".venv-stock" / "bin" / "python"),
    help="Interpreter with stock onnxruntime. [default: .venv-stock, if there is one]",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    default=ROOT / "build" / "bench",
    help="Where exported bundles are kept. [default: build/bench]",
)
@click.option(
    "--bundle",
    "ready",
    multiple=True,
    metavar="NAME=DIR",
    help="A bundle that is measured as it is, instead of exporting this workload; repeatable.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, not tables.")
@click.option("--markdown", "entry", type=click.Path(path_type=Path), help="Append an entry here.")
def main(
    names: tuple[str, ...],
    threads: tuple[int, ...],
    rounds: int,
    steps: int,
    warm_up: int,
    no_compile: bool,
    torch_python: str,
    peer_python: str,
    stock_python: str,
    cache: Path,
    ready: tuple[str, ...],
    as_json: bool,
    entry: Path | None,
) -> None:
    """Whole steps (forward, backward, clipping, AdamW; 8 microbatches) of a GPT, a BERT and a
    MobileNetV2 on one device, without any link, against torch eager and torch.compile.

    Every contender of a case starts each turn from the same parameters and sees the same samples,
    and takes its turn in every round. A missed target is printed as missed and changes no exit
    code; losses that differ exit with 1.
    """
    hardware = machine()
    interpreters = {OURS: peer_python, EAGER: torch_python, COMPILED: torch_python}
    if Path(stock_python).is_file():
        interpreters[STOCK] = stock_python
    if no_compile:
        del interpreters[COMPILED]
    try:
        _check(interpreters)
        given = _given(ready)
        cases = []
        for name in names or tuple(WORKLOADS):
            workload = WORKLOADS[name]
            bundle = given.get(name) or exported(cache.absolute(), workload, torch_python)
            for count in threads:
                case = Case(
                    workload=name, threads=count, rounds=rounds, warm_up=warm_up, readings={}
                )
                _measure(case, workload, bundle, interpreters, steps + warm_up)
                cases.append(case)
    except P2PTrainError as error:
        _note(error.message)
        _note(f"hint: {error.hint}")
        raise SystemExit(error.exit_code) from error
    heading = {
        "version": 1,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "tools/bench_engine.py", *_shown(sys.argv[1:])]),
        "machine": hardware,
    }
    if as_json:
        click.echo(json.dumps(heading | {"cases": [to_json(case) for case in cases]}, indent=1))
    else:
        print_cases(Console(width=max(Console().width, 110)), cases)
    if entry is not None:
        with entry.open("a", encoding="utf-8") as file:
            file.write("\n" + markdown(heading, cases))
    if not all(case.agrees for case in cases):
        raise SystemExit(1)


def _given(ready: tuple[str, ...]) -> dict[str, Path]:
    found = {}
    for entry in ready:
        name, _, folder = entry.partition("=")
        if name not in WORKLOADS or not (Path(folder) / "manifest.json").is_file():
            raise ConfigError(f"{entry!r} is not a workload's name and a bundle's directory")
        found[name] = Path(folder).absolute()
    return found


def _check(interpreters: dict[str, str]) -> None:
    for name, python in interpreters.items():
        if not Path(python).is_file():
            raise ConfigError(
                f"there is no interpreter {python}",
                hint="make them: python tools/make_environment.py runtime export stock",
            )
        if name in (OURS, STOCK) and python_has_torch(python):
            raise ConfigError(f"{python} has torch, which would count as our memory")


def _measure(
    case: Case, workload: EngineWorkload, bundle: Path, interpreters: dict[str, str], steps: int
) -> None:
    """Start every contender of one case and let them take turns."""
    manifest = parse_manifest((bundle / "manifest.json").read_bytes())
    with tempfile.TemporaryDirectory(prefix="p2ptrain-bench-") as folder:
        write_workload(Path(folder), workload, manifest, steps)
        with _started(case, bundle, Path(folder), interpreters) as workers:
            for number in range(case.rounds):
                for name in turn_order(list(workers), number):
                    answer = workers[name].ask("go")
                    turn = Turn(seconds=tuple(answer["seconds"]), losses=tuple(answer["losses"]))
                    reading = case.readings.setdefault(name, Reading())
                    reading.turns.append(turn)
                    reading.peak_bytes = workers[name].peak_bytes()
                    seconds = turn.median_s(dropped=case.warm_up)
                    where = f"{case.workload}, {case.threads} thread(s)"
                    _note(f"{where}, round {number + 1}: {name}: {seconds:.3f} s per step")


@contextlib.contextmanager
def _started(
    case: Case, bundle: Path, folder: Path, interpreters: dict[str, str]
) -> Iterator[dict[str, LineWorker]]:
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(
                LineWorker(_command(name, python, bundle, folder, case.threads), log=folder / "log")
            )
            for name, python in interpreters.items()
        }


def _command(name: str, python: str, bundle: Path, folder: Path, threads: int) -> list[str]:
    module = "engine_worker" if name in (OURS, STOCK) else "eager_worker"
    command = [python, "-m", f"tools.bench.{module}", "--workload", str(folder)]
    command += ["--threads", str(threads)]
    if module == "engine_worker":
        command += ["--bundle", str(bundle)]
    elif name == COMPILED:
        command.append("--compile")
    return command


def _shown(arguments: list[str]) -> list[str]:
    """Without the options that name places of this machine."""
    hidden = (
        "--bundle",
        "--torch-python",
        "--peer-python",
        "--stock-python",
        "--cache",
        "--markdown",
    )
    shown, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in hidden:
            skip = True
        else:
            shown.append(argument)
    return shown


def _note(text: str) -> None:
    click.echo(f"p2ptrain: {text}", err=True)


if __name__ == "__main__":
    main()
