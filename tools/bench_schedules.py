"""Time the schedules of pipelines on slow links, in turns on the same stages, beside what was
predicted.

    python tools/bench_schedules.py --cores 0.5 0.5 --rate-mbit 100 --delay-ms 3
    python tools/bench_schedules.py --cores 0.4 0.4 0.4 --rounds 5 --json

Real peers (`p2ptrain join`) in namespaces of their own, below CPU quotas, on emulated links; root
on Linux is needed. A first run lets links be measured and the planner cut the model; then every
schedule trains on those stages in every round. Bits are compared. 2: bits differ or a run failed;
3: not possible here, with the reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from p2ptrain.errors import InvariantBroken
from p2ptrain.runtime.reports import PlanReport
from p2ptrain.schedule.actions import SCHEDULES
from tools.bench.processes import machine
from tools.bench.workload import write_texts
from tools.prediction_check import WARM_UP_STEPS, Case, request
from tools.study.cells import stage_text
from tools.throttle.cgroups import Limits
from tools.throttle.ending import told
from tools.throttle.group import Place, require_permitted, throttled_group
from tools.throttle.session import train_once
from tools.wifi_emulator.medium import Air

TIMEOUT_S: Final = 500.0


@dataclass(slots=True, kw_only=True)
class Turns:
    """One schedule's runs."""

    schedule: str
    predicted_s: list[float] = field(default_factory=list)
    measured_s: list[float] = field(default_factory=list)
    """Of a step, the median of each run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one schedule took, over all rounds; seconds of a step."""

    schedule: str
    predicted_s: float
    measured_s: float
    ratio: float
    """The first schedule's time over this one's, round by round: the median."""
    ratio_least: float
    ratio_greatest: float


def main() -> None:
    """Measure and print."""
    options = parser().parse_args()
    hardware = machine()
    with told("bench_schedules"):
        require_permitted()
        rows, stages = trio.run(functools.partial(measure, options))
    if options.json:
        found = {"version": 1, "machine": hardware, "stages": stages}
        print(json.dumps({**found, "rows": [dataclasses.asdict(row) for row in rows]}, indent=1))
    else:
        print(markdown(rows, stages))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="bench_schedules", description="schedules on slow links")
    made.add_argument("--cores", type=float, nargs="+", default=[0.5, 0.5], help="of each peer")
    made.add_argument("--rate-mbit", type=float, default=100.0, help="of each link [100]")
    made.add_argument("--delay-ms", type=float, default=3.0, help="of each link [3]")
    made.add_argument("--schedule", action="append", choices=SCHEDULES, help="only these")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--steps", type=int, default=6, help="of each run, at least 3 [6]")
    made.add_argument("--json", action="store_true", help="print one JSON object")
    return made


async def measure(options: argparse.Namespace) -> tuple[list[Row], list[int]]:
    """Let every schedule take a turn in every round; its rows, and the segments of each stage.

    Raises:
        P2PTrainError: as the peers report it; InvariantBroken where bits differ.
        trio.TooSlowError: a run was not over in time.
    """
    air = Air(rate_mbit=options.rate_mbit, delay_ms=options.delay_ms, shared=False)
    case = Case(name="schedules", cores=tuple(options.cores), network=air)
    turns = [Turns(schedule=name) for name in options.schedule or SCHEDULES]
    places = [Place(limits=Limits(cores=share)) for share in case.cores]
    digests = set()
    with tempfile.TemporaryDirectory(prefix="p2ptrain-") as folder:
        asked = request(case, write_texts(Path(folder)).train, options.steps)
        async with throttled_group(Path(folder), places, air) as group:
            train = functools.partial(train_once, group, timeout_s=TIMEOUT_S)
            first = await train(dataclasses.replace(asked, steps=WARM_UP_STEPS))
            cut = dataclasses.replace(asked, stages=None, plan=plan_of(first.plan))
            for number in range(options.rounds):
                for turn in (*turns[number % len(turns) :], *turns[: number % len(turns)]):
                    session = await train(dataclasses.replace(cut, schedule=turn.schedule))
                    digests.add(session.result.state_digest)
                    turn.predicted_s.append(session.plan.predicted_step_s)
                    turn.measured_s.append(session.step_s)
                    said = f"round {number + 1}: {turn.schedule}: {session.step_s:.3f} s per step"
                    print(f"bench_schedules: {said}", file=sys.stderr)
    if len(digests) != 1:
        raise InvariantBroken(f"{len(digests)} states after the same steps")
    return rows_of(turns), [len(stage.segments) for stage in first.plan.stages]


def plan_of(plan: PlanReport) -> str:
    """The plan file with the same devices and cuts."""
    return "\n".join(stage_text([s.name], len(s.segments), s.split) for s in plan.stages)


def rows_of(turns: Sequence[Turns]) -> list[Row]:
    """The medians; ratios are against the first of these schedules in the same round."""
    made = []
    for turn in turns:
        pairs = zip(turns[0].measured_s, turn.measured_s, strict=True)
        ratios = [first / own for first, own in pairs]
        made.append(
            Row(
                schedule=turn.schedule,
                predicted_s=statistics.median(turn.predicted_s),
                measured_s=statistics.median(turn.measured_s),
                ratio=statistics.median(ratios),
                ratio_least=min(ratios),
                ratio_greatest=max(ratios),
            )
        )
    return made


def markdown(rows: Sequence[Row], stages: Sequence[int]) -> str:
    """A table for people."""
    lines = [
        f"| schedule, {' + '.join(map(str, stages))} segments | predicted step | measured | "
        f"{rows[0].schedule} / this (least to greatest) |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        ratio = f"{row.ratio:.3f} ({row.ratio_least:.3f} to {row.ratio_greatest:.3f})"
        cells = [row.schedule, f"{row.predicted_s:.3f} s", f"{row.measured_s:.3f} s", ratio]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
