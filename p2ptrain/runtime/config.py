"""What an owner decides about a peer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from p2ptrain import limits
from p2ptrain.data.options import DataOptions, GivenData
from p2ptrain.errors import ConfigError
from p2ptrain.membership.record import MemberRecord
from p2ptrain.power.model import PowerConfig, parse_power_config

StepSetting = Literal["disk", "memory", "auto"]
"""Where records of steps are kept; `auto`: on the disk unless writing there is slow."""
TABLES: Final = frozenset({"power", "journal", "data"})
DATA_KEYS: Final = ("path", "heldout", "text_field", "label_field", "labels", "heldout_labels")
DATA_PATHS: Final = frozenset({"path", "heldout", "labels", "heldout_labels"})


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
    data: str | None = None
    """What it feeds in runs whose peers feed their own data: an absolute path; None: what
    config.toml says."""

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


def given_data(settings: Mapping[str, object], path: str | None) -> GivenData | None:
    """The data that this peer gives to runs, by the `[data]` table of config.toml.

    Args:
        settings: Of config.toml.
        path: In place of the table's; None: as the table says.

    Returns:
        None where neither names any.

    Raises:
        ConfigError: an unknown table or key, no text, or a path that leads nowhere; nothing is
            used.
    """
    table = _table(settings, "data")
    unknown = sorted(set(table) - set(DATA_KEYS))
    if unknown:
        raise _wrong(f"an unknown key {unknown[0]!r:.60} in [data]")
    said = {key: _data_text(key, value) for key, value in table.items()}
    if path is not None:
        said["path"] = path
    for key in sorted(DATA_PATHS & set(said)):
        _check_path(Path(said[key]))
    if "path" not in said:
        if said:
            raise _wrong("a [data] without a path")
        return None
    return GivenData(
        path=said["path"],
        heldout=said.get("heldout"),
        options=DataOptions(
            text_field=said.get("text_field"),
            label_field=said.get("label_field"),
            labels=said.get("labels"),
            heldout_labels=said.get("heldout_labels"),
        ),
    )


def _data_text(key: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise _wrong(f"{key} = {value!r:.60} in [data], which is no text")
    if key in DATA_PATHS and not Path(value).is_absolute():
        raise _wrong(f"{key} = {value!r:.60} in [data], which is no absolute path")
    return value


def _check_path(path: Path) -> None:
    if not path.exists():
        raise ConfigError(
            f"there is no file or folder {path} to give to runs",
            hint="correct --data, or [data] in config.toml",
        )


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
