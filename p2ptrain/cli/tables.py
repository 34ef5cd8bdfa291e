"""Reports as tables and lines for people; `--json` prints the same objects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

from rich.table import Table
from rich.text import Text

from p2ptrain.bundle.report import BundleReport
from p2ptrain.ids import short
from p2ptrain.runtime.reports import (
    EnergyReport,
    MemberReport,
    OwnerReport,
    PeerEnergy,
    PeerStatus,
    PlanReport,
    PredictionReport,
    RunStatusReport,
    StageReport,
    StepReport,
    TrainResult,
)
from p2ptrain.store.verify_bundle import Verification
from p2ptrain.units import format_bytes, format_count, format_joules, format_seconds, format_span

PHASES = ("compute", "communicate", "wait", "idle")
_LISTENED_TO: Final = ("alive", "suspect")
"""States of a member of which it matters when it was heard last."""
TRAFFIC_ROWS: Final = 5
"""The kinds of traffic that a person sees; `--json` has all, by link."""


def plan_table(plan: PlanReport) -> Table:
    """One row per stage: who runs what, and what it is expected to cost there."""
    table = new_table(f"plan {short(plan.plan)} of run {short(plan.run)}, view {plan.view}")
    for heading in ("peer", "stage", "segments"):
        table.add_column(heading)
    for heading in ("parameters", "memory", "share of the step"):
        table.add_column(heading, justify="right")
    for stage in plan.stages:
        add_row(
            table,
            stage.name,
            _stage(stage),
            _segments(stage),
            format_count(stage.parameters),
            format_bytes(stage.memory_bytes),
            f"{stage.share:.0%}",
        )
    return table


def plan_lines(plan: PlanReport) -> list[str]:
    """What is said below the table: the reason, what to expect, how exact the result is."""
    reason = plan.reasons[0] if plan.reasons else "the only placement that was possible"
    expected = format_seconds(plan.predicted_step_s)
    if plan.predicted_step_joules is not None:
        expected += f" and {format_joules(plan.predicted_step_joules)}"
    return [
        f"why: {reason}",
        f"schedule {plan.schedule}, {expected} per step expected; {plan.exactness}",
        *_owner_lines(plan.owners),
    ]


def _owner_lines(owners: tuple[OwnerReport, ...]) -> list[str]:
    """Whose data it is, one line each; nothing where one device feeds all."""
    whole = sum(owner.microbatches for owner in owners)
    return [
        f"data of {owner.name}: {owner.records:,} {owner.unit}, "
        f"{owner.microbatches} of {whole} microbatches"
        for owner in owners
    ]


def _stage(stage: StageReport) -> str:
    """`0`, or what of it a device has where several share it: `0, 75% by replicas`."""
    if stage.split == "none":
        return str(stage.stage)
    return f"{stage.stage}, {stage.part:.0%} by {stage.split}"


def _segments(stage: StageReport) -> str:
    return _span(stage.segments)


def _span(segments: tuple[str, ...]) -> str:
    if not segments:
        return "-"
    first, last = segments[0], segments[-1]
    return first if first == last else f"{first} .. {last} ({len(segments)})"


def step_line(step: StepReport) -> str:
    """Progress in one line: `step 20/400  loss 3.1234  51.2 samples/s  0.312 J/sample`."""
    joules = "-" if step.joules_per_sample is None else format_joules(step.joules_per_sample)
    return (
        f"step {step.step}/{step.steps}  loss {step.loss:.4f}  "
        f"{step.samples_per_s:.1f} samples/s  {joules}/sample"
    )


def activity_lines(step: StepReport) -> list[str]:
    """What each peer does, one line each."""
    width = max(map(len, step.activities), default=0)
    return [f"{name:<{width}}  {activity}" for name, activity in step.activities.items()]


def result_table(result: TrainResult) -> Table:
    """The end of a run: losses, speed, bytes."""
    table = new_table(f"run {short(result.run)}: {result.stages} stages on {result.peers} peers")
    table.add_column("result")
    table.add_column("", justify="right")
    for name, value in _result_rows(result):
        add_row(table, name, value)
    return table


def _result_rows(result: TrainResult) -> Iterable[tuple[str, str]]:
    done = result.first_step + len(result.losses)
    yield "steps", f"{done} of {result.first_step + result.steps}" if result.stopped else str(done)
    if result.losses:
        yield "loss, first and last step", f"{result.losses[0]:.4f} -> {result.losses[-1]:.4f}"
    yield "held-out loss, nats", f"{result.heldout_first:.4f} -> {result.heldout_last:.4f}"
    yield "time", format_seconds(result.seconds)
    yield "samples/s", f"{result.samples_per_s:.1f}"
    yield "tokens/s", f"{result.tokens_per_s:.0f}"
    if result.prediction is not None:
        yield from _prediction_rows(result.prediction)
    yield "sent encrypted", format_bytes(result.bytes_sent)
    kinds: Counter[str] = Counter()
    for each in result.traffic:
        kinds[each.kind] += each.bytes_sent
    for kind, count in kinds.most_common(TRAFFIC_ROWS):
        yield f"  {kind}", format_bytes(count)
    if result.energy.joules_per_sample is not None:
        yield "energy per sample", format_joules(result.energy.joules_per_sample)
    if result.model_path is not None:
        yield "model", result.model_path


def _prediction_rows(prediction: PredictionReport) -> Iterable[tuple[str, str]]:
    """Predicted beside measured, where something was measured."""
    if prediction.measured_step_s is not None:
        predicted, measured = prediction.predicted_step_s, prediction.measured_step_s
        yield (
            "a step, predicted and measured",
            _beside(format_seconds(predicted), format_seconds(measured), predicted, measured),
        )
    joules, spent = prediction.predicted_step_joules, prediction.measured_step_joules
    if joules is not None and spent is not None:
        yield (
            "  joules of all peers",
            _beside(format_joules(joules), format_joules(spent), joules, spent),
        )
    sent = prediction.measured_boundary_bytes
    if sent is not None and prediction.predicted_boundary_bytes > 0:
        expected = prediction.predicted_boundary_bytes
        yield (
            "  between stages",
            _beside(format_bytes(expected), format_bytes(round(sent)), expected, sent),
        )


def _beside(predicted: str, measured: str, expected: float, found: float) -> str:
    """`250.0 ms, 262.1 ms (+5 %)`."""
    change = "" if expected <= 0 else f" ({100 * (found / expected - 1):+.0f} %)"
    return f"{predicted}, {measured}{change}"


def run_lines(run: RunStatusReport) -> list[str]:
    """Where a run stands: view, members, last commit, replicas, logs, and why anything waits."""
    lineage = f", lineage {run.lineage}" if run.lineage else ""
    lines = [f"run {short(run.run)}, view {run.view}{lineage}: step {run.step} of {run.steps}"]
    lines += [f"  {member}" for member in run.members]
    lines.append(f"  {run.safety}")
    if run.prediction is not None:
        lines += [f"  {name}: {value}" for name, value in _prediction_rows(run.prediction)]
    replica = "none yet" if run.replica_step is None else f"step {run.replica_step}"
    logs = f"{format_bytes(run.log_bytes)} of {format_bytes(run.log_bytes_max)}"
    lines.append(
        f"  whole replica set: {replica}, one every {run.replica_every} steps; "
        f"logs here: {run.log_steps} steps, {logs}; "
        f"replicas kept here: {format_bytes(run.replica_bytes)}"
    )
    if run.waits_for is not None:
        lines.append(f"  {run.waits_for}")
    return lines


def energy_table(report: EnergyReport) -> Table:
    """Joules per peer, split by phase; a meter that peers share is counted once in the sum."""
    table = new_table("energy, total joules by phase")
    table.add_column("peer")
    for heading in (*PHASES, "total", "above idle"):
        table.add_column(heading, justify="right")
    table.add_column("source")
    for peer in report.peers:
        add_row(
            table,
            peer.name,
            *(_phase_joules(peer, phase) for phase in PHASES),
            format_joules(peer.total_joules),
            format_joules(peer.marginal_joules),
            _source(peer),
        )
    total, marginal = format_joules(report.total_joules), format_joules(report.marginal_joules)
    table.add_section()
    add_row(table, "together", *("" for _ in PHASES), total, marginal, _shared_meters(report))
    return table


def energy_lines(report: EnergyReport) -> list[str]:
    """What a sample costs beside what its plan predicted, where both are known."""
    predicted, measured = report.predicted_joules_per_sample, report.joules_per_sample
    if predicted is None or measured is None:
        return []
    beside = _beside(format_joules(predicted), format_joules(measured), predicted, measured)
    return [f"a sample, predicted and spent: {beside}"]


def _phase_joules(peer: PeerEnergy, phase: str) -> str:
    cost = peer.phases.get(phase)
    return "-" if cost is None else format_joules(cost.total_joules)


def _source(peer: PeerEnergy) -> str:
    band = "" if peer.error_band is None else f" within {peer.error_band:.0%}"
    return f"{peer.source}; {peer.scope}, {peer.quality}{band}"


def _shared_meters(report: EnergyReport) -> str:
    meters = {peer.meter for peer in report.peers}
    if len(meters) < len(report.peers):
        count = "one meter" if len(meters) == 1 else f"{len(meters)} meters, each"
        return f"{len(report.peers)} peers on {count} counted once"
    return ""


def status_table(status: PeerStatus) -> Table:
    """One row per device of the group that this one knows."""
    table = new_table(f"group {status.group_name} ({short(status.group)})")
    for heading in ("device", "name", "state"):
        table.add_column(heading)
    table.add_column("round trip", justify="right")
    for heading in ("address", "runtime", "doing"):
        table.add_column(heading)
    for member in status.members:
        trip_s = member.round_trip_s
        add_row(
            table,
            short(member.device),
            member.name,
            _state(member),
            "" if trip_s is None else format_seconds(trip_s),
            ", ".join(member.addresses[:2]),
            member.runtime,
            member.activity,
        )
    return table


def _state(member: MemberReport) -> str:
    """`alive for 75 min, heard 1 s ago`, `dead for 20 s: nothing was heard from it`."""
    state, colon, reason = member.state.partition(": ")
    age = "" if member.state_s is None else f" for {format_span(member.state_s)}"
    heard_s = member.last_heard_s if state in _LISTENED_TO else None
    heard = "" if heard_s is None else f", heard {format_span(heard_s)} ago"
    return f"{state}{age}{colon}{reason}{heard}"


def status_lines(status: PeerStatus) -> list[str]:
    """What is said below the table of members."""
    lines = [
        f"this device is {status.name} ({short(status.device)}) at {status.address}",
        f"discovery: {status.discovery}",
    ]
    lines += [
        f"{member.name} was down before: {member.last_down}"
        for member in status.members
        if member.last_down and member.state.partition(":")[0] == "alive"
    ]
    if status.alone_because is not None:
        lines.append(f"alone, because {status.alone_because}")
    if status.run is not None:
        lines.append(f"run {short(status.run)}: {status.run_state}")
    if status.runs:
        lines.append(f"can be resumed: {', '.join(status.runs)}")
    return lines


def bundle_table(report: BundleReport) -> Table:
    """One row per kind of segment; sizes and operations of one sample."""
    table = new_table(f"bundle {report.name} ({short(report.digest)})")
    table.add_column("kind")
    table.add_column("segments")
    for heading in ("parameters", "FLOPs", "backward", "stash", "boundary"):
        table.add_column(heading, justify="right")
    table.add_column("forms")
    for kind in report.kinds:
        add_row(
            table,
            kind.name,
            _span(kind.segments),
            format_count(kind.parameters),
            format_count(kind.forward_flops),
            format_count(kind.backward_flops),
            format_bytes(kind.stash_bytes),
            format_bytes(kind.boundary_bytes),
            ", ".join(kind.forms),
        )
    return table


def bundle_lines(report: BundleReport) -> list[str]:
    """What is said below the table: what it learns from, what it holds, how it was checked."""
    counts = [f"{format_count(n)} {binding}" for binding, n in report.parameters.items() if n]
    lines = [
        report.description,
        f"task: {report.task}, {report.loss} loss",
        f"data: {report.data_kind}{_data_details(report)}; {'; '.join(report.inputs)}",
        f"parameters: {', '.join(counts)}, in {report.tensors} tensors",
        f"weights: {'in the bundle' if report.weights else 'drawn from the seed of a run'}",
        f"graphs: {report.graphs}, {format_bytes(report.graph_bytes)}",
        f"optimizers: {', '.join(report.updates)}",
        f"tied: {', '.join(report.ties)}" if report.ties else "",
        f"adapters: on {len(report.adapters)} tensors" if report.adapters else "",
        *_sharding_lines(report),
        f"digest: {report.digest}",
    ]
    if report.checks:
        name, error = max(report.checks.items(), key=lambda check: check[1])
        lines.append(f"worst of {len(report.checks)} checks against torch: {error:.1e}, {name}")
    return [line for line in lines if line]


def _sharding_lines(report: BundleReport) -> list[str]:
    """How each kind of segment can be divided among peers, by mode; kinds that say the same
    together."""
    lines = []
    for mode in sorted({mode for kind in report.kinds for mode in kind.sharding}):
        told: dict[str, list[str]] = {}
        for kind in report.kinds:
            told.setdefault(kind.sharding[mode], []).append(kind.name)
        parts = [f"{', '.join(names)} {answer}" for answer, names in told.items()]
        lines.append(f"{mode} sharding: {'; '.join(parts)}")
    return lines


def _data_details(report: BundleReport) -> str:
    details = []
    if report.tokenizer:
        details.append(f"{report.vocabulary} tokens by {report.tokenizer}")
    if report.classes:
        details.append(f"{report.classes} classes")
    return f" ({', '.join(details)})" if details else ""


def verification_table(report: Verification) -> Table:
    """One row per check."""
    table = new_table(f"{report.directory}: {'sound' if report.sound else 'not sound'}")
    for heading in ("checked", "", "found"):
        table.add_column(heading)
    for finding in report.findings:
        add_row(table, finding.subject, finding.state, finding.detail)
    return table


def printable(text: str) -> str:
    """Without characters that move a terminal's cursor: names come from other devices."""
    return "".join(c if c.isprintable() else "?" for c in text)


def add_row(table: Table, *cells: str) -> None:
    """A row of plain text; square brackets mean themselves."""
    table.add_row(*(Text(printable(cell)) for cell in cells))


def new_table(title: str) -> Table:
    """An empty table with a title, as all reports have it."""
    return Table(
        title=Text(printable(title), style="bold"), title_justify="left", box=None, pad_edge=False
    )
