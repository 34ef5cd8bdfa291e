"""The study's results as CSV, a Markdown table and SVG plots; pure."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Final
from xml.sax.saxutils import escape

from p2ptrain.planner.kinds import KINDS
from p2ptrain.units import MIB
from tools.study.cells import LINKS, MICROBATCHES, PEERS, Cell, Model
from tools.study.figures import PHASES, POWER_DEVICE, Figures

COLUMNS: Final = (
    "model", "kind", "peers", "link", "outcome", "why", "plan", "predicted_step_s", "step_s",
    "seconds_per_sample", "joules_per_sample",
    *(f"{phase}_joules_per_sample" for phase in PHASES),
    "bytes_per_sample", "peak_bytes", "date",
)  # fmt: skip
COLOURS: Final = {
    "one device": "#79706e", "pipeline": "#4c78a8", "data": "#f58518", "hybrid": "#54a24b",
    "tensor": "#b279a2", "sequence": "#e45756",
}  # fmt: skip
WIDTH, HEIGHT, LEFT, TOP, FOOT = 720, 260, 70, 44, 60


ENERGY: Final = (
    "Joules are modelled, not measured: every throttled peer stands for a Raspberry Pi 4 and is "
    f"taken to draw what `p2ptrain/devices/{POWER_DEVICE}.toml` says, busy while it computes, idle "
    "in every other phase, and so much for each byte sent or received. How long each phase lasted "
    "is measured."
)


def page(
    cells: Sequence[Cell],
    found: Mapping[str, Figures],
    hardware: Mapping[str, object],
    command: str,
) -> str:
    """Everything for people: hardware, date, command, a table and plots for each model."""
    dates = sorted({each.date for each in found.values() if each.date})
    when = " to ".join(dict.fromkeys((*dates[:1], *dates[-1:])))
    memory = f"{float(str(hardware.get('memory_bytes') or 0)) / 2**30:.0f} GiB"
    lines = [
        "# The parallelism study: results",
        "",
        "What they show is in [README.md](README.md). The tool writes this page, CSV and plots.",
        "",
        f"{hardware.get('processor', 'unknown')}, {hardware.get('cores', '?')} cores, {memory}; "
        f"load when it began {hardware.get('load_before', 'unknown')}; {when}; `{command}`",
        "",
        f"Every peer has one thread and a CPU quota in periods of 10 ms. {ENERGY}",
        "",
        "A cell says, of one sample: time, joules of all peers together, bytes that steps send; "
        "then the peak memory of the process that needed most (`VmHWM`).",
    ]
    for model in dict.fromkeys(cell.model for cell in cells):
        lines += ["", f"## {model.name}", "", _words(model), ""]
        lines += [as_markdown(model, cells, found), ""]
        lines += [f"![{name}]({model.name}-{name}.svg)" for name in ("seconds", "joules")]
        lines += ["", *_phases(model, cells, found)]
    return "\n".join(lines) + "\n"


def _words(model: Model) -> str:
    room = f"{model.cores:g} cores and {model.memory_bytes / MIB:.0f} MiB for runs on each peer"
    return f"{model.words}. {room}, {MICROBATCHES} microbatches of {model.microbatch_size}."


def _phases(model: Model, cells: Sequence[Cell], found: Mapping[str, Figures]) -> list[str]:
    """Joules by phase of what ran."""
    lines = [f"| joules of a sample | {' | '.join(PHASES)} | plan |", "| --- " * 6 + "|"]
    for cell in cells:
        figures = found.get(cell.key)
        if cell.model == model and figures is not None and figures.phase_joules is not None:
            own = " | ".join(f"{figures.phase_joules[phase]:.3f}" for phase in PHASES)
            place = f"{cell.kind}, {cell.peers}"
            place += "" if cell.peers == 1 else f", {cell.link.name}"
            lines.append(f"| {place} | {own} | {figures.plan} |")
    return lines


def as_csv(cells: Sequence[Cell], found: Mapping[str, Figures]) -> str:
    """One line per cell that was looked at."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for cell in cells:
        if (figures := found.get(cell.key)) is not None:
            writer.writerow(_record(cell, figures))
    return out.getvalue()


def _record(cell: Cell, figures: Figures) -> dict[str, object]:
    joules = figures.phase_joules or {}
    kept = {name: getattr(figures, name) for name in COLUMNS if hasattr(figures, name)}
    return {
        **{name: _short(value) for name, value in kept.items()},
        "model": cell.model.name,
        "kind": cell.kind,
        "peers": cell.peers,
        "link": "" if cell.peers == 1 else cell.link.name,
        **{f"{phase}_joules_per_sample": _short(joules.get(phase)) for phase in PHASES},
    }


