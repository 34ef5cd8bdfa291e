"""Devices and links as people describe them: `devices.toml` and `links.toml`, checked.

Pure: given the text of a file, and of the descriptions that come along. README has the keys.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from p2ptrain.errors import ConfigError
from p2ptrain.ids import DeviceId
from p2ptrain.planner.input import LinkEstimate
from p2ptrain.planner.links import MEDIUM_CHARACTERS_MAX
from p2ptrain.planner.toml_text import known_keys, read_toml, shown
from p2ptrain.units import parse_bytes

DEVICES_MAX: Final = 64
NAME_CHARACTERS_MAX: Final = 60
BYTES_PER_MBIT: Final = 125_000
JOULES_PER_BYTE: Final = 1e-7
"""Assumed where a file names none: 802.11ac near 100 Mbit/s, as `power.model` assumes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """What a number may be."""

    low: float
    high: float
    unit: str


RANGES: Final[dict[str, Range]] = {
    "gflops": Range(low=0.01, high=1e6, unit="GFLOP/s"),
    "memory_gbytes_per_s": Range(low=0.01, high=1e5, unit="GB/s"),
    "idle_watts": Range(low=0.0, high=10_000.0, unit="W"),
    "busy_watts": Range(low=0.001, high=10_000.0, unit="W"),
    "joules_per_byte": Range(low=0.0, high=1e-3, unit="J per byte"),
    "battery_wh": Range(low=0.01, high=1e5, unit="Wh"),
    "count": Range(low=1, high=DEVICES_MAX, unit="devices"),
    "mbit_per_s": Range(low=0.01, high=400_000.0, unit="Mbit/s"),
    "latency_ms": Range(low=0.0, high=60_000.0, unit="ms"),
}
MEMORY: Final = (64 * 1024**2, 16 * 1024**4)
NEEDED: Final = ("gflops", "idle_watts", "busy_watts")
DEVICE_KEYS: Final = (
    "name", "type", "count", "memory", "gflops", "memory_gbytes_per_s", "idle_watts",
    "busy_watts", "joules_per_byte", "battery_wh", "source",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """One device as described; SI units."""

    name: str
    gflops: float
    """Float32 operations that training reaches, all together."""
    memory_bytes: int
    idle_watts: float
    busy_watts: float
    joules_per_byte: float
    memory_gbytes_per_s: float | None
    battery_wh: float | None
    sources: Mapping[str, str]
    """Where a number comes from, by key."""


def parse_devices(
    text: str, *, file: str, types: Mapping[str, Mapping[str, Any]]
) -> tuple[DeviceSpec, ...]:
    """The devices of a file, in its order.

    Args:
        text: Of the file.
        file: Its name, for messages.
        types: Tables of the described types, by name (Any: TOML values, not yet checked).

    Raises:
        ConfigError: names the device, the key and what is allowed; nothing is used.
    """
    document = read_toml(text, file)
    known_keys(document, ("device",), file)
    tables = _tables(document, "device", file)
    if not tables:
        raise ConfigError(f"{file} has no device", hint="begin each with a line: [[device]]")
    found: list[DeviceSpec] = []
    for index, table in enumerate(tables):
        label = f"{file}: device {shown(table.get('name', table.get('type', index + 1)))}"
        merged = _with_type(table, label, types)
        found += _copies(merged, label)
    names = [spec.name for spec in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{file}: two devices are called {twice[0]!r}", hint="give each a name")
    if len(found) > DEVICES_MAX:
        raise ConfigError(
            f"{file} has {len(found)} devices, {DEVICES_MAX} at most are planned for",
            hint="leave some out, or lower a count",
        )
    return tuple(found)


def parse_links(text: str, *, file: str, devices: Sequence[str]) -> tuple[LinkEstimate, ...]:
    """The links between all devices: named ones, else of their medium, else the file's own.

    Raises:
        ConfigError: an unknown device, or a number that is missing or out of its range.
    """
    document = read_toml(text, file)
    known_keys(document, ("mbit_per_s", "latency_ms", "medium", "link"), file)
    told = "mbit_per_s" in document or "latency_ms" in document
    rest = _LinkSpeed.of(document, file) if told else None
    pairs: dict[frozenset[str], tuple[_LinkSpeed, str]] = {}
    media: set[str] = set()
    for index, table in enumerate(_tables(document, "medium", file)):
        label = f"{file}: medium {index + 1}"
        known_keys(table, ("name", "devices", "mbit_per_s", "latency_ms"), label)
        name = _text(table.get("name", f"medium {index + 1}"), label, MEDIUM_CHARACTERS_MAX)
        if name in media:
            raise ConfigError(f"{file}: two media are called {name!r}", hint="give each a name")
        media.add(name)
        speed = _LinkSpeed.of(table, label)
        members = _names(table.get("devices", list(devices)), label, devices, key="devices")
        for pair in itertools.combinations(members, 2):
            pairs[frozenset(pair)] = (speed, name)
    for index, table in enumerate(_tables(document, "link", file)):
        label = f"{file}: link {index + 1}"
        known_keys(table, ("between", "mbit_per_s", "latency_ms"), label)
        ends = _names(table.get("between"), label, devices, key="between")
        if len(set(ends)) != 2:
            raise ConfigError(f"{label} joins two different devices", hint='between = ["a", "b"]')
        pairs[frozenset(ends)] = (_LinkSpeed.of(table, label), "")
    return tuple(_link_estimates(pairs, rest, sorted(devices)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _LinkSpeed:
    latency_ns: int
    bytes_per_s: int

    @staticmethod
    def of(table: Mapping[str, Any], label: str) -> _LinkSpeed:  # Any: TOML values
        rate = _number(table, "mbit_per_s", label)
        if rate is None:
            raise ConfigError(f"{label}: mbit_per_s is missing", hint="give its throughput")
        latency_ms = _number(table, "latency_ms", label)
        return _LinkSpeed(
            latency_ns=round((1.0 if latency_ms is None else latency_ms) * 1e6),
            bytes_per_s=max(1, round(rate * BYTES_PER_MBIT)),
        )


def _link_estimates(
    pairs: Mapping[frozenset[str], tuple[_LinkSpeed, str]],
    rest: _LinkSpeed | None,
    devices: Sequence[str],
) -> Iterable[LinkEstimate]:
    for first, second in itertools.combinations(devices, 2):
        speed, medium = pairs.get(frozenset((first, second)), (rest, ""))
        if speed is not None:
            yield LinkEstimate(
                first=DeviceId(first),
                second=DeviceId(second),
                latency_ns=speed.latency_ns,
                bytes_per_s=speed.bytes_per_s,
                medium=medium,
            )


def _with_type(
    table: Mapping[str, Any], label: str, types: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:  # Any: TOML values
    known_keys(table, DEVICE_KEYS, label)
    kind = table.get("type")
    if kind is None:
        return dict(table)
    if not isinstance(kind, str) or kind not in types:
        near = difflib.get_close_matches(kind, types, n=1) if isinstance(kind, str) else []
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"{label}: there is no type {shown(kind)}",
            hint=f"{hint}types: {', '.join(sorted(types))}",
        )
    base = types[kind]
    sources = {key: text for key, text in base.get("source", {}).items() if key not in table}
    own = _sources(table, label)
    return {**base, "name": kind, **table, "source": {**sources, **own}}


def _sources(table: Mapping[str, Any], label: str) -> dict[str, str]:  # Any: TOML values
    value = table.get("source", {})
    if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
        raise ConfigError(
            f"{label}: source is a table of texts", hint='source = { gflops = "our own test" }'
        )
    return value


def _copies(table: Mapping[str, Any], label: str) -> Iterable[DeviceSpec]:  # Any: TOML values
    count = _number(table, "count", label) or 1
    if count != int(count):
        raise ConfigError(f"{label}: count is a whole number", hint="count = 2")
    name = _text(table.get("name"), label, NAME_CHARACTERS_MAX)
    for index in range(int(count)):
        own = name if count == 1 else f"{name}-{index + 1}"
        yield _spec(table, own, label)


def _text(value: object, label: str, most: int) -> str:
    """A name: printable, and not so long that tables and pictures cannot show it."""
    if isinstance(value, str) and value.strip() and len(value) <= most and value.isprintable():
        return value
    raise ConfigError(
        f"{label}: name is a short text, at most {most} characters", hint='name = "kitchen"'
    )


def _spec(table: Mapping[str, Any], name: str, label: str) -> DeviceSpec:  # Any: TOML values
    values = {key: _number(table, key, label) for key in RANGES if key in DEVICE_KEYS}
    needed = {key: value for key in NEEDED if (value := values[key]) is not None}
    missing = [key for key in NEEDED if key not in needed]
    if "memory" not in table:
        missing.append("memory")
    if missing:
        raise ConfigError(
            f"{label}: {missing[0]} is missing", hint="give it, or a type that has it"
        )
    if needed["busy_watts"] < needed["idle_watts"]:
        raise ConfigError(
            f"{label}: busy_watts ({needed['busy_watts']:g}) is below idle_watts "
            f"({needed['idle_watts']:g})",
            hint="busy_watts is the whole device while it computes, idle included",
        )
    per_byte = values["joules_per_byte"]
    return DeviceSpec(
        name=name,
        memory_bytes=_memory(table["memory"], label),
        joules_per_byte=JOULES_PER_BYTE if per_byte is None else per_byte,
        memory_gbytes_per_s=values["memory_gbytes_per_s"],
        battery_wh=values["battery_wh"],
        sources=_sources(table, label),
        **needed,
    )


def _memory(value: object, label: str) -> int:
    try:
        size = parse_bytes(value) if isinstance(value, str) else 0
    except (ValueError, OverflowError):
        size = 0
    if not MEMORY[0] <= size <= MEMORY[1]:
        raise ConfigError(
            f"{label}: memory is what training may use, 64MiB to 16384GiB, not {shown(value)}",
            hint='memory = "4GiB"',
        )
    return size


def _number(table: Mapping[str, Any], key: str, label: str) -> float | None:  # Any: TOML values
    if key not in table:
        return None
    value, allowed = table[key], RANGES[key]
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if not plain or not allowed.low <= value <= allowed.high:  # nan is neither
        raise ConfigError(
            f"{label}: {key} lies between {allowed.low:g} and {allowed.high:g} {allowed.unit}, "
            f"not {shown(value)}",
            hint="correct the number, or leave the key out if it has a default",
        )
    return float(value)


def _names(value: object, label: str, devices: Sequence[str], *, key: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ConfigError(f"{label}: {key} is a list of names", hint=f'{key} = ["a", "b"]')
    for each in value:
        if each not in devices:
            near = difflib.get_close_matches(each, devices, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"devices: {', '.join(devices)}"
            raise ConfigError(f"{label}: there is no device {each!r:.40}", hint=hint)
    return list(dict.fromkeys(value))


def _tables(document: Mapping[str, Any], key: str, file: str) -> list[dict[str, Any]]:  # Any: TOML
    value = document.get(key, [])
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise ConfigError(f"{file}: {key} is a list of tables", hint=f"write [[{key}]]")
    return value
