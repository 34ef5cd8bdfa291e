"""What a candidate costs in time, joules and bytes: the planner's cost model, integers only.

A step is the simulated schedule, then whatever of the all-reduces does not fit beside the last
backward, square sums, the commit and the update of the parameters as far as no fill hides them
(`schedule.step_end`), and the processor time of replica sets. Energy counts the
devices that take part: idle watts for the whole step, busy watts above them while they compute,
joules per byte at both ends. What the data holder feeds is small and not counted.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from p2ptrain.bundle.shard_traffic import CollectiveCost
from p2ptrain.ids import DeviceId
from p2ptrain.planner.arrangement import Arrangement, Cuts, Groups, Hop, Replica
from p2ptrain.planner.input import SAME_HOST_BYTES_PER_S, LinkEstimate
from p2ptrain.planner.lines import Interfaces
from p2ptrain.planner.links import LinkTable
from p2ptrain.planner.question import Question
from p2ptrain.planner.replica_interval import (
    SET_NS_PER_BYTE,
    ReplicaInterval,
    StageCosts,
    replica_interval,
)
from p2ptrain.planner.segment_costs import model_costs
from p2ptrain.planner.step_ends import StepEnds
from p2ptrain.planner.traffic import all_reduce_bytes, collective_ns
from p2ptrain.schedule.actions import (
    Action,
    Held,
    delayed_microbatches,
    delays_gradients,
    held,
    undelayed,
)
from p2ptrain.schedule.replicated import (
    Owners,
    Passage,
    ReplicatedTimeline,
    ReplicaTimes,
    owners_by_weight,
    play,
    replicated_actions,
    shared_out,
)
from p2ptrain.schedule.step_end import PeerEnd
from p2ptrain.units import NS_PER_S


class SegmentTimes(NamedTuple):
    """Prefix sums over segments of what a device takes: forwards, backwards, their two parts, and
    what ends a step."""

    forward_ns: tuple[int, ...]
    backward_ns: tuple[int, ...]
    cotangents_ns: tuple[int, ...]
    gradients_ns: tuple[int, ...]
    norm_ns: tuple[int, ...]
    update_ns: tuple[int, ...]

    @property
    def pass_ns(self) -> int:
        """One microbatch forward and backward through the whole model."""
        return self.forward_ns[-1] + self.backward_ns[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One device's part in a candidate, per step."""

    device: int
    stage: int
    microbatches: int
    passes_ns: int
    """All forwards and backwards: what a stage tells of a step."""
    compute_ns: int
    """Square sums, the update and copies for replica sets, too."""
    sent_bytes: int
    moved_bytes: int
    """Sent and received."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What one step of a candidate costs."""

    step_ns: int
    device_uj: tuple[int, ...]
    """By share: total joules of the step."""
    shares: tuple[Share, ...]
    marginal_uj: int
    """Above idle, all devices."""

    @property
    def total_uj(self) -> int:
        return sum(self.device_uj)

    @property
    def sent_bytes(self) -> int:
        return sum(share.sent_bytes for share in self.shares)


