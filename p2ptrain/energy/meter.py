"""What an energy meter is and what it says: identity, scope, quality, readings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

SCOPES: Final = ("wall", "board", "soc", "package", "model")
QUALITIES: Final = ("measured", "estimated")


@dataclass(frozen=True, slots=True, kw_only=True)
class MeterIdentity:
    """Which meter a figure comes from; peers with the same `meter` share it."""

    meter: str
    """For example `<host identity>/rapl`; equal on all peers that read the same counter."""
    scope: str
    quality: str
    error_band: float | None
    """Relative half width of the error band; None when unknown."""
    source: str
    """Where the figure comes from, one phrase."""

    def __post_init__(self) -> None:
        if self.scope not in SCOPES or self.quality not in QUALITIES:
            raise ValueError(f"unknown scope {self.scope!r} or quality {self.quality!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One reading of a meter."""

    at_s: float
    """The caller's clock."""
    counter_uj: int | None
    """Microjoules since the meter was opened, wraps removed; None: no counter, use the model."""
    machine_cpu_ns: int | None
    """CPU time of all processes since boot; None when the platform does not say."""
