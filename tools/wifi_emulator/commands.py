"""What an emulator can be told while it runs, as text, and scripts of it.

    set rate=50 delay=20 jitter=5 loss=2 queue=50 multicast=off
    partition A B,C       A hears nobody and nobody hears A; B and C hear each other
    cut A B               between these two; cut A>B: B no longer hears A
    heal                  everything; heal A B and heal A>B undo one cut
    counts                frames and bytes per pair
    stop

A script has one command a line with the second at which it is given: `12.5 partition A B,C`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tools.wifi_emulator.cuts import Pair
from tools.wifi_emulator.medium import Air

_NUMBERS: Final = {
    "rate": "rate_mbit",
    "delay": "delay_ms",
    "jitter": "jitter_ms",
    "loss": "loss_percent",
    "queue": "queue_ms",
}
_SWITCHES: Final = {"shared": "shared", "multicast": "multicast"}
_WORDS: Final = {"on": True, "off": False}


class CommandError(ValueError):
    """What was said is no command; nothing was changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Change parameters of the air, by field name."""

    fields: tuple[tuple[str, float | bool], ...]

    def applied(self, air: Air) -> Air:
        """The changed parameters; CommandError when a value is out of its range."""
        try:
            return dataclasses.replace(air, **dict(self.fields))  # type: ignore[arg-type]  # checked
        except ValueError as error:
            raise CommandError(str(error)) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """Cut these groups from each other, and nothing else."""

    groups: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Cut these directions too."""

    pairs: tuple[Pair, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Heal:
    """Let these directions pass again; None: all."""

    pairs: tuple[Pair, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Say what went over the air so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Take everything down."""


Command = Change | Partition | Cut | Heal | Counts | Stop


def parse_command(text: str, stations: Sequence[str]) -> Command:
    """Read one command; CommandError says what is wrong with it."""
    word, *rest = text.split() or [""]
    match word:
        case "set" if rest:
            return Change(fields=tuple(_setting(each) for each in rest))
        case "partition" if rest:
            return Partition(groups=_groups(rest, stations))
        case "cut":
            return Cut(pairs=_pairs(rest, stations))
        case "heal":
            return Heal(pairs=_pairs(rest, stations) if rest else None)
        case "counts" if not rest:
            return Counts()
        case "stop" if not rest:
            return Stop()
    raise CommandError(f"{text!r} is no command: set, partition, cut, heal, counts or stop")


def parse_script(text: str, stations: Sequence[str]) -> tuple[tuple[float, Command], ...]:
    """Read a script: second and command, in order of time; CommandError names the line."""
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        said = line.partition("#")[0].strip()
        if not said:
            continue
        when, _, rest = said.partition(" ")
        try:
            at_s = float(when)
            entries.append((at_s, parse_command(rest, stations)))
        except ValueError as error:
            raise CommandError(f"line {number}: {error}") from error
        if not at_s >= 0:
            raise CommandError(f"line {number}: {when} is not a time")
    return tuple(sorted(entries, key=lambda entry: entry[0]))


def _setting(text: str) -> tuple[str, float | bool]:
    name, _, value = text.partition("=")
    if name in _SWITCHES and value in _WORDS:
        return _SWITCHES[name], _WORDS[value]
    if name in _NUMBERS:
        try:
            return _NUMBERS[name], float(value)
        except ValueError as error:
            raise CommandError(f"{name} needs a number, not {value!r}") from error
    known = ", ".join([*_NUMBERS, *(f"{switch}=on|off" for switch in _SWITCHES)])
    raise CommandError(f"{text!r} sets nothing: {known}")


def _groups(words: Sequence[str], stations: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The groups named, and whoever is named nowhere as one more."""
    groups = [tuple(_known(name, stations) for name in word.split(",")) for word in words]
    named = [name for group in groups for name in group]
    if len(set(named)) != len(named):
        raise CommandError("a station is in two groups")
    rest = tuple(station for station in stations if station not in named)
    return tuple([*groups, rest] if rest else groups)


def _pairs(words: Sequence[str], stations: Sequence[str]) -> tuple[Pair, ...]:
    if len(words) == 1 and ">" in words[0]:
        sender, _, receiver = words[0].partition(">")
        ordered = [(sender, receiver)]
    elif len(words) == 2:
        ordered = [(words[0], words[1]), (words[1], words[0])]
    else:
        raise CommandError("name two stations, as A B, or one direction, as A>B")
    pairs = tuple((_known(one, stations), _known(other, stations)) for one, other in ordered)
    if any(one == other for one, other in pairs):
        raise CommandError("a station always hears itself")
    return pairs


def _known(name: str, stations: Sequence[str]) -> str:
    if name not in stations:
        raise CommandError(f"there is no station {name!r}: {', '.join(stations)}")
    return name
