"""Write down what the planner predicts for real runs, run them, and hold one against the other.

    python tools/prediction_check.py --out build/prediction
    python tools/prediction_check.py --case slow-link --steps 20

Real peers (`p2ptrain join`) in namespaces of their own, throttled to different speeds by CPU
quotas, on links of limited bandwidth; root on Linux is needed. In each case a short run comes
first, so that links are measured from its traffic; the second run's plan, with its prediction, is
written to FOLDER/<case>.predicted.json before its first step. Measured: the median of its steps.
A case that misses exits with 1; 3: not possible here, with the reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from p2ptrain.bundle.reading import parse_manifest
from p2ptrain.planner.kinds import Kind
from p2ptrain.runtime.reports import PlanReport, StageReport, TrainRequest
from p2ptrain.training.contract import OptimizerChoice
from p2ptrain.wire.codec import to_plain
from tools.bench.processes import machine
from tools.bench.workload import ROOT, write_texts
from tools.study.cells import plan_text
from tools.throttle.cgroups import Limits
from tools.throttle.ending import told
from tools.throttle.group import Cable, Network, Place, require_permitted, throttled_group
from tools.throttle.session import Session, train_once
from tools.wifi_emulator.medium import Air

MISSED: Final = 1
TOLERANCE: Final = 0.1
WARM_UP_STEPS: Final = 3
TIMEOUT_S: Final = 500.0
NO_CHECKPOINT: Final = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One plan on one set of throttled peers."""

    name: str
    cores: tuple[float, ...]
    network: Network
    schedule: str = "1f1b"
    codec: str = "fp32"
    kind: Kind = "pipeline"

    @property
    def words(self) -> str:
        """The case in a table."""
        shares = " + ".join(f"{share:g}" for share in self.cores)
        rounded = "" if self.codec == "fp32" else f", {self.codec}"
        return f"{shares} cores, {network_words(self.network)}{rounded}"


