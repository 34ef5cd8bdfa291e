"""Watts to assume for machines without a meter; `[power]` in config.toml overrides them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from p2ptrain.energy.power_model import PowerModel
from p2ptrain.errors import ConfigError

ERROR_BAND: Final = 0.5
JOULES_PER_BYTE: Final = 1e-7
"""802.11ac near 100 Mbit/s: about 1 W / 12.5 MB/s = 0.08 uJ per byte, rounded up; older Wi-Fi
needs some 2 uJ (Huang et al. 2012)."""
PACKAGE_IDLE_WATTS: Final = 3.0
WATTS_MAX: Final = 10_000.0
SUPPLIES: Final = ("auto", "model")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Assumed:
    """Assumed watts of a kind of machine."""

    idle_watts: float
    core_watts: float
    label: str


_X86: Final = _Assumed(idle_watts=8.0, core_watts=7.5, label="x86 laptop or mini PC")
_ARM: Final = _Assumed(idle_watts=2.7, core_watts=1.5, label="ARM board or phone")
_MACHINES: Final = {"x86_64": _X86, "amd64": _X86, "i686": _X86}


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerConfig:
    """`[power]` of config.toml; None keeps the assumption."""

    meter: str = "auto"
    """auto: a counter where one is readable, else the model; model: the model always."""
    idle_watts: float | None = None
    core_watts: float | None = None
    """Above idle, one fully busy core."""
    joules_per_byte: float | None = None
    error_band: float | None = None
    source: str | None = None
    """Where these figures come from, for example `plug, 2026-11-02`."""


def parse_power_config(table: Mapping[str, object]) -> PowerConfig:
    """Check the `[power]` table of config.toml.

    Raises:
        ConfigError: an unknown key, or a value out of its range; nothing is used.
    """
    unknown = sorted(set(table) - set(PowerConfig.__dataclass_fields__))
    if unknown:
        raise ConfigError(f"[power] has an unknown key {unknown[0]!r:.60}")
    meter, source = table.get("meter", "auto"), table.get("source")
    if meter not in SUPPLIES:
        raise ConfigError(f"[power] meter is one of: {', '.join(SUPPLIES)}")
    if source is not None and not (isinstance(source, str) and 0 < len(source) <= 100):
        raise ConfigError("[power] source is a text of at most 100 characters")
    return PowerConfig(
        meter=str(meter),
        idle_watts=_number(table, "idle_watts", WATTS_MAX),
        core_watts=_number(table, "core_watts", WATTS_MAX),
        joules_per_byte=_number(table, "joules_per_byte", 1.0),
        error_band=_number(table, "error_band", 10.0),
        source=source,
    )


def model_for(*, machine: str, cores: int, config: PowerConfig) -> PowerModel:
    """The model of a machine that has no meter.

    Args:
        machine: platform.machine(), for example `x86_64` or `aarch64`.
        cores: Cores of the machine.
        config: Overrides.
    """
    assumed = _MACHINES.get(machine.lower(), _ARM)
    configured = config.idle_watts is not None and config.core_watts is not None
    source = f"assumed watts of an {assumed.label}"
    if configured:
        source = config.source or "watts from config.toml"
    elif config.idle_watts is not None or config.core_watts is not None:
        source = f"watts partly from config.toml, else {source}"
    return PowerModel(
        idle_watts=_given(config.idle_watts, assumed.idle_watts),
        core_watts=_given(config.core_watts, assumed.core_watts),
        joules_per_byte=_given(config.joules_per_byte, JOULES_PER_BYTE),
        cores=cores,
        source=source,
        error_band=_given(config.error_band, ERROR_BAND),
    )


def package_model(*, machine: str, cores: int, config: PowerConfig) -> PowerModel:
    """The model beside a package counter: its idle part, and intervals without a reading.

    Bytes cost nothing in it, since a package counter does not see the network either and
    figures of different scope are not added.
    """
    assumed = _MACHINES.get(machine.lower(), _ARM)
    return PowerModel(
        idle_watts=_given(config.idle_watts, PACKAGE_IDLE_WATTS),
        core_watts=_given(config.core_watts, assumed.core_watts),
        joules_per_byte=0.0,
        cores=cores,
        source="assumed idle watts of a package" if config.idle_watts is None else "config.toml",
    )


def _given(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def _number(table: Mapping[str, object], key: str, most: float) -> float | None:
    value = table.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"[power] {key} is a number")
    if not (math.isfinite(value) and 0 <= value <= most):
        raise ConfigError(f"[power] {key} lies between 0 and {most:g}")
    return float(value)
