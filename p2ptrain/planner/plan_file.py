"""A plan that a person asks for: stages with their devices and numbers of segments, checked.

`[[stage]]` tables with `devices`, a list of names, and `segments`, a number; `schedule` above them.
"""

from __future__ import annotations

import difflib
import tomllib
from typing import Any

from p2ptrain.errors import ConfigError, PlanInfeasible
from p2ptrain.planner.arrangement import Arrangement, Cuts, Groups
from p2ptrain.planner.cutting import bottleneck_cuts
from p2ptrain.planner.explore import Candidate, Explorer
from p2ptrain.planner.pricing import Pricing, spans
from p2ptrain.schedule.actions import SCHEDULES
from p2ptrain.units import format_bytes


def forced_candidate(text: str, *, file: str, explorer: Explorer, pricing: Pricing) -> Candidate:
    """The candidate that the file describes, priced.

    Raises:
        ConfigError: not TOML, an unknown device, or stages that do not cover the model.
        PlanInfeasible: it does not fit; the hint names cuts of the same stages that do, if any.
    """
    schedule, groups, counts = _read(text, file, pricing)
    arrangement = pricing.arrange(groups, schedule)
    if arrangement is None:
        raise PlanInfeasible(
            f"{file}: a replica is so slow that it gets no microbatch",
            hint="use more microbatches, or leave the slowest device of a stage out",
        )
    ends = [sum(counts[: index + 1]) for index in range(len(counts))]
    cuts = tuple(ends)
    _check_memory(pricing, arrangement, cuts, file)
    candidate = explorer.candidate(arrangement, cuts)
    if not explorer.admits(candidate.price):
        raise PlanInfeasible(
            f"{file}: this plan breaks the deadline, the joules or a battery",
            hint="leave --plan out: the planner looks for one that keeps them",
        )
    return candidate


def _read(text: str, file: str, pricing: Pricing) -> tuple[str, Groups, list[int]]:
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{file} is not TOML: {error}", hint="see README, plan") from error
    schedule, stages = document.get("schedule", "1f1b"), document.get("stage")
    if schedule not in SCHEDULES:
        raise ConfigError(
            f"{file}: unknown schedule {str(schedule)!r:.40}",
            hint=f"choose one of: {', '.join(SCHEDULES)}",
        )
    if not isinstance(stages, list) or not stages or not all(isinstance(s, dict) for s in stages):
        raise ConfigError(f"{file} has no stages", hint="begin each with a line: [[stage]]")
    groups = tuple(_devices(s, f"{file}: stage {i}", pricing) for i, s in enumerate(stages))
    everyone = [device for group in groups for device in group]
    for device in everyone:
        if everyone.count(device) > 1:
            name = pricing.devices[device].id
            raise ConfigError(f"{file}: {name} is named twice", hint="give it one stage")
    return str(schedule), groups, _counts(stages, file, pricing.segment_count)


def _devices(stage: dict[str, Any], label: str, pricing: Pricing) -> tuple[int, ...]:  # Any: TOML
    names = stage.get("devices")
    known = [str(device.id) for device in pricing.devices]
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise ConfigError(f"{label} needs devices", hint='devices = ["laptop"]')
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"devices: {', '.join(known)}"
            raise ConfigError(f"{label}: there is no device {name!r:.40}", hint=hint)
    return tuple(sorted(known.index(name) for name in names))


def _counts(stages: list[dict[str, Any]], file: str, wanted: int) -> list[int]:  # Any: TOML
    counts = [stage.get("segments") for stage in stages]
    good = [n for n in counts if isinstance(n, int) and not isinstance(n, bool) and n >= 1]
    if len(good) != len(counts):
        index = next(i for i, n in enumerate(counts) if n not in good)
        raise ConfigError(
            f"{file}: stage {index} needs a number of segments, at least 1", hint="segments = 4"
        )
    if sum(good) != wanted:
        last = good[-1] + wanted - sum(good)
        near = f"the last stage would have to take {last}" if last >= 1 else "take some away"
        raise ConfigError(
            f"{file}: the stages have {sum(good)} segments, the model has {wanted}",
            hint=f"{near}; p2ptrain bundle info lists them",
        )
    return good


def _check_memory(pricing: Pricing, arrangement: Arrangement, cuts: Cuts, file: str) -> None:
    for stage, (first, end) in enumerate(spans(cuts)):
        for replica in arrangement.stages[stage]:
            needs = pricing.memory_bytes(first, end, replica.holds)
            device = pricing.devices[replica.device]
            if needs > device.profile.memory_bytes:
                has = format_bytes(device.profile.memory_bytes)
                raise PlanInfeasible(
                    f"{file}: stage {stage} needs {format_bytes(needs)} on {device.id}, "
                    f"which has {has}",
                    hint=_nearest(pricing, arrangement),
                )


def _nearest(pricing: Pricing, arrangement: Arrangement) -> str:
    cuts = bottleneck_cuts(pricing, arrangement)
    if cuts is None:
        return "no cut of these stages fits; leave --plan out to see what does"
    counts = ", ".join(str(end - first) for first, end in spans(cuts))
    return f"these stages fit with {counts} segments"
