"""Patterns over the dotted names of parameters, as a person writes them.

A pattern fits a name when it fits the whole of it, or a run of its parts: `query` fits
`encoder.0.query.weight`, `layer.1` does not fit `layer.11.bias`, `*.bias` fits every bias. `*`,
`?` and `[...]` are those of file names; `*` goes across dots.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from p2ptrain.errors import ConfigError


def fits(name: str, patterns: Iterable[str]) -> bool:
    """Whether any of the patterns fits the name."""
    parts = name.split(".")
    return any(_fits(name, parts, pattern) for pattern in patterns)


def _fits(name: str, parts: list[str], pattern: str) -> bool:
    count = pattern.count(".") + 1
    runs = (".".join(parts[i : i + count]) for i in range(len(parts) - count + 1))
    return fnmatchcase(name, pattern) or any(fnmatchcase(run, pattern) for run in runs)


def chosen(names: Sequence[str], patterns: Iterable[str], *, option: str) -> tuple[str, ...]:
    """The names that the patterns fit, in their order.

    Args:
        option: Where the patterns came from, for the message.

    Raises:
        ConfigError: a pattern fits no name; the hint has names that are like it.
    """
    given = tuple(patterns)
    for pattern in given:
        if not any(fits(name, (pattern,)) for name in names):
            near = difflib.get_close_matches(pattern, _words(names), n=3, cutoff=0.4)
            raise ConfigError(
                f"{option}: no parameter's name fits {pattern!r}",
                hint=f"perhaps {' or '.join(near)}; the first parameter is {names[0]}"
                if near
                else f"names are like {', '.join(names[:3])}",
            )
    return tuple(name for name in names if fits(name, given))


def _words(names: Iterable[str]) -> list[str]:
    return sorted({part for name in names for part in name.split(".") if not part.isdigit()})
