"""Measure what logging and replication cost a run: `--help` says how."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import trio

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.bundle.reading import parse_manifest
from p2ptrain.errors import P2PTrainError, PeerLost
from p2ptrain.runtime.reports import PlanReport
from tools.bench.peer_contender import PeerGroup, Session, open_group
from tools.bench.processes import machine
from tools.bench.ratios import Spread
from tools.bench.recovery import (
    ADAM_VECTORS,
    BERT_BASE,
    FLOAT32_BYTES,
    OVERHEAD_MAX,
    Link,
    RecoveryTurn,
    interval_of,
    link_cost,
    overheads,
    predicted_interval,
)
from tools.bench.workload import ROOT, ModelShape, Texts, Workload, exported_bundle, write_texts

GIGABIT = 125e6
"""Bytes per second of 1 Gbit/s."""
POLL_S = 2.0
INTERVALS = 2
"""Counted in each turn; one more warms up."""
_COUNT = click.IntRange(min=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to measure, and where."""

    workload: Workload
    every: int
    rounds: int
    bundle: Path
    python: str
    folder: Path


@dataclass(slots=True)
class Measured:
    """Turns of both sides, one per round, and the plans of the last ones."""

    with_: list[RecoveryTurn]
    without: list[RecoveryTurn]
    plan: PlanReport | None = None


@click.command()
@click.option("--rounds", type=_COUNT, default=3, show_default=True, help="Turns of each side.")
@click.option("--every", type=_COUNT, default=10, show_default=True, help="Steps between sets.")
@click.option("--microbatches", type=_COUNT, default=8, show_default=True, help="Of 4 samples.")
@click.option(
    "--torch-python",
    default=str(ROOT / ".venv-export" / "bin" / "python"),
    help="Interpreter with torch and the exporter. [default: .venv-export of the checkout]",
)
@click.option(
    "--peer-python",
    default=str(ROOT / ".venv" / "bin" / "python"),
    help="Interpreter of the peers. [default: .venv of the checkout]",
)
@click.option("--bundle", type=click.Path(path_type=Path), help="A bundle, instead of exporting.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    rounds: int,
    every: int,
    microbatches: int,
    torch_python: str,
    peer_python: str,
    bundle: Path | None,
    as_json: bool,
) -> None:
    """Two peers over TLS on loopback train a GPT of 13.8 million parameters with and without
    logging and replica sets, taking turns.

    Each turn counts two whole intervals between sets. Wall time and the peers' processor time are
    compared; on a machine that also does something else only the latter means anything. What a
    set's transfer adds on a link of 1 Gbit/s is computed from its bytes, and the cost with the
    planner's interval for the measured step from the one that was measured with `--every`.
    """
    hardware = machine()
    workload = Workload(microbatches=microbatches, warm_up=every, steps=INTERVALS * every)
    try:
        found = bundle or exported_bundle(ROOT / "build" / "bench", ModelShape(), torch_python)
        with tempfile.TemporaryDirectory(prefix="p2ptrain-bench-") as folder:
            settings = Settings(
                workload=workload,
                every=every,
                rounds=rounds,
                bundle=found.absolute(),
                python=peer_python,
                folder=Path(folder),
            )
            measured = trio.run(_measure, settings, _note)
    except P2PTrainError as error:
        _note(error.message)
        _note(f"hint: {error.hint}")
        raise SystemExit(error.exit_code) from error
    manifest = parse_manifest((found / "manifest.json").read_bytes())
    report = _report(settings, measured, manifest, hardware)
    click.echo(json.dumps(report, indent=1) if as_json else _text(report))


async def _measure(settings: Settings, note: Callable[[str], None]) -> Measured:
    """Both groups live throughout; one trains at a time, and who begins changes every round."""
    measured = Measured([], [])
    texts = write_texts(settings.folder)
    async with (
        open_group(2, folder=settings.folder / "with", python=settings.python, threads=1) as whole,
        open_group(
            2,
            folder=settings.folder / "without",
            python=settings.python,
            threads=1,
            module="tools.bench.bare_peer",
        ) as bare,
    ):
        sides = [(whole, measured.with_), (bare, measured.without)]
        for index in range(settings.rounds):
            for group, turns in sides if index % 2 == 0 else reversed(sides):
                session, sets = await _turn(settings, group, texts)
                turns.append(_figures(settings, session, sets))
                measured.plan = session.plan
                note(f"round {index + 1}: {turns[-1]}")
        if any(turn.sets < INTERVALS for turn in measured.with_):
            raise PeerLost("a turn saw fewer than two whole replica sets; nothing was measured")
    return measured


