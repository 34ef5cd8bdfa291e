"""A plan as a person writes it: stages with their devices and numbers of segments.

`[[stage]]` tables with `devices`, a list of names, and `segments`, a number; for several devices
also `split` (replicas, tensor or sequence) and `weights`, a list of numbers; `schedule` above them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from p2ptrain import limits
from p2ptrain.errors import ConfigError
from p2ptrain.planner.plan import Split
from p2ptrain.planner.toml_text import known_keys, read_toml, shown
from p2ptrain.schedule.actions import SCHEDULES, delays_gradients, undelayed

SPLITS: Final[dict[str, Split]] = {
    "replicas": "replicas", "tensor": "tensor", "sequence": "sequence",
}  # fmt: skip
WEIGHT_MAX: Final = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedStage:
    """One stage as it was written."""

    devices: tuple[str, ...]
    """Names or ids, by rank."""
    segments: int
    split: Split
    weights: tuple[int, ...] | None
    """By rank; None: after the devices' speeds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedPlan:
    """A plan that agrees with itself; whether it agrees with devices and model, `asked` looks."""

    file: str
    """Where it was read, for messages."""
    schedule: str | None
    """None: as for plans that are searched."""
    stages: tuple[AskedStage, ...]


def read_plan(text: str, *, file: str) -> AskedPlan:
    """The plan that a file describes.

    Raises:
        ConfigError: not TOML, not such tables, or a plan that no device and no model could have.
    """
    document = read_toml(text, file)
    known_keys(document, ("schedule", "stage"), file)
    schedule, stages = document.get("schedule"), document.get("stage")
    if schedule is not None and schedule not in SCHEDULES:
        raise ConfigError(
            f"{file}: unknown schedule {shown(schedule)}",
            hint=f"choose one of: {', '.join(SCHEDULES)}",
        )
    if not isinstance(stages, list) or not stages or not all(isinstance(s, dict) for s in stages):
        raise ConfigError(f"{file} has no stages", hint="begin each with a line: [[stage]]")
    read = [_stage(stage, f"{file}: stage {index}") for index, stage in enumerate(stages)]
    asked = AskedPlan(
        file=file,
        schedule=None if schedule is None else str(schedule),
        stages=tuple(read),
    )
    _check_stages(asked)
    return asked


def _stage(stage: dict[str, Any], label: str) -> AskedStage:  # Any: TOML
    known_keys(stage, ("devices", "segments", "split", "weights"), label)
    names, segments = stage.get("devices"), stage.get("segments")
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise ConfigError(f"{label} needs devices", hint='devices = ["laptop"]')
    if not _is_count(segments, limits.SEGMENTS_MAX):
        raise ConfigError(
            f"{label} needs a number of segments, 1 to {limits.SEGMENTS_MAX}", hint="segments = 4"
        )
    return AskedStage(
        devices=tuple(names),
        segments=int(str(segments)),
        split=_split(stage.get("split"), len(names), label),
        weights=_weights(stage.get("weights"), len(names), label),
    )


def _split(given: object, devices: int, label: str) -> Split:
    if given is None:
        return "replicas" if devices > 1 else "none"
    if not isinstance(given, str) or given not in SPLITS:
        raise ConfigError(
            f"{label}: unknown split {shown(given)}", hint=f"choose one of: {', '.join(SPLITS)}"
        )
    if devices < 2:
        raise ConfigError(
            f"{label}: one device has nobody to share the stage with",
            hint="name another device, or leave split out",
        )
    return SPLITS[given]


def _weights(given: object, devices: int, label: str) -> tuple[int, ...] | None:
    if given is None:
        return None
    if not isinstance(given, list) or not all(_is_count(w, WEIGHT_MAX) for w in given):
        raise ConfigError(
            f"{label}: weights are whole numbers from 1 to {WEIGHT_MAX}", hint="weights = [3, 1]"
        )
    if len(given) != devices:
        raise ConfigError(
            f"{label} has {devices} devices and {len(given)} weights", hint="one weight per device"
        )
    return tuple(given)


def _is_count(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _check_stages(asked: AskedPlan) -> None:
    everyone = [name for stage in asked.stages for name in stage.devices]
    for name in everyone:
        if everyone.count(name) > 1:
            raise ConfigError(f"{asked.file}: {name} is named twice", hint="give it one stage")
    sharded = [s for s in asked.stages if s.split in ("tensor", "sequence")]
    if sharded and len(asked.stages) > 1:
        raise ConfigError(
            f"{asked.file}: devices that share a model by {sharded[0].split} share all of it",
            hint='write one stage with all segments, or split = "replicas"',
        )
    shared = any(stage.split != "none" for stage in asked.stages)
    if shared and asked.schedule is not None and delays_gradients(asked.schedule):
        raise ConfigError(
            f"{asked.file}: {asked.schedule} is no schedule of stages that several devices share",
            hint=f'schedule = "{undelayed(asked.schedule)}"',
        )
