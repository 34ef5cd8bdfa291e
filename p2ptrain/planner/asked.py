"""A plan that a person asks for, against the devices that are there and the model: priced, or
refused with the nearest thing that would work."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from p2ptrain import limits
from p2ptrain.errors import ConfigError, PlanInfeasible
from p2ptrain.ids import DeviceId
from p2ptrain.planner.arrangement import Arrangement, Cuts, Groups
from p2ptrain.planner.cutting import bottleneck_cuts
from p2ptrain.planner.explore import Candidate, Explorer, violations
from p2ptrain.planner.kinds import Kind
from p2ptrain.planner.plan_file import AskedPlan, AskedStage
from p2ptrain.planner.pricing import Pricing, spans
from p2ptrain.planner.sharded import Sharded, ShardedPricing, objection
from p2ptrain.planner.shortfall import beyond_asked
from p2ptrain.units import bytes_rounded_up, format_bytes

ID_PART_MIN: Final = 4
"""Characters of a device's id that may stand for all of it."""
NOTHING_FITS: Final = "nothing of this shape fits; leave --plan out to see what does"


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """How people call devices, and why some of them have no part."""

    names: Mapping[DeviceId, str] = field(default_factory=dict)
    """Of devices whose name is not their id."""
    absent: Mapping[DeviceId, str] = field(default_factory=dict)
    """Devices of the group that cannot take part -> why."""

    def is_called(self, device: DeviceId, word: str) -> bool:
        """Whether `word` is its name, or all of its id."""
        return word in (device, self.names.get(device))

    def matches(self, device: DeviceId, word: str) -> bool:
        """Whether somebody who writes `word` may mean this device: where none is called so."""
        begins = len(word) >= ID_PART_MIN and device.startswith(word)
        return begins or self.is_called(device, word)

    def name_of(self, device: DeviceId) -> str:
        return self.names.get(device, device)


def asked_candidate(
    asked: AskedPlan, *, explorer: Explorer, pricing: Pricing, known: Known | None = None
) -> Candidate:
    """The candidate that a person asks for, priced.

    Raises:
        ConfigError: an unknown or absent device, or stages that do not cover the model.
        PlanInfeasible: it does not fit; the hint names cuts of the same stages that do, if any.
    """
    known = known or Known()
    groups = _groups(asked, pricing, known)
    _check_segments(asked, pricing.segment_count)
    first = asked.stages[0]
    if first.split in ("tensor", "sequence"):
        candidate = _sharded(asked, groups[0], explorer, pricing, known)
    else:
        candidate = _arranged(asked, groups, explorer, pricing, known)
    if violations(pricing, pricing.question.objective, candidate.price):
        raise beyond_asked(pricing.question, candidate, file=asked.file, name=known.name_of)
    return candidate


def _groups(asked: AskedPlan, pricing: Pricing, known: Known) -> Groups:
    groups = tuple(
        tuple(_device(name, f"{asked.file}: stage {index}", pricing, known) for name in s.devices)
        for index, s in enumerate(asked.stages)
    )
    everyone = [device for group in groups for device in group]
    for device in everyone:
        if everyone.count(device) > 1:  # by its name and by its id
            name = known.name_of(pricing.devices[device].id)
            raise ConfigError(f"{asked.file}: {name} is named twice", hint="give it one stage")
    return groups


