"""Names beside a drawing: how wide they are on a terminal, cut or filled up to a width."""

from __future__ import annotations

import unicodedata


def cells(text: str) -> int:
    """Columns of a terminal that a text takes; letters of East Asian scripts take two."""
    return sum(_width(letter) for letter in text)


def _width(letter: str) -> int:
    if unicodedata.combining(letter):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in ("W", "F") else 1


def fitted(text: str, width: int) -> str:
    """The text in exactly so many cells, two or more: cut with an ellipsis, or filled up."""
    if cells(text) > width:
        text = text + "…"
        while cells(text) > width:
            text = text[:-2] + "…"
    return text + " " * (width - cells(text))
