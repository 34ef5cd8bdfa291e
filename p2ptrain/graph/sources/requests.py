"""What a person asks of the exporter beside the model itself."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from p2ptrain.errors import ConfigError
from p2ptrain.graph.fine_tuning import FineTuning


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The options of an export that decide the source."""

    name: str
    description: str = ""
    task: str | None = None
    """None: what the model says."""
    loss: str | None = None
    """None: the task's usual one."""
    label_smoothing: float = 0.0
    context: int | None = None
    """Tokens of a sample; None: as many as the model takes."""
    inputs: tuple[str, ...] = ()
    """Data inputs as text, `NAME=DTYPE:batch,SIZE,...`; empty: what the model says."""
    arguments: dict[str, Any] = field(default_factory=dict)  # Any: JSON values
    """Of the factory, or fields of the configuration."""
    segments: int | None = None
    """About how many; None: as the graph suggests."""
    cuts: tuple[str, ...] = ()
    """Values or modules to cut behind; empty: the exporter chooses."""
    tuning: FineTuning = field(default_factory=FineTuning)
    """What is trained of it."""
    use_weights: bool = True
    """False: parameters are drawn even where there are weights."""


def parse_arguments(texts: Iterable[str]) -> dict[str, Any]:  # Any: JSON values
    """NAME=VALUE each; values are JSON where they can be, else text.

    Raises:
        ConfigError: no `=` in one of them.
    """
    parsed: dict[str, Any] = {}  # Any: JSON values
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise ConfigError(f"--arg {text!r} is not NAME=VALUE")
        try:
            parsed[name] = json.loads(value)
        except ValueError:
            parsed[name] = value
    return parsed