class Pricing:
    """Prices arrangements and cuts; remembers what it has asked and computed."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.devices = tuple(sorted(question.devices, key=lambda device: device.id))
        self.costs = model_costs(question.manifest, question.contract)
        self.segment_count = len(question.manifest.segments)
        self.microbatches = question.contract.microbatches
        self._kinds = tuple(segment.kind for segment in question.manifest.segments)
        self._links = LinkTable(question.links)
        profiles = [device.profile for device in self.devices]
        self._interfaces = Interfaces(profiles, self._links)
        self._memory: dict[tuple[int, int, Held], int] = {}
        self._longest: dict[tuple[int, Held, int, int], int] = {}
        self._times: dict[tuple[int, int], SegmentTimes] = {}
        self._ends = StepEnds(question, lambda a, b: self.link(a, b).latency_ns)
        segments = self.costs.segments
        self._gradients = _sums([s.gradient_bytes for s in segments])
        self._states = _sums([s.state_bytes for s in segments])

    def link(self, first: int, second: int) -> LinkEstimate:
        """The link of two devices, or the assumption for its kind."""
        return self._links.between(self.devices[first].profile, self.devices[second].profile)

    @property
    def may_share(self) -> bool:
        """Whether replicas may share microbatches out: running statistics are made of all of them,
        one after the other."""
        return all(not kind.running for kind in self.question.manifest.kinds.values())

    def keeps_residuals(self, groups: Groups) -> bool:
        """Whether the states that are saved have all of what int8 rounds off cotangents.

        Each replica rounds those of its own microbatches, and one of them saves for all; the first
        stage sends none.
        """
        return self.question.contract.codec != "int8" or all(
            len(group) == 1 for group in groups[1:]
        )

    def memory_bytes(self, first: int, end: int, holds: Held, ranks: int = 1) -> int:
        """Peak memory of segments first..end-1 with room for this many microbatches.

        With `ranks` > 1, on each of so many replicas: what the others send of gradients may all
        wait in buffers (`runtime.exchange.meeting`).
        """
        key = (first, end, holds)
        if key not in self._memory:
            self._memory[key] = self.question.stage_memory(range(first, end), holds)
        gradients = self._gradients[end] - self._gradients[first]
        return self._memory[key] + all_reduce_bytes(gradients, ranks)

    @property
    def state_bytes(self) -> int:
        """What a replica set of the whole model holds."""
        return self._states[-1]

    def longest_fit(self, replica: Replica, first: int) -> int:
        """The last end whose segments fit the replica's memory; `first` when not one does."""
        room = self.devices[replica.device].profile.memory_bytes
        key = (room, replica.holds, replica.ranks, first)
        if key not in self._longest:
            low, high = first, self.segment_count
            while low < high:
                middle = (low + high + 1) // 2
                needs = self.memory_bytes(first, middle, replica.holds, replica.ranks)
                if needs <= room:
                    low = middle
                else:
                    high = middle - 1
            self._longest[key] = low
        return self._longest[key]

    def pass_ns(self, device: int) -> int:
        """One microbatch forward and backward through the whole model."""
        return self.times(device, 1).pass_ns

    def sharing(self, devices: Sequence[int]) -> dict[int, int]:
        """How many of these devices share each one's cores, by device."""
        own = {i: self.devices[i].profile.cores_identity for i in devices}
        together = Counter(own.values())
        return {device: together[identity] for device, identity in own.items()}

    def times(self, device: int, on_cores: int) -> SegmentTimes:
        """What a device takes where so many peers share the cores."""
        key = (device, on_cores)
        if key not in self._times:
            profile = self.devices[device].profile
            busy = max(on_cores * self.question.contract.threads, profile.cores)
            kinds = [profile.kinds[name] for name in self._kinds]
            told = (
                (k.forward_ns, k.backward_ns, k.first_ns, k.gradients_ns, k.norm_ns, k.update_ns)
                for k in kinds
            )
            self._times[key] = SegmentTimes(
                *(
                    _sums([-(-time * busy // profile.cores) for time in times])
                    for times in zip(*told, strict=True)
                )
            )
        return self._times[key]

    def arrange(
        self, groups: Groups, schedule: str, weights: Sequence[Sequence[int] | None] = ()
    ) -> Arrangement | None:
        """The arrangement of these groups; None when a replica would get no microbatch, where
        microbatches cannot be shared out, or where int8 would lose what replicas round off.

        Args:
            groups: By stage.
            schedule: With replicas, no backward of it is delayed.
            weights: By stage and rank; None, or nothing: as fast as each device is.
        """
        sharing = self.sharing([device for group in groups for device in group])
        tables = [[self.times(i, sharing[i]) for i in group] for group in groups]
        asked = tuple(weights) or (None,) * len(groups)
        parts = tuple(
            tuple(given) if given is not None else self._by_speed(own)
            for given, own in zip(asked, tables, strict=True)
        )
        if any(0 in own for own in parts):
            return None
        if not self.may_share and any(len(group) > 1 for group in groups):
            return None
        if not self.keeps_residuals(groups):
            return None
        owners = tuple(owners_by_weight(own, self.microbatches) for own in parts)
        if any(len(set(own)) < len(group) for own, group in zip(owners, groups, strict=True)):
            return None
        if any(len(group) > 1 for group in groups):
            schedule = undelayed(schedule)
        actions = replicated_actions(schedule, owners, [len(group) for group in groups])
        stages = tuple(
            tuple(
                _replica(device, sums, held(schedule, listed), listed, len(group))
                for device, sums, listed in zip(group, own, todo, strict=True)
            )
            for group, own, todo in zip(groups, tables, actions, strict=True)
        )
        hops = tuple(self._hop(a, b) for a, b in itertools.pairwise(groups))
        return Arrangement(
            groups=groups, schedule=schedule, stages=stages, weights=parts, owners=owners,
            actions=actions, hops=hops,
        )  # fmt: skip

    def would_share(
        self, group: tuple[int, ...], weights: Sequence[int] | None, microbatches: int
    ) -> Owners:
        """Who of a group would get each of so many microbatches; without weights, by speed."""
        if weights is not None:
            return owners_by_weight(weights, microbatches)
        sharing = self.sharing(group)
        return shared_out([self.times(i, sharing[i]).pass_ns for i in group], microbatches)

    def _by_speed(self, tables: Sequence[SegmentTimes]) -> tuple[int, ...]:
        """Microbatches per replica, so that the busiest one is as little busy as can be."""
        counts = Counter(shared_out([own.pass_ns for own in tables], self.microbatches))
        return tuple(counts[replica] for replica in range(len(tables)))

    def _hop(self, before: tuple[int, ...], after: tuple[int, ...]) -> Hop:
        links = []
        for (i, a), (j, b) in itertools.product(enumerate(before), enumerate(after)):
            links.append(((i, j), self.link(a, b)))
        return Hop(
            latency_ns=min(link.latency_ns for _, link in links),
            bytes_per_s=max(link.bytes_per_s for _, link in links),
            links=tuple(links),
        )

    def bound_ns(self, arrangement: Arrangement, cuts: Cuts) -> int:
        """No step of this candidate is shorter: fill, busiest replica, drain; slots in flight; and
        then the first stage's update, which no fill hides."""
        segments = self.costs.segments
        delayed = delays_gradients(arrangement.schedule)  # then stages work on while others drain
        bound = lead = tail = 0
        trips: list[int] = []
        for stage, (first, end) in enumerate(spans(cuts)):
            replicas = arrangement.stages[stage]
            busy = max(replica.busy_ns(first, end) for replica in replicas)
            bound = max(bound, lead + busy + tail)
            lead += min(r.forward_ns[end] - r.forward_ns[first] for r in replicas)
            if not delayed:
                tail += min(r.backward_ns[end] - r.backward_ns[first] for r in replicas)
            trips.append(min(r.trip_ns[end] - r.trip_ns[first] for r in replicas))
            if stage < len(cuts) - 1:
                hop, sent = arrangement.hops[stage], segments[end - 1]
                over = hop.latency_ns + sent.sent_bytes * NS_PER_S // hop.bytes_per_s
                back = hop.latency_ns + sent.returned_bytes * NS_PER_S // hop.bytes_per_s
                lead, tail = lead + over, tail + (0 if delayed else back)
                trips.append(over + back)
        if arrangement.is_folded:
            ends = zip((0, -1), (spans(cuts)[0], spans(cuts)[-1]), strict=True)
            both = (arrangement.stages[stage][0].busy_ns(*span) for stage, span in ends)
            bound = max(bound, sum(both))
        update = max(replica.updates_ns(0, cuts[0]) for replica in arrangement.stages[0])
        return max(bound, self._slots_bound_ns(arrangement, cuts, trips)) + update

    def _slots_bound_ns(self, arrangement: Arrangement, cuts: Cuts, trips: list[int]) -> int:
        """A replica holds so many microbatches at once, each for one trip to the end and back."""
        bound = 0
        behind = sum(trips)
        for stage, (first, end) in enumerate(spans(cuts)):
            behind -= trips[2 * stage]
            for replica in arrangement.stages[stage]:
                trip = behind + replica.trip_ns[end] - replica.trip_ns[first]
                bound = max(bound, replica.microbatches * trip // replica.holds.in_flight)
            behind -= trips[2 * stage + 1] if 2 * stage + 1 < len(trips) else 0
        return bound

    def timeline(self, arrangement: Arrangement, cuts: Cuts) -> ReplicatedTimeline:
        """The simulated schedule of one step."""
        times = [
            [
                ReplicaTimes(
                    forward_ns=r.forward_ns[end] - r.forward_ns[first],
                    backward_ns=r.backward_ns[end] - r.backward_ns[first],
                    cotangents_ns=r.cotangents_ns[end] - r.cotangents_ns[first],
                    gradients_ns=r.gradients_ns[end] - r.gradients_ns[first],
                )
                for r in replicas
            ]
            for replicas, (first, end) in zip(arrangement.stages, spans(cuts), strict=True)
        ]
        return play(
            arrangement.actions,
            arrangement.owners,
            times,
            self._passages(arrangement, cuts),
            folded=arrangement.is_folded,
        )

    def _passages(
        self, arrangement: Arrangement, cuts: Cuts
    ) -> dict[tuple[int, int, int], Passage]:
        found = {}
        for boundary, hop in enumerate(arrangement.hops):
            crossing = self.costs.segments[cuts[boundary] - 1]
            before, after = arrangement.groups[boundary], arrangement.groups[boundary + 1]
            for (i, j), link in hop.links:
                on, back = (before[i], after[j]), (after[j], before[i])
                found[boundary, i, j] = Passage(
                    forward_lines=self._interfaces.lines(*on, crossing.sent_bytes),
                    backward_lines=self._interfaces.lines(*back, crossing.returned_bytes),
                    latency_ns=link.latency_ns,
                )
        return found

    def price(self, arrangement: Arrangement, cuts: Cuts) -> Price:
        """Simulate a candidate and add everything up."""
        timeline = self.timeline(arrangement, cuts)
        whole_ns = self._whole_ns(arrangement, cuts, timeline)
        step_ns = self.ended_ns(
            PeerEnd(
                device=replica.device,
                begins_ns=timeline.begins_ns(stage, rank),
                whole_ns=whole_ns[stage],
                norm_ns=replica.norms_ns(first, end),
                update_ns=replica.updates_ns(first, end),
            )
            for stage, (first, end) in enumerate(spans(cuts))
            for rank, replica in enumerate(arrangement.stages[stage])
        )
        interval = self._interval(arrangement, cuts, step_ns)
        replicated = [self._replicated_bytes(arrangement, cuts, s) for s in range(len(cuts))]
        step_ns += max(size * SET_NS_PER_BYTE // interval for size in replicated)
        sets = [size // interval for size in replicated]
        return self.total(step_ns, self.shares(arrangement, cuts, sets))

    def ended_ns(self, ends: Iterable[PeerEnd]) -> int:
        """Time of a step that ends so at each peer that computes."""
        return self._ends.period_ns(list(ends))

    def total(self, step_ns: int, shares: tuple[Share, ...]) -> Price:
        """Joules of a step from its time and its shares; peers of one machine idle together."""
        power = [self.devices[share.device].power for share in shares]
        hosts = [self.devices[share.device].profile.host for share in shares]
        together = Counter(hosts)
        active = [
            p.active_uj(s.compute_ns, s.moved_bytes) for p, s in zip(power, shares, strict=True)
        ]
        idle = [p.idle_uj(step_ns) // together[h] for p, h in zip(power, hosts, strict=True)]
        return Price(
            step_ns=step_ns,
            device_uj=tuple(map(int.__add__, idle, active)),
            shares=shares,
            marginal_uj=sum(active),
        )

    def shares(
        self, arrangement: Arrangement, cuts: Cuts, sets: list[int] | None = None
    ) -> tuple[Share, ...]:
        """What each device computes and moves; `sets`: bytes per step of each stage's replicas."""
        segments, found = self.costs.segments, []
        order = arrangement.devices
        kept: Counter[int] = Counter()
        own_ends = (0, len(cuts) - 1) if arrangement.is_folded else ()  # kept where they are
        for stage, size in enumerate(sets or ()):
            if size and stage not in own_ends:
                last = arrangement.groups[stage][-1]
                kept[order[(order.index(last) + 1) % len(order)]] += size
        for stage, (first, end) in enumerate(spans(cuts)):
            before = segments[first - 1] if stage else None
            after = segments[end - 1]
            replicas = arrangement.stages[stage]
            reduced = all_reduce_bytes(self._gradients[end] - self._gradients[first], len(replicas))
            own = sets[stage] if sets else 0
            for r in replicas:
                out = r.microbatches * (after.sent_bytes + (before.returned_bytes if before else 0))
                into = r.microbatches * (
                    after.returned_bytes + (before.sent_bytes if before else 0)
                )
                ending = r.norms_ns(first, end) + r.updates_ns(first, end)
                sent = out + reduced + (0 if stage in own_ends else own)
                passes = r.busy_ns(first, end)
                found.append(
                    Share(
                        device=r.device,
                        stage=stage,
                        microbatches=r.microbatches,
                        passes_ns=passes,
                        compute_ns=passes + ending + own * SET_NS_PER_BYTE,
                        sent_bytes=sent,
                        moved_bytes=sent + into + reduced + kept.pop(r.device, 0),  # at one end
                    )
                )
        return tuple(found)

    def reduce_ns(self, devices: tuple[int, ...], whole_bytes: int) -> int:
        """Time in which devices add up so many bytes, over their slowest link."""
        reduce = CollectiveCost(kind="reduce", whole_bytes=whole_bytes)
        return self.collective_ns(devices, reduce)

    def collective_ns(self, devices: tuple[int, ...], collective: CollectiveCost) -> int:
        """Time of one collective: everybody sends parts to everybody, then sums, each on a line
        of its own; on a medium all take turns."""
        count, size = len(devices), collective.whole_bytes
        if count < 2 or size == 0:
            return 0
        links = [self.link(a, b) for a, b in itertools.combinations(devices, 2)]
        ends = {link.medium: set[DeviceId]() for link in links if link.medium}
        for link in links:
            if link.medium:
                ends[link.medium].update((link.first, link.second))
        return max(
            collective_ns(
                collective.ring_bytes(count),
                hops=2 if collective.kind == "reduce" else 1,
                latency_ns=link.latency_ns,
                bytes_per_s=link.bytes_per_s,
                sharing=len(ends[link.medium]) if link.medium else 1,
            )
            for link in links
        )

    def _whole_ns(
        self, arrangement: Arrangement, cuts: Cuts, timeline: ReplicatedTimeline
    ) -> list[int]:
        """When each stage has its whole gradients.

        All but the first segment's gradient may travel beside the last backward. Stages on one
        medium take turns.
        """
        free_ns = dict[str, int]()
        found = [timeline.stage_end_ns(stage) for stage in range(len(cuts))]
        shared = (stage for stage, group in enumerate(arrangement.groups) if len(group) > 1)
        for ready_ns, stage in sorted((found[stage], stage) for stage in shared):
            first, end = spans(cuts)[stage]
            group = arrangement.groups[stage]
            whole_ns = self.reduce_ns(group, self._gradients[end] - self._gradients[first])
            last_ns = min(
                r.backward_ns[end] - r.backward_ns[first] for r in arrangement.stages[stage]
            )
            after_ns = max(
                whole_ns - last_ns,
                self.reduce_ns(group, self._gradients[first + 1] - self._gradients[first]),
            )
            medium = self.link(group[0], group[1]).medium
            done_ns = max(ready_ns, free_ns.get(medium, 0) if medium else 0) + after_ns
            free_ns[medium] = found[stage] = done_ns
        return found

    def _replicated_bytes(self, arrangement: Arrangement, cuts: Cuts, stage: int) -> int:
        """State that goes to a keeper with each set; of a replicated stage a sibling has it."""
        first, end = spans(cuts)[stage]
        others = len(cuts) > 1 or (self.question.for_run and len(self.devices) > 1)
        alone = len(arrangement.groups[stage]) == 1 and others
        return self._states[end] - self._states[first] if alone else 0

    def interval(self, arrangement: Arrangement, cuts: Cuts, step_ns: int) -> ReplicaInterval:
        """Steps between replica sets that cost least, within the bounds for logs and recovery."""
        stages = []
        for stage, (first, end) in enumerate(spans(cuts)):
            crossing = [self.costs.segments[i - 1].sent_bytes for i in (first, end) if i > 0]
            stages.append(
                StageCosts(
                    state_bytes=self._replicated_bytes(arrangement, cuts, stage),
                    log_bytes=self.microbatches * sum(crossing),
                    compute_ns=max(r.busy_ns(first, end) for r in arrangement.stages[stage]),
                    bytes_per_s=self._keeping_rate(arrangement, stage),
                )
            )
        return replica_interval(stages, step_ns=step_ns)

    def _interval(self, arrangement: Arrangement, cuts: Cuts, step_ns: int) -> int:
        asked = self.question.replica_every
        return asked or self.interval(arrangement, cuts, step_ns).steps

    def _keeping_rate(self, arrangement: Arrangement, stage: int) -> int:
        """Bytes per second of the slowest link that a stage's replicas or logs would take; in a
        run any other device may keep them."""
        if self.question.for_run:
            group = arrangement.groups[stage]
            others = [i for i in range(len(self.devices)) if i not in group]
            rates = [self.link(a, b).bytes_per_s for a in group for b in others]
        else:
            near = arrangement.hops[max(0, stage - 1) : stage + 1]
            rates = [link.bytes_per_s for hop in near for _, link in hop.links]
        return min(rates, default=SAME_HOST_BYTES_PER_S)


def spans(cuts: Cuts) -> list[tuple[int, int]]:
    """First segment and end (exclusive) of every stage."""
    return list(zip((0, *cuts[:-1]), cuts, strict=True))


def _replica(
    device: int, sums: SegmentTimes, holds: Held, listed: Sequence[Action], ranks: int
) -> Replica:
    """One device with its actions; what it computes in a step follows from them."""
    forward, backward, cotangents, gradients, norm, update = sums
    delayed = len(delayed_microbatches(listed))
    count = sum(action.kind == "F" for action in listed)
    return Replica(
        device=device,
        forward_ns=forward,
        backward_ns=backward,
        cotangents_ns=cotangents,
        gradients_ns=gradients,
        trip_ns=tuple(
            f + (min(b, c) if delayed else b)
            for f, b, c in zip(forward, backward, cotangents, strict=True)
        ),
        whole_ns=tuple(
            count * f + (count - delayed) * b + delayed * (c + g)
            for f, b, c, g in zip(forward, backward, cotangents, gradients, strict=True)
        ),
        norm_ns=norm,
        update_ns=update,
        microbatches=count,
        ranks=ranks,
        holds=holds,
    )


def _sums(values: Sequence[int]) -> tuple[int, ...]:
    return tuple(itertools.accumulate(values, initial=0))
