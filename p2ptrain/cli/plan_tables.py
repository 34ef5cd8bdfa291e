"""The answer of `p2ptrain plan` as tables, lines and a picture."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from p2ptrain.cli.tables import add_row, new_table
from p2ptrain.planner.answer import Answer, CandidateReport
from p2ptrain.schedule.drawing import draw_rows
from p2ptrain.schedule.simulator import Span
from p2ptrain.units import format_bytes, format_joules, format_seconds, format_span


def candidates_table(answer: Answer) -> Table:
    """The best of each kind, the winner first."""
    table = new_table(
        f"{answer.model}, {answer.objective}: {answer.steps} steps of {answer.minibatch} samples"
    )
    table.add_column("plan", no_wrap=True)
    table.add_column("devices", overflow="fold")
    for heading in ("step", "J/step", "J/sample", "above\nidle", "memory", "sent"):
        table.add_column(heading, justify="right", no_wrap=True)
    what_if = any(not one.runs for one in answer.candidates)
    if what_if:
        table.add_column("")
    for one in answer.candidates:
        add_row(
            table,
            one.kind,
            _stages(one),
            format_seconds(one.step_s),
            format_joules(one.joules),
            format_joules(one.joules_per_sample),
            format_joules(one.marginal_joules_per_sample),
            format_bytes(one.memory_bytes),
            format_bytes(one.sent_bytes),
            *(["" if one.runs else "what-if"] if what_if else []),
        )
    return table


def _stages(one: CandidateReport) -> str:
    """`a | b, c`: stages in order, replicas together; `a + b` where all share every segment."""
    if one.kind in ("tensor", "sequence"):
        return " + ".join(part.device for part in one.parts)
    stages: dict[int, list[str]] = {}
    for part in one.parts:
        stages.setdefault(part.stage, []).append(part.device)
    return " | ".join(", ".join(names) for _, names in sorted(stages.items()))


def answer_lines(answer: Answer) -> list[str]:
    """Why the winner won, who is left out, what is impossible, and the whole run's cost."""
    first, *rest = answer.reasons
    lines = [f"why: {first}", *(f"     {sentence}" for sentence in rest)]
    lines += [f"no {kind} plan: {reason}" for kind, reason in answer.impossible.items()]
    lines += [f"{out.device} left out: {out.reason}" for out in answer.left_out]
    lines.append(
        f"all {answer.steps} steps: {format_span(answer.total_s)}, "
        f"{format_joules(answer.total_joules)} ({answer.priced} candidates simulated); "
        "joules are modelled, from the watts that are described"
    )
    return lines


def parts_table(winner: CandidateReport) -> Table:
    """What each device of the winner does in a step."""
    table = new_table("each device's part of a step")
    for heading in ("device", "stage", "segments"):
        table.add_column(heading, overflow="fold")
    for heading in ("micro-\nbatches", "compute", "sent", "joules", "memory", "of"):
        table.add_column(heading, justify="right", no_wrap=True)
    for part in winner.parts:
        add_row(
            table,
            part.device,
            str(part.stage),
            f"{part.segments[0]} .. {part.segments[-1]} ({len(part.segments)})",
            str(part.microbatches),
            format_seconds(part.compute_s),
            format_bytes(part.sent_bytes),
            format_joules(part.joules),
            format_bytes(part.memory_bytes),
            format_bytes(part.memory_room_bytes),
        )
    return table


def picture(rows: Sequence[tuple[str, Sequence[Span]]]) -> list[str]:
    """The schedule as text; nothing where there is none."""
    if not rows:
        return []
    end_ns = max(span.end_ns for _, spans in rows for span in spans)
    delayed = any(span.action.kind == "W" for _, spans in rows for span in spans)
    also = ", w: delayed gradients" if delayed else ""
    return ["", f"digits: forward of that microbatch, letters: backward{also}, dots: waiting",
            *draw_rows(rows, end_ns).splitlines()]  # fmt: skip