CASES: Final = (
    Case(name="one-device", cores=(0.6,), network=Cable(rate_mbit=1000)),
    Case(name="two-uneven", cores=(0.6, 0.25), network=Cable(rate_mbit=1000)),
    Case(
        name="three-zb-h1", cores=(0.3, 0.3, 0.3), network=Cable(rate_mbit=1000), schedule="zb-h1"
    ),
    Case(
        name="slow-link",
        cores=(0.4, 0.3, 0.2),
        network=Air(rate_mbit=40, delay_ms=5, shared=False),
        codec="bf16",
    ),
    Case(name="data", cores=(0.5, 0.3), network=Cable(rate_mbit=100), kind="data"),
    Case(name="hybrid", cores=(0.3, 0.3, 0.4), network=Cable(rate_mbit=100), kind="hybrid"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One case, predicted and measured."""

    case: str
    words: str
    plan: str
    predicted_s: float
    measured_s: float
    least_s: float
    greatest_s: float
    steps: int

    @property
    def miss(self) -> float:
        """How far the prediction is from what was measured, as a share of that; signed."""
        return self.predicted_s / self.measured_s - 1.0


def main() -> int:
    """Run the cases that are asked for; the exit code."""
    options = parser().parse_args()
    chosen = [case for case in CASES if not options.case or case.name in options.case]
    hardware = machine()
    with told("prediction_check"):
        require_permitted()
        options.out.mkdir(parents=True, exist_ok=True)
        rows = trio.run(functools.partial(check, chosen, options.steps, options.out))
    made = report(rows, hardware)
    (options.out / "report.json").write_text(json.dumps(made, indent=1) + "\n")
    print(json.dumps(made, indent=1) if options.json else markdown(rows))
    return MISSED if any(abs(row.miss) > TOLERANCE for row in rows) else 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="prediction_check", description="predicted beside measured")
    made.add_argument("--case", action="append", choices=[case.name for case in CASES])
    made.add_argument("--steps", type=int, default=10, help="of each run, at least 3 [10]")
    made.add_argument("--out", type=Path, default=ROOT / "build" / "prediction", metavar="FOLDER")
    made.add_argument("--json", action="store_true", help="print one JSON object")
    return made


async def check(cases: Sequence[Case], steps: int, out: Path) -> list[Row]:
    """All cases in turn, each in a new group."""
    rows = []
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="p2ptrain-") as folder:
            rows.append(await one(case, steps, Path(folder), out))
        print(f"prediction_check: {sentence(rows[-1])}", file=sys.stderr)
    return rows


async def one(case: Case, steps: int, folder: Path, out: Path) -> Row:
    """Train twice: so that links are measured, and to be predicted."""
    text = write_texts(folder).train
    places = [Place(limits=Limits(cores=share)) for share in case.cores]
    asked = request(case, text, steps)
    async with throttled_group(folder, places, case.network) as group:
        first = dataclasses.replace(asked, steps=WARM_UP_STEPS)
        await train_once(group, first, timeout_s=TIMEOUT_S)
        keep = functools.partial(write_down, out / f"{case.name}.predicted.json", case)
        return row(case, await train_once(group, asked, timeout_s=TIMEOUT_S, planned=keep))


def request(case: Case, text: Path, steps: int) -> TrainRequest:
    """What both runs of a case are asked."""
    bundle = ROOT / "onnx_models" / "gpt-nano"
    segments = len(parse_manifest((bundle / "manifest.json").read_bytes()).segments)
    names = [f"peer-{index + 1}" for index in range(len(case.cores))]
    plan = plan_text(case.kind, names, segments)
    return TrainRequest(
        bundle=str(bundle),
        data=str(text),
        steps=steps,
        stages=len(case.cores) if plan is None else None,
        plan=plan,
        microbatches=8,
        microbatch_size=8,
        threads=1,
        schedule=case.schedule,
        codec=case.codec,
        optimizer=OptimizerChoice(warmup_steps=0),
        heldout_microbatches=1,
        checkpoint_every=NO_CHECKPOINT,
    )


def write_down(path: Path, case: Case, plan: PlanReport) -> None:
    """The prediction, before the first step."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    said = {"case": case.name, "written_at": now, "predicted_step_s": plan.predicted_step_s}
    path.write_text(json.dumps({**said, "plan": to_plain(plan)}, indent=1) + "\n")


def row(case: Case, session: Session) -> Row:
    """The figures of a run."""
    counted = session.counted_s
    return Row(
        case=case.name,
        words=case.words,
        plan=plan_words(session.plan),
        predicted_s=session.plan.predicted_step_s,
        measured_s=session.step_s,
        least_s=min(counted),
        greatest_s=max(counted),
        steps=len(counted),
    )


def plan_words(plan: PlanReport) -> str:
    """`1f1b, 6 + 4 segments`; of stages that several share, each one's part of the stage."""
    stages: dict[int, list[StageReport]] = {}
    for line in plan.stages:
        stages.setdefault(line.stage, []).append(line)
    counts = " + ".join(_stage_words(lines) for lines in stages.values())
    shape = f"{counts} segments"
    return shape if len(stages) == 1 else f"{plan.schedule}, {shape}"


def _stage_words(lines: Sequence[StageReport]) -> str:
    count = str(len(lines[0].segments))
    if len(lines) == 1:
        return count
    parts = " to ".join(f"{100 * line.part:.0f}" for line in lines)
    return f"{count} ({lines[0].split}, {parts} %)"


def network_words(network: Network) -> str:
    """`cables of 100 Mbit/s`, or what the emulator was told."""
    if isinstance(network, Cable):
        return f"cables of {network.rate_mbit:g} Mbit/s"
    medium = "one medium" if network.shared else "links"
    loss = f", {network.loss_percent:g} % loss" if network.loss_percent else ""
    return f"emulated {medium} of {network.rate_mbit:g} Mbit/s, {network.delay_ms:g} ms{loss}"


def sentence(row: Row) -> str:
    """One case as it is told on the way."""
    return (
        f"{row.case}: predicted {row.predicted_s:.3f} s, measured {row.measured_s:.3f} s "
        f"({row.miss:+.1%})"
    )


def report(rows: Sequence[Row], hardware: dict[str, object]) -> dict[str, object]:
    """Everything, for programs."""
    found = [{**dataclasses.asdict(row), "miss": row.miss} for row in rows]
    worst = max((abs(row.miss) for row in rows), default=0.0)
    return {
        "version": 1,
        "machine": hardware,
        "tolerance": TOLERANCE,
        "worst": worst,
        "rows": found,
    }


def markdown(rows: Sequence[Row]) -> str:
    """A table for people."""
    lines = [
        "| peers and links | plan | predicted | measured, median (least to greatest) | off by |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        spread = f"{row.measured_s:.3f} s ({row.least_s:.3f} to {row.greatest_s:.3f})"
        cells = [row.words, row.plan, f"{row.predicted_s:.3f} s", spread, f"{row.miss:+.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    off = [abs(row.miss) for row in rows]
    within = sum(miss <= TOLERANCE for miss in off)
    median = f"median {statistics.median(off):.1%}" if off else "none"
    return "\n".join([*lines, "", f"{within} of {len(rows)} within {TOLERANCE:.0%}; {median}."])


if __name__ == "__main__":
    sys.exit(main())
