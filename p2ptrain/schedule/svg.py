"""Draw a simulated step as an SVG picture: one row per device, time from left to right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from xml.sax.saxutils import escape

from p2ptrain.schedule.simulator import Span
from p2ptrain.units import NS_PER_S, format_seconds

WIDTH: Final = 960
ROW: Final = 28
LEFT: Final = 160
TOP: Final = 40
COLOURS: Final = {"F": "#4c78a8", "B": "#f58518", "W": "#54a24b"}
"""Forward, backward, and the weight part of a backward."""


def svg(rows: Sequence[tuple[str, Sequence[Span]]], end_ns: int, title: str) -> str:
    """A self-contained document; each box is one microbatch through one stage."""
    height = TOP + ROW * len(rows) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 20}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<text x="8" y="20" font-size="14">{escape(title)}</text>',
    ]
    for index, (name, spans) in enumerate(rows):
        top = TOP + ROW * index
        parts.append(f'<text x="8" y="{top + 18}">{escape(name)}</text>')
        parts += [_box(span, top, max(1, end_ns)) for span in spans]
    foot = TOP + ROW * len(rows) + 20
    parts.append(f'<text x="{LEFT}" y="{foot}">0</text>')
    whole = format_seconds(end_ns / NS_PER_S)
    parts.append(f'<text x="{LEFT + WIDTH}" y="{foot}" text-anchor="end">{whole}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _box(span: Span, top: int, end_ns: int) -> str:
    left = LEFT + span.start_ns * WIDTH / end_ns
    wide = (span.end_ns - span.start_ns) * WIDTH / end_ns
    colour = COLOURS[span.action.kind]
    box = (
        f'<rect x="{left:.2f}" y="{top + 2}" width="{wide:.2f}" height="{ROW - 4}" '
        f'fill="{colour}" stroke="white" stroke-width="0.5"><title>{span.action}</title></rect>'
    )
    if wide < 14:
        return box
    middle = left + wide / 2
    label = f'<text x="{middle:.2f}" y="{top + 18}" text-anchor="middle" fill="white">'
    return f"{box}{label}{span.action.microbatch}</text>"
