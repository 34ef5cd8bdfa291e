"""Search all kinds of plan for the best one; deterministic, bounded by counts, never by a clock.

One way for small and large questions. Per kind: groupings are arranged and cut at their
bottleneck; from the lowest lower bound upwards, cuts around it are collected; then candidates are
simulated from the lowest bound upwards until no bound is below the best found, or a budget ends.
For few devices and segments nothing is dropped before that, so the best is found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from p2ptrain.ids import DeviceId
from p2ptrain.planner.arrangement import Arrangement, Cuts, Groups
from p2ptrain.planner.cutting import bottleneck_cuts, cuts_around
from p2ptrain.planner.ends import private_objection
from p2ptrain.planner.groupings import groupings, subsets, tries_every_way
from p2ptrain.planner.kinds import EXACT_KINDS, KINDS, Kind
from p2ptrain.planner.neighbours import neighbours
from p2ptrain.planner.objective import Objective
from p2ptrain.planner.pricing import Price, Pricing, spans
from p2ptrain.planner.sharded import Sharded, ShardedPricing, objection
from p2ptrain.schedule.actions import undelayed

CUTS_MAX: Final = 4_000
"""Of one kind and schedule: cuts that are bounded. Four devices and ten segments have 2,500."""
WORK_MAX: Final = 20_000
"""Of one kind and schedule: stages times segments of the beams. Four devices and ten segments have
3,000."""
ACTIONS_MAX: Final = 200_000
"""Of one kind, all schedules: actions that are simulated. Four devices, ten segments and eight
microbatches have 175,000 under each."""
NEARBY_MAX: Final = 20_000
"""Of pipelines of many devices around the likeliest one, all schedules: stages times segments and
microbatches."""
UNLIMITED: Final = 1 << 62

_Preference = tuple[int, int, int, bool, int, int, tuple[int, ...], Cuts]
_Start = tuple[bool, int, Arrangement, Cuts]
"""Whether the limits rule it out, lower bound of the value."""
_Bounded = tuple[int, int, Cuts, Arrangement]
"""Lower bound of the value, number of the arrangement, cuts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One complete plan with its price."""

    kind: Kind
    schedule: str
    """Empty where there is none."""
    price: Price
    memory_bytes: tuple[int, ...]
    """By share."""
    arrangement: Arrangement | None = None
    cuts: Cuts = ()
    weights: tuple[int, ...] = ()
    """By share, under tensor and sequence parallelism: parts of the units of every axis."""

    @property
    def devices(self) -> tuple[int, ...]:
        return tuple(share.device for share in self.price.shares)


@dataclass(slots=True, kw_only=True)
class Found:
    """What a search found."""

    best: Candidate | None = None
    by_kind: dict[Kind, Candidate] = field(default_factory=dict)
    with_device: dict[int, Candidate] = field(default_factory=dict)
    """The best candidate that each device takes part in."""
    objections: dict[Kind, str] = field(default_factory=dict)
    """Why there is none of a kind."""
    priced_count: int = 0


class Explorer:
    """One search over one question."""

    def __init__(self, pricing: Pricing) -> None:
        self._pricing = pricing
        self._objective = pricing.question.objective
        self._found = Found()
        self._sharding = ShardedPricing(pricing)
        self._near: list[Candidate] = []
        self._has_limits = self._objective.has_limits or any(
            device.battery_uj is not None for device in pricing.devices
        )

    def run(self) -> Found:
        """Search once."""
        question = self._pricing.question
        for kind in [kind for kind in KINDS if kind in question.kinds]:
            if question.private and kind not in EXACT_KINDS:
                self._found.objections[kind] = "the first and the last stage stay with the data"
                continue
            if kind in ("tensor", "sequence"):
                self._sharded(kind)
                continue
            self._arranged(kind)
        found = self._found
        near = [one for one in self._near if self.value(one.price) <= self._limit()]
        found.best = min(near, key=self._preference, default=None)
        return found

    def feasible(self) -> bool:
        """Whether memory holds any plan of these kinds, without looking for the best."""
        question = self._pricing.question
        for kind in question.kinds:
            if question.private and kind not in EXACT_KINDS:
                continue
            if kind in ("tensor", "sequence"):
                if self._against_sharding(kind) is None and any(self._fitting_shards(kind)):
                    return True
                continue
            for groups in groupings(self._pricing, kind):
                arrangement = self._pricing.arrange(groups, question.schedules[0])
                if arrangement and bottleneck_cuts(self._pricing, arrangement) is not None:
                    return True
        return False

    def value(self, price: Price) -> int:
        """What the objective minimises."""
        return price.step_ns if self._objective.goal == "time" else price.total_uj

    def admits(self, price: Price) -> bool:
        """Whether a price is within deadline, joules and batteries."""
        return not violations(self._pricing, self._objective, price)

    def best_of(self, candidates: Iterable[Candidate]) -> Candidate:
        """The best of some that one plan is; what counts as equal is as for plans of one's own."""
        priced = list(candidates)
        least = min(self.value(candidate.price) for candidate in priced)
        near = [one for one in priced if self.value(one.price) <= self._about(least)]
        return min(near, key=self._preference)

    def _schedules(self, kind: Kind) -> tuple[str, ...]:
        """Of those that are asked for, the ones that make a difference."""
        asked = self._pricing.question.schedules
        if kind == "hybrid":
            return tuple(dict.fromkeys(map(undelayed, asked)))
        return asked if kind == "pipeline" else asked[:1]

    def _arranged(self, kind: Kind) -> None:
        schedules = self._schedules(kind)
        named: set[int] = set()
        fitting = False
        for schedule in reversed(schedules):  # the quickest tends to be last, and bounds others
            bounded, fits = self._under(kind, schedule, len(schedules))
            self._with_each_device(bounded, named)
            fitting = fitting or fits
        if kind not in self._found.by_kind:
            self._found.objections.setdefault(kind, self._why_none(kind, fitting))

    def _under(self, kind: Kind, schedule: str, schedules: int) -> tuple[list[_Bounded], bool]:
        """Consider the best of what has this schedule, one of so many; what is within the limits,
        and whether memory holds any of it."""
        pricing = self._pricing
        found = (self._start(groups, schedule) for groups in groupings(pricing, kind))
        first = [start for start in found if start is not None]
        if kind == "pipeline" and not pricing.question.private:
            first += self._nearby(first, schedule, NEARBY_MAX // schedules)
        starts = [(*start[:2], index, *start[2:]) for index, start in enumerate(first)]
        starts.sort(key=lambda each: each[:3])
        bounded: list[_Bounded] = []
        spent = 0
        for _, _, index, arrangement, middle in starts:
            if len(bounded) >= CUTS_MAX or spent >= WORK_MAX:
                break
            spent += len(middle) * pricing.segment_count
            for cuts in cuts_around(pricing, arrangement, middle):
                if not self._beyond(arrangement, cuts):
                    bounded.append((self._bound(arrangement, cuts), index, cuts, arrangement))
        bounded.sort(key=lambda each: each[:3])
        actions = 0
        for bound, _, cuts, arrangement in bounded:
            if bound > self._limit(kind) or actions > ACTIONS_MAX // schedules:
                break
            actions += arrangement.action_count
            self._consider(self.candidate(arrangement, cuts))
        return bounded, bool(starts)

    def _start(self, groups: Groups, schedule: str) -> _Start | None:
        """Groups cut at their bottleneck; None where they fit nowhere."""
        arrangement = self._pricing.arrange(groups, schedule)
        cuts = None if arrangement is None else bottleneck_cuts(self._pricing, arrangement)
        if arrangement is None or cuts is None:
            return None
        return self._beyond(arrangement, cuts), self._bound(arrangement, cuts), arrangement, cuts

    def _nearby(self, likely: Sequence[_Start], schedule: str, work_max: int) -> list[_Start]:
        """Of many devices: from the likeliest pipeline moves to a better one, until there is none.

        Likely orders know nothing of links, nor of memory that only some segments need.
        """
        pricing = self._pricing
        if not likely or tries_every_way(pricing, "pipeline"):
            return []
        stages, most = pricing.question.stages, pricing.segment_count
        tried = {start[2].groups for start in likely}
        best, found, spent = min(likely, key=_by_bound), list[_Start](), 0
        better = True
        while better and spent < work_max:
            better = False
            for groups in neighbours(best[2].groups, len(pricing.devices)):
                count = len(groups)
                if spent >= work_max or groups in tried or count > most:
                    continue
                if stages not in (None, count):
                    continue
                tried.add(groups)
                spent += count * (most + pricing.microbatches)
                start = self._start(groups, schedule)
                if start is not None:
                    found.append(start)
            nearest = min((best, *found), key=_by_bound)
            better, best = nearest is not best, nearest
        return found

    def _with_each_device(self, bounded: Sequence[_Bounded], named: set[int]) -> None:
        """Price the most promising candidate with each device that is not named yet, so that its
        loss can be."""
        for _, _, cuts, arrangement in bounded:
            if not named.issuperset(arrangement.devices):
                named.update(arrangement.devices)
                self._consider(self.candidate(arrangement, cuts))

    def candidate(self, arrangement: Arrangement, cuts: Cuts) -> Candidate:
        """The priced candidate of an arrangement and its cuts."""
        pricing = self._pricing
        memory = tuple(
            pricing.memory_bytes(first, end, replica.holds, replica.ranks)
            for replicas, (first, end) in zip(arrangement.stages, spans(cuts), strict=True)
            for replica in replicas
        )
        return Candidate(
            kind=arrangement.kind,
            schedule=arrangement.schedule,
            price=pricing.price(arrangement, cuts),
            memory_bytes=memory,
            arrangement=arrangement,
            cuts=cuts,
        )

    def sharded_candidate(self, sharded: Sharded) -> Candidate:
        """The priced candidate of devices that share all segments, where nothing is against it."""
        return Candidate(
            kind=sharded.kind,
            schedule="",
            price=self._sharding.price(sharded),
            memory_bytes=self._sharding.memory_bytes(sharded),
            weights=self._sharding.weights(sharded),
        )

    def _sharded(self, kind: Kind) -> None:
        against = self._against_sharding(kind)
        if against is not None:
            self._found.objections[kind] = against
            return
        fitting = False
        for sharded in self._fitting_shards(kind):
            fitting = True
            self._consider(self.sharded_candidate(sharded))
        if kind not in self._found.by_kind:
            self._found.objections[kind] = self._why_none(kind, fitting)

    def _against_sharding(self, kind: Kind) -> str | None:
        if self._pricing.question.stages not in (None, 1):
            return "it has one stage"
        if len(self._pricing.devices) < 2:
            return "it takes two devices"
        return objection(self._pricing, kind, 2)

    def _fitting_shards(self, kind: Kind) -> Iterator[Sharded]:
        """Devices that could share every segment, and whose memory holds their parts."""
        pricing = self._pricing
        for devices in subsets(pricing):
            if objection(pricing, kind, len(devices)) is None:
                sharded = Sharded(kind=kind, devices=devices)
                rooms = [pricing.devices[i].profile.memory_bytes for i in devices]
                if all(map(int.__le__, self._sharding.memory_bytes(sharded), rooms)):
                    yield sharded

    def _consider(self, candidate: Candidate) -> None:
        found, price = self._found, candidate.price
        found.priced_count += 1
        if not self.admits(price):
            return
        if self.value(price) <= self._limit():
            self._near.append(candidate)
        known = found.by_kind.get(candidate.kind)
        if known is None or self._order(candidate) < self._order(known):
            found.by_kind[candidate.kind] = candidate
        for device in candidate.devices:
            other = found.with_device.get(device)
            if other is None or self._order(candidate) < self._order(other):
                found.with_device[device] = candidate

    def _limit(self, kind: Kind | None = None) -> int:
        """Values up to this count as equal to the best found so far, of a kind or of all."""
        best = [self._found.by_kind.get(each) for each in (KINDS if kind is None else (kind,))]
        values = [self.value(each.price) for each in best if each is not None]
        if not values:
            return UNLIMITED
        return self._about(min(values))

    def _about(self, value: int) -> int:
        return value + value * self._pricing.question.equal_per_mille // 1000

    def _bound(self, arrangement: Arrangement, cuts: Cuts) -> int:
        """No candidate of these cuts has a lower value."""
        pricing = self._pricing
        step_ns = pricing.bound_ns(arrangement, cuts)
        if self._objective.goal == "time":
            return step_ns
        return pricing.total(step_ns, pricing.shares(arrangement, cuts)).total_uj

    def _beyond(self, arrangement: Arrangement, cuts: Cuts) -> bool:
        """Whether limits rule these cuts out before they are simulated, which leaves the budget to
        those that are slower, or hungrier, but within."""
        if not self._has_limits:
            return False
        pricing = self._pricing
        step_ns = pricing.bound_ns(arrangement, cuts)
        floor = pricing.total(step_ns, pricing.shares(arrangement, cuts))
        return not self.admits(floor)

    def _order(self, one: Candidate) -> tuple[int, _Preference]:
        """The lowest value; among equals what is preferred."""
        return self.value(one.price), self._preference(one)

    def _preference(self, one: Candidate) -> _Preference:
        """Fewer devices, the simpler kind, the first schedule, home first, the lower value."""
        price, home = one.price, self._pricing.question.home
        other = price.total_uj if self._objective.goal == "time" else price.step_ns
        away = home is not None and self._pricing.devices[one.devices[0]].id != home
        return (
            len(price.shares), KINDS.index(one.kind), self._rank(one.schedule), away,
            self.value(price), other, one.devices, one.cuts,
        )  # fmt: skip

    def _rank(self, schedule: str) -> int:
        asked = self._pricing.question.schedules
        return asked.index(schedule) if schedule in asked else 0

    def _why_none(self, kind: Kind, fitting: bool) -> str:
        if fitting:
            return "none is within deadline, joules and batteries"
        if self._pricing.question.private and kind == "pipeline":
            against = private_objection(self._pricing.question.manifest)
            if against is not None:
                return against
        if kind == "hybrid" and len(self._pricing.devices) < 3:
            return "it takes three devices"
        if kind != "one device" and len(self._pricing.devices) < 2:
            return "it takes two devices"
        if kind in ("pipeline", "hybrid") and self._pricing.segment_count < 2:
            return "the model has one segment"
        if kind in ("data", "hybrid") and not self._pricing.may_share:
            return "the model's running statistics are made of all microbatches in order"
        stages = self._pricing.question.stages
        if stages is not None and stages > 1 and kind in ("one device", "data"):
            return "it has one stage"
        if kind == "hybrid" and self._pricing.question.contract.codec == "int8":
            return "none fits the memory whose first stage alone has replicas, as int8 needs it"
        return "none fits the memory"


def _by_bound(start: _Start) -> tuple[bool, int]:
    return start[:2]


def violations(pricing: Pricing, objective: Objective, price: Price) -> list[tuple[str, DeviceId]]:
    """Which limits a price breaks: deadline, joules, or battery with the device."""
    steps = pricing.question.steps
    found = []
    if objective.deadline_ns is not None and price.step_ns * steps > objective.deadline_ns:
        found.append(("deadline", DeviceId("")))
    if objective.joules_uj is not None and price.total_uj * steps > objective.joules_uj:
        found.append(("joules", DeviceId("")))
    used: Counter[int] = Counter()
    for share, share_uj in zip(price.shares, price.device_uj, strict=True):
        used[share.device] += share_uj
    for index, used_uj in used.items():
        device = pricing.devices[index]
        if device.battery_uj is not None and used_uj * steps > device.battery_uj:
            found.append(("battery", device.id))
    return found
