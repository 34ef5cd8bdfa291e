"""Plans that could follow when members are lost, leave or join, with as little moved as can be.

Stages of which a peer stays keep their segments; of replicas those that are left go on with the
lost one's microbatches; shards stay as they are while all of them do. A lost stage goes whole to a
member in reserve, or to the stage before or after it. Which candidate is taken follows from the
predicted step time, and from whether the states can be restored for it (`recovery.planning`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from p2ptrain.ids import DeviceId, ViewNumber, short
from p2ptrain.planner.keepers import data_holders, replica_keepers
from p2ptrain.planner.plan import Plan, StagePlan, is_sharded

CANDIDATES_MAX: Final = 256
"""Placements that are priced; with more losses at once than that allows, the first ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Stages that fit their devices, with the predicted time of a step."""

    stages: tuple[StagePlan, ...]
    step_ns: int
    step_uj: int | None = None
    """Predicted microjoules of a step, where they are known."""


Peers = tuple[DeviceId, ...]
"""Of one stage, by rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """A stage as it shall be."""

    devices: Peers
    weights: tuple[int, ...]
    """By rank: parts of a step's microbatches."""
    segments: range


Place = Callable[[Sequence[Wish]], Placement | None]
"""Prices stages in order; None: they do not fit, or a device's costs are unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Succession:
    """Who can take part in the next view, and what is known of the data."""

    base: Plan
    usable: Collection[DeviceId]
    """Members of the next view: those that stay, and those that join (without a stage unless one
    is lost). Whoever leaves is not among them, even if it still answers."""
    holding: Collection[DeviceId]
    """Devices with a copy of the run's data."""
    reason: str
    """Why there is a new view, for the plan's reasons."""


def successor_plans(succession: Succession, place: Place) -> tuple[Plan, ...]:
    """Candidate next plans, the shortest step first; empty: none fits or the data is missing.

    Ties go to the lower devices, so equal inputs give equal plans.
    """
    home, base = _home(succession), succession.base
    if home is None:
        return ()
    if is_sharded(base) and set(base.stages[0].devices) <= set(succession.usable):
        unchanged = Placement(stages=base.stages, step_ns=base.step_ns, step_uj=base.step_uj)
        return (_plan(succession, home, unchanged),)
    found = []
    for owners in itertools.islice(_assignments(succession), CANDIDATES_MAX):
        placement = place(_wishes(succession.base, owners))
        if placement is not None:
            devices = tuple(stage.devices for stage in placement.stages)
            found.append((placement.step_ns, devices, placement))
    found.sort(key=lambda each: each[:2])
    return tuple(_plan(succession, home, placement) for _, _, placement in found)


def following_plan(
    succession: Succession, spans: Sequence[tuple[DeviceId, range]], place: Place
) -> Plan | None:
    """The plan with these stages of one peer each; None where they do not fit or the data is
    missing."""
    wishes = [Wish(devices=(device,), weights=(1,), segments=own) for device, own in spans]
    home, placement = _home(succession), place(wishes)
    return None if home is None or placement is None else _plan(succession, home, placement)


def _home(succession: Succession) -> DeviceId | None:
    """Who feeds the next view: as before if it can, else another holder unless the data stays."""
    base = succession.base
    holding = set(succession.usable) & set(succession.holding)
    if base.home in holding:
        return base.home
    if base.keep_data_here:
        return None
    known = [device for device in base.holders if device in holding]
    return next(iter([*known, *sorted(holding)]), None)


def _assignments(succession: Succession) -> Iterator[tuple[Peers, ...]]:
    """For every stage of the base, the peers that take its segments; each has one range."""
    usable = set(succession.usable)
    kept = [_left(stage, usable) for stage in succession.base.stages]
    staying = {device for peers in kept if peers is not None for device in peers}
    reserves = [(device,) for device in sorted(usable - staying)]
    yield from _extended((), kept, reserves, private=succession.base.private)


def _left(stage: StagePlan, usable: Collection[DeviceId]) -> Peers | None:
    """Who goes on with a stage; None: nobody can. Shards need each other."""
    left = tuple(device for device in stage.devices if device in usable)
    whole = not stage.is_sharded or len(left) == len(stage.devices)
    return left if left and whole else None


def _extended(
    taken: tuple[Peers, ...],
    kept: Sequence[Peers | None],
    reserves: Sequence[Peers],
    *,
    private: bool,
) -> Iterator[tuple[Peers, ...]]:
    index = len(taken)
    if index == len(kept):
        yield taken
        return
    own = kept[index]
    following = next((peers for peers in kept[index:] if peers is not None), None)
    options = [*taken[-1:], following, *reserves] if own is None else [own]
    for peers in dict.fromkeys(options):
        if peers is not None and not _is_broken((*taken, peers), kept[-1] if private else None):
            yield from _extended((*taken, peers), kept, reserves, private=private)


def _is_broken(taken: Sequence[Peers], owner: Peers | None) -> bool:
    """Whether peers have two ranges; a private run's `owner` may have the last one, too."""
    ranges = [peers for peers, _ in itertools.groupby(taken)]
    if len(ranges) > 1 and ranges[-1] == owner:
        ranges.pop()
    return len(set(ranges)) < len(ranges)


def _wishes(base: Plan, owners: Sequence[Peers]) -> list[Wish]:
    """Consecutive stages of the same peers as one."""
    weights = {
        device: weight
        for stage in base.stages
        for device, weight in zip(stage.devices, stage.weights, strict=True)
    }
    wishes: list[Wish] = []
    for stage, peers in zip(base.stages, owners, strict=True):
        first = stage.first_segment
        if wishes and wishes[-1].devices == peers:
            first = wishes.pop().segments.start
        own = tuple(weights.get(device, 1) for device in peers)
        wishes.append(Wish(devices=peers, weights=own, segments=range(first, stage.segments.stop)))
    return wishes


def _plan(succession: Succession, home: DeviceId, placement: Placement) -> Plan:
    base, members = succession.base, tuple(sorted(set(succession.usable)))
    holders = data_holders(
        home, placement.stages, members, keep_data_here=base.keep_data_here,
        holding=succession.holding,
    )  # fmt: skip
    return replace(
        base,
        view=ViewNumber(base.view + 1),
        members=members,
        home=home,
        holders=holders,
        stages=placement.stages,
        replicas=replica_keepers(
            placement.stages, members, private_home=home if base.private else None
        ),
        step_ns=placement.step_ns,
        step_uj=placement.step_uj,
        reasons=(succession.reason, *_changes(base, placement.stages)),
    )


def _changes(base: Plan, stages: Sequence[StagePlan]) -> Iterator[str]:
    """One sentence for each stage that is not as it was."""
    before = {(stage.devices, stage.segments) for stage in base.stages}
    for index, stage in enumerate(stages):
        if (stage.devices, stage.segments) not in before:
            first, last = stage.first_segment, stage.segments[-1]
            peers = ", ".join(map(short, stage.devices))
            yield f"stage {index} on {peers} now runs segments {first} to {last}"
