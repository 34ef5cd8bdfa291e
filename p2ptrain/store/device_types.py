"""Descriptions of common devices that come with p2ptrain, one TOML file each."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import p2ptrain


def device_types() -> dict[str, dict[str, Any]]:  # Any: TOML values, checked by who uses them
    """The described types by name: `raspberry-pi-5` and so on."""
    folder = Path(p2ptrain.__file__).parent / "devices"
    return {
        path.stem: tomllib.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*.toml"))
    }