def _device(word: str, label: str, pricing: Pricing, known: Known) -> int:
    found = [i for i, each in enumerate(pricing.devices) if known.is_called(each.id, word)]
    if not found:
        found = [i for i, each in enumerate(pricing.devices) if known.matches(each.id, word)]
    if len(found) == 1:
        return found[0]
    here = [known.name_of(each.id) for each in pricing.devices]
    if found:
        ids = ", ".join(pricing.devices[i].id for i in found)
        raise ConfigError(f"{label}: {len(found)} devices are called {word!r:.40}", hint=ids)
    for device, reason in sorted(known.absent.items()):
        if known.matches(device, word):
            raise ConfigError(
                f"{label}: {word} takes no part: {reason}", hint=f"devices: {', '.join(here)}"
            )
    near = difflib.get_close_matches(word, here, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"devices: {', '.join(here)}"
    raise ConfigError(f"{label}: there is no device {word!r:.40}", hint=hint)


def _check_segments(asked: AskedPlan, wanted: int) -> None:
    counts = [stage.segments for stage in asked.stages]
    if sum(counts) == wanted:
        return
    last = counts[-1] + wanted - sum(counts)
    near = f"the last stage would have to take {last}" if last >= 1 else "take some away"
    raise ConfigError(
        f"{asked.file}: the stages have {sum(counts)} segments, the model has {wanted}",
        hint=f"{near}; p2ptrain bundle info lists them",
    )


def _arranged(
    asked: AskedPlan, groups: Groups, explorer: Explorer, pricing: Pricing, known: Known
) -> Candidate:
    schedules = (asked.schedule,) if asked.schedule else pricing.question.schedules
    weights = tuple(stage.weights for stage in asked.stages)
    if not pricing.may_share and any(len(group) > 1 for group in groups):
        raise PlanInfeasible(
            f"{asked.file}: the model's running statistics are made of all microbatches in order",
            hint="give each stage one device",
        )
    if not pricing.keeps_residuals(groups):
        stage = next(index for index, group in enumerate(groups) if index and len(group) > 1)
        raise PlanInfeasible(
            f"{asked.file}: stage {stage} has replicas, but under the codec int8 only the first "
            "stage may: each would keep what it rounds off to itself, and a checkpoint lacks it",
            hint=f"use --codec bf16 or fp32, or give stage {stage} one device",
        )
    made = [pricing.arrange(groups, schedule, weights) for schedule in schedules]
    arrangements = [arrangement for arrangement in made if arrangement is not None]
    if not arrangements:
        raise _idle_replica(asked, groups, pricing, known)
    ends = [stage.segments for stage in asked.stages]
    cuts = tuple(sum(ends[: index + 1]) for index in range(len(ends)))
    small = [_too_small(pricing, arrangement, cuts, known) for arrangement in arrangements]
    if small[0] is not None and all(small):
        raise PlanInfeasible(f"{asked.file}: {small[0]}", hint=_nearest(pricing, arrangements[0]))
    return explorer.best_of(
        explorer.candidate(arrangement, cuts)
        for arrangement, problem in zip(arrangements, small, strict=True)
        if problem is None
    )


def _idle_replica(
    asked: AskedPlan, groups: Groups, pricing: Pricing, known: Known
) -> PlanInfeasible:
    """Some replica would get no microbatch: which, and how many would do, if a run may have so
    many."""
    for stage, group in zip(asked.stages, groups, strict=True):
        owners = pricing.would_share(group, stage.weights, pricing.microbatches)
        idle = next((rank for rank in range(len(group)) if rank not in owners), None)
        if idle is not None:
            break
    name = known.name_of(pricing.devices[group[idle or 0]].id)
    enough = [
        pricing.would_share(group, stage.weights, limits.MICROBATCHES_MAX)
        for stage, group in zip(asked.stages, groups, strict=True)
    ]
    hint = f"leave {name} out"
    if all(len(set(own)) == len(group) for own, group in zip(enough, groups, strict=True)):
        fewest = 1 + max(own.index(rank) for own in enough for rank in set(own))
        hint = f"use --microbatches {fewest}, or {hint}"
    elif stage.weights is not None:
        hint = f"give {name} a larger weight, or {hint}"
    return PlanInfeasible(
        f"{asked.file}: {name} gets no microbatch of {pricing.microbatches}", hint=hint
    )


def _too_small(pricing: Pricing, arrangement: Arrangement, cuts: Cuts, known: Known) -> str | None:
    """The first stage that its device's memory does not hold."""
    for stage, (first, end) in enumerate(spans(cuts)):
        for replica in arrangement.stages[stage]:
            needs = pricing.memory_bytes(first, end, replica.holds, replica.ranks)
            device = pricing.devices[replica.device]
            if needs > device.profile.memory_bytes:
                return (
                    f"stage {stage} needs {bytes_rounded_up(needs)} on {known.name_of(device.id)}, "
                    f"which has {format_bytes(device.profile.memory_bytes)}"
                )
    return None


def _nearest(pricing: Pricing, arrangement: Arrangement) -> str:
    cuts = bottleneck_cuts(pricing, arrangement)
    if cuts is None:
        return NOTHING_FITS
    counts = ", ".join(str(end - first) for first, end in spans(cuts))
    return f"these stages fit with {counts} segments"


def _sharded(
    asked: AskedPlan, devices: tuple[int, ...], explorer: Explorer, pricing: Pricing, known: Known
) -> Candidate:
    stage = asked.stages[0]
    kind: Kind = "tensor" if stage.split == "tensor" else "sequence"
    against = objection(pricing, kind, len(devices))
    if against is not None:
        raise PlanInfeasible(
            f"{asked.file}: no {kind} sharding because {against}", hint=_instead(stage, pricing)
        )
    sharded = Sharded(kind=kind, devices=devices, weights=stage.weights)
    candidate = explorer.sharded_candidate(sharded)
    for index, needs in zip(devices, candidate.memory_bytes, strict=True):
        has = pricing.devices[index].profile.memory_bytes
        if needs > has:
            raise PlanInfeasible(
                f"{asked.file}: its part needs {bytes_rounded_up(needs)} on "
                f"{known.name_of(pricing.devices[index].id)}, which has {format_bytes(has)}",
                hint=_smaller_part(sharded, pricing),
            )
    return candidate


def _instead(stage: AskedStage, pricing: Pricing) -> str:
    count = len(stage.devices) if stage.segments >= len(stage.devices) else "fewer"
    if pricing.may_share:
        return f'split = "replicas" needs no sharding; nor do {count} stages of one device each'
    return f"{count} stages of one device each need no sharding"


def _smaller_part(sharded: Sharded, pricing: Pricing) -> str:
    """Whether the devices' rooms allow any weights at all: in proportion to them."""
    rooms = [pricing.devices[i].profile.memory_bytes for i in sharded.devices]
    unit = max(1, min(rooms))
    weights = tuple(max(1, room // unit) for room in rooms)
    other = Sharded(kind=sharded.kind, devices=sharded.devices, weights=weights)
    needs = ShardedPricing(pricing).memory_bytes(other)
    if all(need <= room for need, room in zip(needs, rooms, strict=True)):
        return f"weights = {list(weights)} would fit"
    return NOTHING_FITS
