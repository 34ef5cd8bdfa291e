"""What the benchmark shows: figures, verdicts, checks; as JSON, tables and markdown."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final

from rich.console import Console
from rich.table import Table

from p2ptrain.runtime.reports import PlanReport
from tools.bench.balance import Balance, balance, median_costs
from tools.bench.ratios import (
    LOSS_TOLERANCE,
    TORCH,
    TORCH_1F1B,
    TORCH_ZERO_BUBBLE,
    Case,
    Spread,
    Verdict,
    cases,
    loss_difference,
    ours,
    spread,
    targets,
    verdicts,
)
from tools.bench.rounds import Measured, Settings

REPORT_VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One contender's figures."""

    contender: str
    step_s: Spread
    samples_per_s: float
    peaks_bytes: tuple[int | None, ...]
    """Of each process at the end of the contender's first turn."""
    last_peaks_bytes: tuple[int | None, ...]
    """The same at the end of its last turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Whether the contenders computed the same thing."""

    what: str
    is_met: bool
    figure: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All of it; `to_json` is what `--json` prints."""

    version: int
    date: str
    command: str
    machine: Mapping[str, object]
    torch: str
    runtime: str
    model: str
    rounds: int
    steps_per_turn: int
    lines: tuple[Line, ...]
    verdicts: tuple[Verdict, ...]
    checks: tuple[Check, ...]
    balances: Mapping[str, tuple[Balance, ...]]
    """By contender of ours, one per round."""
    plans: Mapping[str, tuple[tuple[str, ...], ...]]
    """By contender and round: the segments of each stage, first and last."""
    compute_share: Mapping[str, float]
    """Of our one-peer steps: profiled forward and backward time / measured step."""
    torch_trials: Mapping[str, float]
    """Seconds per step of every way to train with torch that was tried."""
    steps_s: Mapping[str, tuple[tuple[float, ...], ...]]
    """By contender and round: every step, those that warm up included."""

    def to_json(self) -> dict[str, object]:
        """JSON values, verdicts with whether they are met."""
        document = asdict(self)
        for plain, verdict in zip(document["verdicts"], self.verdicts, strict=True):
            plain["is_met"] = verdict.is_met
        return document


def make_report(
    settings: Settings, measured: Measured, *, command: str, hardware: Mapping[str, object]
) -> Report:
    """Everything that follows from what was measured."""
    dropped = settings.workload.warm_up
    steps_s = {
        name: [turn.median_s(dropped=dropped) for turn in turns]
        for name, turns in measured.turns.items()
    }
    balances = _balances(settings, measured)
    manifest = measured.manifest
    return Report(
        version=REPORT_VERSION,
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        command=command,
        machine=hardware,
        torch=measured.torch_version,
        runtime=measured.runtime,
        model=f"{manifest.name}, {manifest.parameter_count / 1e6:.1f} M parameters",
        rounds=settings.rounds,
        steps_per_turn=settings.workload.steps,
        lines=tuple(_line(settings, name, seconds, measured) for name, seconds in steps_s.items()),
        verdicts=verdicts(
            steps_s,
            targets(settings.workload.microbatches, settings.long_microbatches),
            _ceilings(settings, balances),
        ),
        checks=_checks(settings, measured),
        balances=balances,
        plans={
            name: tuple(_stage_names(plan) for plan in plans)
            for name, plans in measured.plans.items()
        },
        compute_share={
            name: _compute_ns(balances[name][0]) * count / 1e9 / statistics.median(steps_s[name])
            for count in _counts(settings)
            if (name := ours(1, count)) in balances
        },
        torch_trials=measured.trials,
        steps_s={
            name: tuple(turn.seconds for turn in turns) for name, turns in measured.turns.items()
        },
    )


def _cases(settings: Settings) -> tuple[Case, ...]:
    return cases(settings.workload.microbatches, settings.long_microbatches)


def _counts(settings: Settings) -> tuple[int, ...]:
    return tuple(dict.fromkeys(case.microbatches for case in _cases(settings)))


def _line(settings: Settings, name: str, seconds: list[float], measured: Measured) -> Line:
    microbatches = settings.workload.microbatches
    for case in _cases(settings):
        if name == str(case):
            microbatches = case.microbatches
    step_s = spread(seconds)
    return Line(
        contender=name,
        step_s=step_s,
        samples_per_s=microbatches * settings.workload.microbatch_size / step_s.median,
        peaks_bytes=measured.peaks_bytes[name][0],
        last_peaks_bytes=measured.peaks_bytes[name][-1],
    )


def _stage_names(plan: PlanReport) -> tuple[str, ...]:
    return tuple(f"{stage.segments[0]} - {stage.segments[-1]}" for stage in plan.stages)


def _balances(settings: Settings, measured: Measured) -> dict[str, tuple[Balance, ...]]:
    kinds = [segment.kind for segment in measured.manifest.segments]
    costs = median_costs(measured.costs)
    return {
        str(case): tuple(
            balance(
                costs,
                kinds,
                [range(stage.first_segment, stage.last_segment + 1) for stage in plan.stages],
                schedule=plan.schedule,
                microbatches=case.microbatches,
            )
            for plan in measured.plans[str(case)]
        )
        for case in _cases(settings)
    }


def _compute_ns(own: Balance) -> int:
    return sum(own.forward_ns) + sum(own.backward_ns)


def _ceilings(
    settings: Settings, balances: Mapping[str, tuple[Balance, ...]]
) -> dict[tuple[str, str], list[float]]:
    return {
        (str(case), ours(1, case.microbatches)): [own.ceiling for own in balances[str(case)]]
        for case in _cases(settings)
        if case.peers > 1
    }


def _checks(settings: Settings, measured: Measured) -> tuple[Check, ...]:
    """The same losses as torch within tolerance, the same bits on one peer and on two."""
    found = []
    short = ours(1, settings.workload.microbatches)
    for other in (TORCH, TORCH_1F1B, TORCH_ZERO_BUBBLE):
        difference = loss_difference(measured.turns[short], measured.turns[other])
        found.append(
            Check(
                what=f"losses of {short} and {other} within {LOSS_TOLERANCE:g}",
                is_met=difference <= LOSS_TOLERANCE,
                figure=f"{difference:.1e}",
            )
        )
    for count in _counts(settings):
        names = [str(case) for case in _cases(settings) if case.microbatches == count]
        turns = [turn for name in names for turn in measured.turns[name]]
        digests = {digest for name in names for digest in measured.digests[name]}
        found.append(
            Check(
                what=f"the same bits on one peer and two, {count} microbatches",
                is_met=len({turn.losses for turn in turns}) == 1 and len(digests) == 1,
                figure=f"{len(digests)} state digest{'' if len(digests) == 1 else 's'}",
            )
        )
    return tuple(found)


def print_report(console: Console, report: Report) -> None:
    """Tables for a person."""
    table = Table("contender", "s per step", "least..greatest", "samples/s", "peak MiB", "at end")
    for line in report.lines:
        table.add_row(*_cells(line))
    console.print(table)
    table = Table("figure", "reached", "least..greatest", "target", "")
    for verdict in report.verdicts:
        table.add_row(*_verdict_cells(verdict))
    for check in report.checks:
        table.add_row(check.what, check.figure, "", "", "ok" if check.is_met else "FAILED")
    console.print(table)
    for sentence in _sentences(report):
        console.print(sentence)


def markdown(report: Report) -> str:
    """An entry for tools/BENCHMARKS.md."""
    rows = ["| contender | s per step | least..greatest | samples/s | peak MiB | at end |"]
    rows += ["| --- | --- | --- | --- | --- | --- |"]
    rows += [f"| {' | '.join(_cells(line))} |" for line in report.lines]
    rows += ["", "| figure | reached | least..greatest | target | |"]
    rows += ["| --- | --- | --- | --- | --- |"]
    rows += [f"| {' | '.join(_verdict_cells(verdict))} |" for verdict in report.verdicts]
    rows += [
        f"| {check.what} | {check.figure} | | | {'ok' if check.is_met else 'FAILED'} |"
        for check in report.checks
    ]
    head = [f"## Pipeline, {report.date}", "", f"    {report.command}", ""]
    return "\n".join([*head, *_sentences(report), "", *rows, ""])


def _sentences(report: Report) -> list[str]:
    found = [
        ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in report.machine.items()),
        f"{report.model}; torch {report.torch}; {report.runtime}; "
        f"{report.rounds} rounds of {report.steps_per_turn} counted steps",
    ]
    found += [
        f"{name}: forward and backward as profiled are {share:.3f} of the step"
        for name, share in report.compute_share.items()
    ]
    for name, plans in report.plans.items():
        for stages in dict.fromkeys(plans):
            times = _stage_times(stages, report.balances[name][plans.index(stages)])
            rounds = f"in {plans.count(stages)} of {len(plans)} rounds"
            found.append(f"{name}, {rounds}: {times}")
    found += [f"torch tried {name}: {value:.3f} s" for name, value in report.torch_trials.items()]
    return found


def _stage_times(stages: tuple[str, ...], own: Balance) -> str:
    times = zip(stages, own.forward_ns, own.backward_ns, own.parts, strict=True)
    return ", ".join(
        f"{segments}: {forward / 1e6:.1f} + {backward / 1e6:.1f} ms "
        f"(in parts {parts.cotangents_ns / 1e6:.1f} + {parts.gradients_ns / 1e6:.1f})"
        for segments, forward, backward, parts in times
    )


def _cells(line: Line) -> tuple[str, ...]:
    return (
        line.contender,
        f"{line.step_s.median:.3f}",
        f"{line.step_s.least:.3f}..{line.step_s.greatest:.3f}",
        f"{line.samples_per_s:.1f}",
        _mebibytes(line.peaks_bytes),
        _mebibytes(line.last_peaks_bytes),
    )


def _mebibytes(peaks: tuple[int | None, ...]) -> str:
    return " + ".join("?" if peak is None else f"{peak / 2**20:.0f}" for peak in peaks)


def _verdict_cells(verdict: Verdict) -> tuple[str, ...]:
    return (
        verdict.what,
        f"{verdict.reached.median:.3f}",
        f"{verdict.reached.least:.3f}..{verdict.reached.greatest:.3f}",
        f"{verdict.least:g}",
        "met" if verdict.is_met else "MISSED",
    )