def _short(value: object) -> object:
    return f"{value:.5g}" if isinstance(value, float) else value


def as_markdown(model: Model, cells: Sequence[Cell], found: Mapping[str, Figures]) -> str:
    """One model's table: kinds down, links and numbers of peers across."""
    columns = [(link, peers) for link in LINKS for peers in PEERS]
    heads = [f"{link.name}, {peers}" for link, peers in columns]
    lines = [f"| kind | {' | '.join(heads)} |", f"| --- |{' --- |' * len(heads)}"]
    for kind in KINDS:
        own = [cell for cell in cells if cell.model == model and cell.kind == kind]
        if kind == "one device":
            texts = [_cell(found.get(own[0].key))] * len(columns)
        else:
            by_place = {(cell.link.name, cell.peers): cell for cell in own}
            texts = [
                _cell(found.get(cell.key))
                if (cell := by_place.get((link.name, peers))) is not None
                else ""
                for link, peers in columns
            ]
        lines.append(f"| {kind} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _cell(figures: Figures | None) -> str:
    if figures is None:
        return "not looked at yet"
    if figures.seconds_per_sample is None:
        return figures.outcome
    parts = [
        f"{1000 * figures.seconds_per_sample:.0f} ms",
        f"{figures.joules_per_sample or 0.0:.2f} J",
        f"{(figures.bytes_per_sample or 0.0) / 1000:.0f} kB",
        f"{(figures.peak_bytes or 0) / MIB:.0f} MiB",
    ]
    return ", ".join(parts)


def as_svg(
    model: Model, cells: Sequence[Cell], found: Mapping[str, Figures], *, name: str, title: str
) -> str:
    """Bars of one figure (`seconds_per_sample` or `joules_per_sample`) by link, peers and kind."""
    groups = []
    for link in LINKS:
        for peers in PEERS:
            own = [
                cell
                for cell in cells
                if cell.model == model
                and (cell.kind == "one device" or (cell.link == link and cell.peers == peers))
            ]
            bars = [(cell.kind, value) for cell in own if (value := _value(cell, found, name))]
            groups.append((f"{link.name}, {peers}", bars))
    highest = max((value for _, bars in groups for _, value in bars), default=1.0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 20}" '
        f'height="{TOP + HEIGHT + FOOT}" font-family="sans-serif" font-size="11">',
        f'<text x="8" y="18" font-size="14">{escape(title)}</text>',
        *_axis(highest),
    ]
    wide = WIDTH / len(groups)
    for index, (label, bars) in enumerate(groups):
        parts += _bars(label, bars, LEFT + index * wide, wide, highest)
    return "\n".join([*parts, *_legend(), "</svg>", ""])


def _value(cell: Cell, found: Mapping[str, Figures], name: str) -> float | None:
    figures = found.get(cell.key)
    value: float | None = None if figures is None else getattr(figures, name)
    return value


def _axis(highest: float) -> list[str]:
    parts = []
    for tenth in (0, 5, 10):
        y = TOP + HEIGHT * (1 - tenth / 10)
        parts.append(f'<line x1="{LEFT}" y1="{y}" x2="{LEFT + WIDTH}" y2="{y}" stroke="#ddd"/>')
        label = f"{highest * tenth / 10:.3g}"
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{label}</text>')
    return parts


def _bars(
    label: str, bars: Sequence[tuple[str, float]], left: float, wide: float, highest: float
) -> list[str]:
    middle, foot = left + wide / 2, TOP + HEIGHT + 14
    parts = [f'<text x="{middle:.1f}" y="{foot}" text-anchor="middle">{escape(label)}</text>']
    each = (wide - 12) / len(KINDS)
    for kind, value in bars:
        x = left + 6 + each * KINDS.index(kind)  # type: ignore[arg-type]  # one of them
        high = HEIGHT * value / highest
        parts.append(
            f'<rect x="{x:.1f}" y="{TOP + HEIGHT - high:.1f}" width="{each - 1:.1f}" '
            f'height="{high:.1f}" fill="{COLOURS[kind]}"><title>{escape(kind)}: {value:.4g}'
            "</title></rect>"
        )
    return parts


def _legend() -> list[str]:
    parts, y = [], TOP + HEIGHT + 40
    for index, kind in enumerate(KINDS):
        x = LEFT + index * 110
        parts.append(f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{COLOURS[kind]}"/>')
        parts.append(f'<text x="{x + 14}" y="{y}">{escape(kind)}</text>')
    return parts