async def _turn(settings: Settings, group: PeerGroup, texts: Texts) -> tuple[Session, int]:
    """Train once, and watch which replica sets become whole."""
    seen: set[int] = set()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_watch, group, seen)
        session = await group.train(
            settings.workload,
            settings.workload.microbatches,
            settings.bundle,
            texts,
            replicate_every=settings.every,
        )
        nursery.cancel_scope.cancel()
    return session, len(seen)


async def _watch(group: PeerGroup, seen: set[int]) -> None:
    while True:
        await trio.sleep(POLL_S)
        status = await group.status()
        run = None if status is None else status.run_status
        if run is not None and run.replica_step:
            seen.add(run.replica_step)


def _figures(settings: Settings, session: Session, sets: int) -> RecoveryTurn:
    warm_up = settings.workload.warm_up
    cpu = session.cpu_s
    return RecoveryTurn(
        wall_s=sum(session.turn.seconds[warm_up:]),
        cpu_s=cpu[-1] - cpu[warm_up - 1] if cpu else 0.0,
        steps=settings.workload.steps,
        sets=sets,
    )


def _report(
    settings: Settings, measured: Measured, manifest: Manifest, hardware: dict[str, object]
) -> dict[str, object]:
    wall = overheads(_each(measured.with_, "wall_s"), _each(measured.without, "wall_s"))
    cpu = overheads(_each(measured.with_, "cpu_s"), _each(measured.without, "cpu_s"))
    step_s = statistics.median(turn.wall_s / turn.steps for turn in measured.without)
    link = _link(settings, measured, manifest)
    cost = link_cost(link, step_s=step_s, interval=settings.every)
    planned = interval_of(
        parameters=link.set_bytes // (FLOAT32_BYTES * ADAM_VECTORS),
        log_bytes=link.step_bytes,
        step_s=step_s,
        bytes_per_s=GIGABIT,
    )
    less_often = settings.every / planned.steps
    interval = predicted_interval(BERT_BASE, bytes_per_s=GIGABIT / 10)
    return {
        "machine": hardware,
        "every": settings.every,
        "rounds": settings.rounds,
        "step_s": step_s,
        "wall_overhead": asdict(wall),
        "cpu_overhead": asdict(cpu),
        "link": asdict(link),
        "link_cost": asdict(cost),
        "planned": asdict(planned),
        "wall_overhead_planned": wall.median * less_often + cost.delay_share_max * less_often,
        "cpu_overhead_planned": cpu.median * less_often + cost.delay_share_max * less_often,
        "overhead_max": OVERHEAD_MAX,
        "bert_base_100_mbit": {**asdict(BERT_BASE), **asdict(interval)},
        "turns": {
            "with": [asdict(turn) for turn in measured.with_],
            "without": [asdict(turn) for turn in measured.without],
        },
    }


def _each(turns: list[RecoveryTurn], name: str) -> list[float]:
    return [float(getattr(turn, name)) for turn in turns]


def _link(settings: Settings, measured: Measured, manifest: Manifest) -> Link:
    if measured.plan is None:
        raise PeerLost("no turn told its plan")
    stages, work = measured.plan.stages, settings.workload
    boundary = stages[0].last_segment
    tensor = manifest.boundary_bytes(boundary, batch=work.microbatch_size)
    return Link(
        bytes_per_s=GIGABIT,
        set_bytes=FLOAT32_BYTES * ADAM_VECTORS * max(stage.parameters for stage in stages),
        step_bytes=tensor * work.microbatches,
        step_tensors=len(manifest.boundary(boundary)) * work.microbatches,
    )


def _text(report: dict[str, object]) -> str:
    return "\n".join(f"{name}: {_shown(value)}" for name, value in report.items())


def _shown(value: object) -> str:
    if isinstance(value, dict) and set(value) == set(Spread.__dataclass_fields__):
        shares = [f"{100 * value[name]:.1f} %" for name in ("median", "least", "greatest")]
        return f"{shares[0]} ({shares[1]} to {shares[2]})"
    return json.dumps(value)


def _note(text: str) -> None:
    click.echo(f"p2ptrain: {text}", err=True)


if __name__ == "__main__":
    main()
