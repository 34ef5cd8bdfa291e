"""Compare pipelined training over encrypted links with torch: `--help` says how."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from pathlib import Path

import click
import trio
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from p2ptrain.errors import ConfigError, P2PTrainError
from tools.bench.processes import machine
from tools.bench.report import make_report, markdown, print_report
from tools.bench.rounds import Settings, measure, python_has_torch
from tools.bench.workload import ROOT, ModelShape, Workload, exported_bundle

_COUNT = click.IntRange(min=1)


@click.command()
@click.option("--rounds", type=_COUNT, default=5, show_default=True, help="Turns of each.")
@click.option("--steps", type=_COUNT, default=3, show_default=True, help="Counted, per turn.")
@click.option("--warm-up", type=_COUNT, default=1, show_default=True, help="Steps not counted.")
@click.option("--microbatches", type=_COUNT, default=8, show_default=True, help="Of 4 samples.")
@click.option(
    "--long-microbatches",
    type=click.IntRange(min=0),
    default=32,
    show_default=True,
    help="Of our second case; 0 leaves it out.",
)
@click.option("--threads", type=_COUNT, default=1, show_default=True, help="Of every process.")
@click.option(
    "--form",
    type=click.Choice(["portable", "training"]),
    default="portable",
    show_default=True,
    help="Of our graphs.",
)
@click.option(
    "--torch-python",
    default=str(ROOT / ".venv-export" / "bin" / "python"),
    help="Interpreter with torch and the exporter. [default: .venv-export of the checkout]",
)
@click.option(
    "--peer-python",
    default=str(ROOT / ".venv" / "bin" / "python"),
    help="Interpreter of the peers, without torch. [default: .venv of the checkout]",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    default=ROOT / "build" / "bench",
    help="Where exported bundles are kept. [default: build/bench]",
)
@click.option("--bundle", type=click.Path(path_type=Path), help="A bundle, instead of exporting.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, not tables.")
@click.option("--markdown", "entry", type=click.Path(path_type=Path), help="Append an entry here.")
def main(
    rounds: int,
    steps: int,
    warm_up: int,
    microbatches: int,
    long_microbatches: int,
    threads: int,
    form: str,
    torch_python: str,
    peer_python: str,
    cache: Path,
    bundle: Path | None,
    as_json: bool,
    entry: Path | None,
) -> None:
    """Torch eager, torch 1F1B and zero-bubble over gloo, one p2ptrain peer and two over TLS under
    1F1B and eager ZB-H1, interleaved.

    The model is a GPT of 13.8 million parameters, 128 tokens, AdamW, on real English. Every
    contender starts each turn from the same parameters and sees the same samples; their losses
    are compared. A missed target is printed as missed, and changes no exit code; a failed check
    of losses or bits exits with 1.
    """
    hardware = machine()
    workload = Workload(
        microbatches=microbatches, warm_up=warm_up, steps=steps, form=form, threads=threads
    )
    try:
        _check_interpreters(torch_python, peer_python)
        found = bundle or exported_bundle(cache, ModelShape(), torch_python)
        with tempfile.TemporaryDirectory(prefix="p2ptrain-bench-") as folder:
            settings = Settings(
                workload=workload,
                long_microbatches=long_microbatches or None,
                rounds=rounds,
                torch_python=torch_python,
                peer_python=peer_python,
                bundle=found.absolute(),
                folder=Path(folder),
            )
            measured = trio.run(measure, settings, _note)
        report = make_report(settings, measured, command=_command(), hardware=hardware)
    except P2PTrainError as error:
        _note(error.message)
        _note(f"hint: {error.hint}")
        raise SystemExit(error.exit_code) from error
    except trio.TooSlowError as error:
        _note("a contender did not answer in time; nothing was measured")
        raise SystemExit(1) from error
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=1))
    else:
        print_report(Console(width=max(Console().width, 120)), report)
    if entry is not None:
        with entry.open("a", encoding="utf-8") as file:
            file.write("\n" + markdown(report))
    if not all(check.is_met for check in report.checks):
        raise SystemExit(1)


def _check_interpreters(torch_python: str, peer_python: str) -> None:
    for python in (torch_python, peer_python):
        if not Path(python).is_file():
            raise ConfigError(
                f"there is no interpreter {python}",
                hint="make them: python tools/make_environment.py runtime export",
            )
    if python_has_torch(peer_python):
        raise ConfigError(
            f"{peer_python} has torch, which would count as the peers' memory",
            hint="give an interpreter without torch with --peer-python",
        )


def _command() -> str:
    """As typed, without the places of this machine's interpreters."""
    return shlex.join(["python", "tools/bench_pipeline.py", *shown_arguments(sys.argv[1:])])


def shown_arguments(arguments: list[str]) -> list[str]:
    """Without the options that name places of this machine."""
    hidden = ("--torch-python", "--peer-python", "--cache", "--bundle", "--markdown")
    shown, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in hidden:
            skip = True
        elif not argument.startswith(tuple(f"{name}=" for name in hidden)):
            shown.append(argument)
    return shown


def _note(text: str) -> None:
    click.echo(f"p2ptrain: {text}", err=True)


if __name__ == "__main__":
    main()
