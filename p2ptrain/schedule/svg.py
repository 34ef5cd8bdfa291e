"""Draw a simulated step as an SVG picture: one row per device, time from left to right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from xml.sax.saxutils import escape

from p2ptrain.schedule.labels import cells, fitted
from p2ptrain.schedule.simulator import Span
from p2ptrain.units import NS_PER_S, format_seconds

WIDTH: Final = 960
ROW: Final = 28
TOP: Final = 40
EDGE: Final = 8
NAME_CELLS: Final = 40
"""Of a name beside a row; longer ones are cut, and whole where the pointer rests on them."""
CELL: Final = 7.5
"""Pixels of a letter of the names, whose font has them all alike; half of a wide letter's."""
DIGIT: Final = 8
COLOURS: Final = {"F": "#4c78a8", "B": "#f58518", "W": "#54a24b"}
"""Forward, backward, and the weight part of a backward."""
MEANINGS: Final = {"F": "forward", "B": "backward", "W": "delayed gradients"}


def svg(rows: Sequence[tuple[str, Sequence[Span]]], end_ns: int, title: str) -> str:
    """A self-contained document; each box is one microbatch through one stage."""
    height, foot = TOP + ROW * len(rows) + 30, TOP + ROW * len(rows) + 20
    longest = min(NAME_CELLS, max((cells(name) for name, _ in rows), default=0))
    left = 2 * EDGE + round(CELL * longest)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + WIDTH + 20}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<text x="{EDGE}" y="20" font-size="14">{escape(title)}</text>',
    ]
    for index, (name, spans) in enumerate(rows):
        top = TOP + ROW * index
        parts.append(
            f'<text x="{EDGE}" y="{top + 18}" font-family="monospace">'
            f"{escape(fitted(name, longest).rstrip())}<title>{escape(name)}</title></text>"
        )
        parts += [_box(span, left, top, max(1, end_ns)) for span in spans]
    whole = format_seconds(end_ns / NS_PER_S)
    parts += [
        f'<text x="{left}" y="{foot}">0</text>',
        f'<text x="{left + WIDTH / 2}" y="{foot}" text-anchor="middle">{_legend(rows)}</text>',
        f'<text x="{left + WIDTH}" y="{foot}" text-anchor="end">{whole}</text>',
    ]
    return "\n".join([*parts, "</svg>", ""])


def _legend(rows: Sequence[tuple[str, Sequence[Span]]]) -> str:
    """What the colours mean that were used."""
    used = {span.action.kind for _, spans in rows for span in spans}
    return ", ".join(
        f'<tspan fill="{COLOURS[kind]}">{meaning}</tspan>'
        for kind, meaning in MEANINGS.items()
        if kind in used
    )


def _box(span: Span, origin: int, top: int, end_ns: int) -> str:
    left = origin + span.start_ns * WIDTH / end_ns
    wide = (span.end_ns - span.start_ns) * WIDTH / end_ns
    colour, number = COLOURS[span.action.kind], str(span.action.microbatch)
    box = (
        f'<rect x="{left:.2f}" y="{top + 2}" width="{wide:.2f}" height="{ROW - 4}" '
        f'fill="{colour}" stroke="white" stroke-width="0.5"><title>{span.action}</title></rect>'
    )
    if wide < DIGIT * len(number) + 6:
        return box
    middle = left + wide / 2
    label = f'<text x="{middle:.2f}" y="{top + 18}" text-anchor="middle" fill="white">'
    return f"{box}{label}{number}</text>"
