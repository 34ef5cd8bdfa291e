"""Read a Jetson's INA3221 power sensors (JetPack 5 and later), found by their labels.

The carrier board is outside what they measure. Channel 7 is the sum of the shunts, and `NC`
channels are not connected.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from p2ptrain.power.sysfs import directories, read_integer, read_text

TOTAL_LABELS: Final = ("VDD_IN", "POM_5V_IN")
"""One rail that feeds the whole module."""
FED_BY: Final = {"VDDQ_VDD2_1V8AO": "VIN_SYS_5V0"}
"""AGX Orin: a rail behind another one, which must not be added to it."""
SUM_CHANNEL: Final = 7

_LABEL: Final = re.compile(r"in(\d)_label\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rail:
    """One measured supply: its label, and the files that hold its mV and mA."""

    label: str
    millivolts: Path
    milliamperes: Path

    def watts(self) -> float | None:
        """Power at present; None when a file cannot be read."""
        millivolts = read_integer(self.millivolts)
        milliamperes = read_integer(self.milliamperes)
        if millivolts is None or milliamperes is None:
            return None
        return millivolts * milliamperes / 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class JetsonRails:
    """The rails that add up to the module, or to what of it is measured."""

    rails: tuple[Rail, ...]
    scope: str

    @property
    def source(self) -> str:
        return f"INA3221 {' + '.join(rail.label for rail in self.rails)}, without carrier board"

    def watts(self) -> float | None:
        """Power of all rails; None when one of them cannot be read."""
        total = 0.0
        for rail in self.rails:
            watts = rail.watts()
            if watts is None:
                return None
            total += watts
        return total


def find_jetson_rails(root: Path = Path("/")) -> JetsonRails | None:
    """The sensors of this machine; None when it has no readable ones."""
    rails = [
        rail
        for sensor in directories(root / "sys/class/hwmon")
        if read_text(sensor / "name") == "ina3221"
        for rail in _rails(sensor)
        if rail.watts() is not None
    ]
    whole = [rail for rail in rails if rail.label in TOTAL_LABELS]
    if whole:
        return JetsonRails(rails=(whole[0],), scope="board")
    labels = {rail.label for rail in rails}
    apart = tuple(rail for rail in rails if FED_BY.get(rail.label) not in labels)
    return JetsonRails(rails=apart, scope="soc") if apart else None


def _rails(sensor: Path) -> list[Rail]:
    rails = []
    for path in sorted(sensor.glob("in*_label")):
        match, label = _LABEL.match(path.name), read_text(path)
        if match is None or not label or "NC" in label or int(match[1]) == SUM_CHANNEL:
            continue
        rails.append(
            Rail(
                label=label,
                millivolts=sensor / f"in{match[1]}_input",
                milliamperes=sensor / f"curr{match[1]}_input",
            )
        )
    return rails
