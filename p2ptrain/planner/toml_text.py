"""TOML that a person wrote: read and checked key by key; what is wrong is named with its place."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from p2ptrain.errors import ConfigError


def read_toml(text: str, file: str) -> dict[str, Any]:  # Any: TOML values
    """The document.

    Raises:
        ConfigError: it is not TOML, or holds a number of thousands of digits.
    """
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{file} is not TOML: {error}", hint="see README, plan") from error
    except ValueError as error:
        raise ConfigError(
            f"{file} has a number with thousands of digits", hint="correct the number"
        ) from error


def known_keys(table: Mapping[str, Any], keys: Sequence[str], label: str) -> None:  # Any: as above
    """Let pass what has no other keys.

    Raises:
        ConfigError: names the first that is unknown, and the one that may be meant.
    """
    for key in table:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1)
            hint = f"did you mean {near[0]}?" if near else f"keys: {', '.join(keys)}"
            raise ConfigError(f"{label} has an unknown key {key!r:.40}", hint=hint)


def shown(value: object) -> str:
    """Any TOML value as it may stand in a sentence, quoted and cut."""
    try:
        return f"{str(value)!r:.40}"
    except ValueError:  # an integer that Python does not turn into decimal digits
        return "a number with thousands of digits"
