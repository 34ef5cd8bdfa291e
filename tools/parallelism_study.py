"""Train one small and one large Transformer in every kind of parallelism, with real peers.

    python tools/parallelism_study.py --minutes 9       as many cells as fit; again for the rest
    python tools/parallelism_study.py --short           one column: two peers, 1 Gbit/s
    python tools/parallelism_study.py --report          only write tables and plots again

Rows: one device, pipeline, data, hybrid, tensor and sequence parallelism; 2, 3 and 4 peers; cables
of 1 Gbit/s and 100 Mbit/s, and an emulated Wi-Fi with loss. Every peer has a CPU quota and a memory
limit (tools/throttle; root on Linux is needed). Results are kept in tools/study after every cell,
so a study can be run in parts; cells of kinds that this version cannot run are looked at again by
one that can. The large model is exported, which needs torch (--torch-python). Exit codes: 0; 1 a
cell failed; 2 the command line makes no sense; 3 not possible here, with the reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import itertools
import json
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Final

import trio

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from p2ptrain.bundle.reading import parse_manifest
from p2ptrain.errors import ConfigError, P2PTrainError, PlanInfeasible
from p2ptrain.planner.kinds import KINDS
from p2ptrain.runtime.reports import TrainRequest
from p2ptrain.training.contract import OptimizerChoice
from p2ptrain.wire.codec import from_plain
from tools.bench.processes import machine
from tools.bench.workload import ROOT, exported_bundle
from tools.prediction_check import NO_CHECKPOINT, plan_words
from tools.study.cells import (
    LINKS,
    MICROBATCHES,
    MODELS,
    PEERS,
    SHORT,
    Cell,
    Model,
    cells,
    place,
    plan_text,
    runs,
)
from tools.study.figures import POWER_DEVICE, Figures, Watts, ran
from tools.study.report import as_csv, as_svg, page
from tools.throttle.group import ThrottledGroup, require_permitted, throttled_group
from tools.throttle.session import train_once
from tools.wifi_emulator.namespaces import Unavailable

FAILED, WRONG, UNAVAILABLE = 1, 2, 3
TIMEOUT_S: Final = 600.0
FOLDER: Final = ROOT / "tools" / "study"
PLOTS: Final = {"seconds_per_sample": "seconds", "joules_per_sample": "joules (modelled)"}
Say = Callable[[str], None]


@dataclass(slots=True)
class Study:
    """Results so far, and where they are kept."""

    folder: Path
    command: str
    models: tuple[Model, ...] = MODELS
    found: dict[str, Figures] = field(default_factory=dict)
    hardware: dict[str, object] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path, command: str, models: tuple[Model, ...] = MODELS) -> Study:
        """What an earlier part has left in a folder; an empty study where there is none."""
        study, path = cls(folder, command, models), folder / "results.json"
        if path.exists():
            kept: dict[str, Any] = json.loads(path.read_text())  # Any: JSON values
            study.hardware = kept["machine"]
            study.found = {each["key"]: from_plain(Figures, each) for each in kept["cells"]}
        return study

    def keep(self, figures: Figures) -> None:
        """Take one cell, and write everything."""
        self.found[figures.key] = figures
        self.write()

    def write(self) -> None:
        """Results, table and plots."""
        self.folder.mkdir(parents=True, exist_ok=True)
        whole = cells(self.models)
        ordered = [dataclasses.asdict(f) for _, f in sorted(self.found.items())]
        kept = {"version": 1, "machine": self.hardware, "cells": ordered}
        self._put("results.json", json.dumps(kept, indent=1) + "\n")
        self._put("results.csv", as_csv(whole, self.found))
        self._put("RESULTS.md", page(whole, self.found, self.hardware, self.command))
        for model, (name, words) in itertools.product(self.models, PLOTS.items()):
            title = f"{model.name}: {words} of a sample, by link and peers"
            plot = as_svg(model, whole, self.found, name=name, title=title)
            self._put(f"{model.name}-{name.partition('_')[0]}.svg", plot)

    def _put(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for; the exit code."""
    options = parser().parse_args(arguments)
    folder = options.out or (ROOT / "build" / "study" if options.short else FOLDER)
    models = SHORT if options.short else MODELS
    command = f"python tools/parallelism_study.py {'--short' if options.short else '--minutes 9'}"
    study = Study.load(folder, command, models)
    if options.report:
        study.write()
        return 0
    todo = [cell for cell in chosen(options, models) if is_due(cell, study, again=options.again)]
    try:
        require_permitted()
        study.hardware = study.hardware or machine()
        bundles = {cell.model.name: bundle_of(cell, options.torch_python) for cell in todo}
        ends_at_s = time.monotonic() + 60 * options.minutes
        trio.run(functools.partial(run_all, todo, study, bundles, ends_at_s))
    except Unavailable as error:
        print(f"parallelism_study: not possible here: {error}", file=sys.stderr)
        return UNAVAILABLE
    except ConfigError as error:
        print(f"parallelism_study: {error.message}; {error.hint}", file=sys.stderr)
        return WRONG
    failed = [each for each in study.found.values() if each.outcome == "failed"]
    for each in failed:
        say(f"{each.key} failed: {each.why}")
    return FAILED if failed else 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="parallelism_study", description="every parallelism, run")
    made.add_argument("--minutes", type=float, default=9.0, help="begin no cell after that [9]")
    made.add_argument("--short", action="store_true", help="small model, two peers, 1 Gbit/s")
    made.add_argument("--report", action="store_true", help="write tables and plots again")
    made.add_argument("--again", action="store_true", help="also what is there already")
    made.add_argument("--kind", action="append", choices=KINDS)
    made.add_argument("--model", action="append", choices=[model.name for model in MODELS])
    made.add_argument("--link", action="append", choices=[link.name for link in LINKS])
    made.add_argument("--peers", action="append", type=int, choices=PEERS)
    made.add_argument("--out", type=Path, help="where results are kept [tools/study]")
    made.add_argument(
        "--torch-python",
        default=str(ROOT / ".venv-export" / "bin" / "python"),
        help="interpreter with torch and the exporter [.venv-export of the checkout]",
    )
    return made


