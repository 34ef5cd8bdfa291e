"""What an owner decides about a peer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from p2ptrain import limits
from p2ptrain.errors import ConfigError
from p2ptrain.membership.record import MemberRecord
from p2ptrain.power.model import PowerConfig, parse_power_config


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


def power_settings(settings: Mapping[str, object]) -> PowerConfig:
    """The `[power]` table of config.toml, the only one there is.

    Raises:
        ConfigError: an unknown table or key, or a value out of its range; nothing is used.
    """
    unknown = sorted(set(settings) - {"power"})
    table = settings.get("power", {})
    if unknown or not isinstance(table, Mapping):
        what = f"an unknown entry {unknown[0]!r:.60}" if unknown else "a [power] that is no table"
        raise ConfigError(f"config.toml has {what}", hint="README.md lists what it may hold")
    return parse_power_config(table)


def default_threads(records: Sequence[MemberRecord]) -> int:
    """Compute threads of a run that asks for no number: half of the smallest machine's cores,
    within what every owner allows, and at least one."""
    allowed = min(record.threads_max for record in records)
    return max(1, min(allowed, min(record.cores for record in records) // 2))
