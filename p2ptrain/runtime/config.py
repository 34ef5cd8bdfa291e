"""What an owner decides about a peer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from p2ptrain import limits
from p2ptrain.errors import ConfigError
from p2ptrain.membership.record import MemberRecord
from p2ptrain.power.model import PowerConfig, parse_power_config

StepSetting = Literal["disk", "memory", "auto"]
"""Where records of steps are kept; `auto`: on the disk unless writing there is slow."""
TABLES: Final = frozenset({"power", "journal"})


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerConfig:
    """Settings of one peer; the defaults suit a device on a home network."""

    name: str | None = None
    """What others call this device; None: the name it enrolled under."""
    listen_host: str = "0.0.0.0"
    port: int = limits.PEER_PORT_DEFAULT
    """0: any free port."""
    peers: tuple[str, ...] = ()
    """host:port of members to dial, beside those that are discovered or remembered."""
    discovery: bool = True
    interfaces: tuple[str, ...] | None = None
    """Addresses to discover on; None: all."""
    memory_bytes: int | None = None
    """What runs may use; None: half of the memory that is available."""
    threads: int | None = None
    """The most compute threads to use; None: as many as the machine has cores."""
    battery_reserve_percent: int = limits.BATTERY_LEAVE_PERCENT
    """Of a full battery: what runs may not spend; there the device leaves them."""

    def __post_init__(self) -> None:
        if not 0 <= self.battery_reserve_percent <= limits.BATTERY_RESERVE_PERCENT_MAX:
            raise ConfigError(
                f"a battery's reserve lies between 0 and {limits.BATTERY_RESERVE_PERCENT_MAX} %"
            )


def power_settings(settings: Mapping[str, object]) -> PowerConfig:
    """The `[power]` table of config.toml.

    Raises:
        ConfigError: an unknown table or key, or a value out of its range; nothing is used.
    """
    return parse_power_config(_table(settings, "power"))


def step_setting(settings: Mapping[str, object]) -> StepSetting:
    """Where records of steps are kept, by the `[journal]` table of config.toml.

    Raises:
        ConfigError: an unknown table or key, or another value than there is; nothing is used.
    """
    table = _table(settings, "journal")
    unknown = sorted(set(table) - {"steps"})
    if unknown:
        raise _wrong(f"an unknown key {unknown[0]!r:.60} in [journal]")
    chosen = table.get("steps", "disk")
    if chosen == "disk" or chosen == "memory" or chosen == "auto":  # narrows as `in` does not
        return chosen
    raise _wrong(f"steps = {chosen!r:.60} in [journal], which is none of disk, memory, auto")


def _table(settings: Mapping[str, object], name: str) -> Mapping[str, object]:
    unknown = sorted(set(settings) - TABLES)
    if unknown:
        raise _wrong(f"an unknown entry {unknown[0]!r:.60}")
    table = settings.get(name, {})
    if not isinstance(table, Mapping):
        raise _wrong(f"a [{name}] that is no table")
    return table


def _wrong(what: str) -> ConfigError:
    return ConfigError(f"config.toml has {what}", hint="README.md lists what it may hold")


def default_threads(records: Sequence[MemberRecord]) -> int:
    """Compute threads of a run that asks for no number: half of the smallest machine's cores,
    within what every owner allows, and at least one."""
    allowed = min(record.threads_max for record in records)
    return max(1, min(allowed, min(record.cores for record in records) // 2))
