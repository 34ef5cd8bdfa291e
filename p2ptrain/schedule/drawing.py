"""Draw a simulated step as text: one line per stage, time from left to right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from p2ptrain.schedule.labels import cells, fitted
from p2ptrain.schedule.simulator import Span, Timeline

NAME_CELLS: Final = 24
"""Of a name beside a row; longer ones are cut."""
_DIGITS = "0123456789abcdefghijklmnopqrstuvxyz"
"""Without `w`, which is the part of a backward that was delayed."""


def draw(timeline: Timeline, *, width: int = 72) -> str:
    """A picture such as `stage 0 |0011..AABB|`.

    A forward shows the last digit of its microbatch number to base 35, a backward the letter `A` to
    `Z` of it, delayed gradients `w`, idle time a dot. An action shorter than a column may be
    covered by its neighbour.
    """
    rows = [
        f"stage {index:<2}|{_row(spans, timeline.step_ns, width)}|"
        for index, spans in enumerate(timeline.stages)
    ]
    return "\n".join(rows)


def _row(spans: tuple[Span, ...], step_ns: int, width: int) -> str:
    columns = ["."] * width
    for span in spans:
        first = span.start_ns * width // max(step_ns, 1)
        last = max(first + 1, span.end_ns * width // max(step_ns, 1))
        for column in range(first, min(last, width)):
            columns[column] = _symbol(span)
    return "".join(columns)


def _symbol(span: Span) -> str:
    microbatch = span.action.microbatch
    if span.action.kind == "F":
        return _DIGITS[microbatch % len(_DIGITS)]
    if span.action.kind == "W":
        return "w"
    return chr(ord("A") + microbatch % 26)


def draw_rows(rows: Sequence[tuple[str, Sequence[Span]]], end_ns: int, *, width: int = 80) -> str:
    """The same picture for rows with names, one per device; `width` with names and frame."""
    longest = min(NAME_CELLS, max((cells(name) for name, _ in rows), default=0))
    inner = width - longest - len(" ||")
    return "\n".join(
        f"{fitted(name, longest)} |{_row(tuple(spans), end_ns, inner)}|" for name, spans in rows
    )