def chosen(options: argparse.Namespace, models: tuple[Model, ...]) -> list[Cell]:
    """The cells that the options name; one device belongs to every choice of links and peers."""
    names, links, peers = options.model, options.link, options.peers
    if options.short:
        links, peers = [LINKS[0].name], [PEERS[0]]
    return [
        cell
        for cell in cells(models)
        if (not names or cell.model.name in names)
        and (not options.kind or cell.kind in options.kind)
        and (cell.peers == 1 or not links or cell.link.name in links)
        and (cell.peers == 1 or not peers or cell.peers in peers)
    ]


def is_due(cell: Cell, study: Study, *, again: bool) -> bool:
    """Whether a cell is still to be looked at."""
    known = study.found.get(cell.key)
    if known is None or again or known.outcome == "failed":
        return True
    return known.outcome == "not run in this version" and runs(cell.kind)


def bundle_of(cell: Cell, torch_python: str) -> Path:
    """The model's bundle, exported where it is not shipped; ConfigError when that fails."""
    if cell.model.shape is None:
        return ROOT / "onnx_models" / cell.model.name
    return exported_bundle(ROOT / "build" / "bench", cell.model.shape, torch_python)


async def run_all(
    todo: Sequence[Cell], study: Study, bundles: dict[str, Path], ends_at_s: float
) -> None:
    """One group of peers after the other, until the time is over."""
    for cell in [cell for cell in todo if not runs(cell.kind)]:
        study.keep(Figures(key=cell.key, outcome="not run in this version", date=today()))
    able = [cell for cell in todo if runs(cell.kind)]
    for _, group in itertools.groupby(able, key=lambda c: (c.model, c.link, c.peers)):
        waiting = list(group)
        while waiting and time.monotonic() < ends_at_s:
            await run_group(waiting, study, bundles[waiting[0].model.name], ends_at_s)


async def run_group(waiting: list[Cell], study: Study, bundle: Path, ends_at_s: float) -> None:
    """Run cells on one group of peers and take them off the list; a failure ends the group."""
    first = waiting[0]
    with tempfile.TemporaryDirectory(prefix="p2ptrain-") as folder:
        text = Path(folder) / "english.txt"
        text.write_text("\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
        places = [place(first.model)] * first.peers
        async with throttled_group(Path(folder), places, first.link.network) as group:
            while waiting and time.monotonic() < ends_at_s:
                cell = waiting.pop(0)
                figures = await run_cell(cell, group, bundle, text)
                study.keep(dataclasses.replace(figures, date=today()))
                say(f"{cell.key}: {figures.outcome}, {figures.seconds_per_sample or 0:.3f} s")
                if figures.outcome == "failed" or any(g.out_of_memory for g in group.groups):
                    return


async def run_cell(cell: Cell, group: ThrottledGroup, bundle: Path, text: Path) -> Figures:
    """Train a few steps; what they came to, or why not."""
    try:
        session = await train_once(group, request(cell, group, bundle, text), timeout_s=TIMEOUT_S)
    except PlanInfeasible as error:
        return Figures(key=cell.key, outcome="does not fit", why=error.message)
    except (P2PTrainError, trio.TooSlowError) as error:
        if any(each.out_of_memory for each in group.groups):
            return Figures(key=cell.key, outcome="does not fit", why="ended at the memory limit")
        why = error.message if isinstance(error, P2PTrainError) else "not over in time"
        return Figures(key=cell.key, outcome="failed", why=why)
    figures = ran(
        cell,
        session.result,
        step_s=session.step_s,
        peak_bytes=max(session.peak_bytes),
        watts=watts_of(POWER_DEVICE),
    )
    plan = session.plan
    return dataclasses.replace(
        figures, plan=plan_words(plan), predicted_step_s=plan.predicted_step_s
    )


def request(cell: Cell, group: ThrottledGroup, bundle: Path, text: Path) -> TrainRequest:
    """What the home peer is asked."""
    manifest = parse_manifest((bundle / "manifest.json").read_bytes())
    names = [peer.name for peer in group.peers]
    plan = plan_text(cell.kind, names, len(manifest.segments))
    return TrainRequest(
        bundle=str(bundle),
        data=str(text),
        steps=cell.model.steps,
        stages=cell.peers if plan is None else None,
        plan=plan,
        microbatches=MICROBATCHES,
        microbatch_size=cell.model.microbatch_size,
        threads=1,
        optimizer=OptimizerChoice(warmup_steps=0),
        heldout_microbatches=1,
        checkpoint_every=NO_CHECKPOINT,
    )


def watts_of(device: str) -> Watts:
    """What the device file says that it draws."""
    path = ROOT / "p2ptrain" / "devices" / f"{device}.toml"
    said = tomllib.loads(path.read_text(encoding="utf-8"))
    return Watts(
        idle=float(said["idle_watts"]),
        busy=float(said["busy_watts"]),
        joules_per_byte=float(said["joules_per_byte"]),
    )


def today() -> str:
    """The date of a figure."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def say(text: str) -> None:
    """Tell how it goes."""
    print(f"parallelism_study: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
