"""Find the placement with the shortest simulated step.

Three steps, for small and large instances alike. Orders of peers are listed (all of them while
they are few, else the fastest k in three orders). Each order is first cut by the smallest
bottleneck, which gives an upper bound; then a beam over partial cuts collects every cut whose
lower bound is not above it. The candidates are simulated from the lowest bound upwards until the
bound passes the best step found. With few peers nothing is dropped and the result is the best.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from p2ptrain.ids import DeviceId
from p2ptrain.planner.costs import CostModel, Cuts, OrderCosts
from p2ptrain.planner.profile import PeerProfile

ORDERS_MAX: Final = 400
BEAM_WIDTH_MAX: Final = 400
BEAM_EXTENSIONS_PER_ORDER: Final = 1_000_000
BEAM_EXTENSIONS_MAX: Final = 1_000_000
STAGE_COUNTS_MAX: Final = 16
"""With many peers: how many numbers of stages are tried."""
SIMULATED_ACTIONS_MAX: Final = 600_000
EQUAL_PER_MILLE: Final = 5
"""Predicted steps that differ by less are equal: fewer peers, then the home peer first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A complete placement and its simulated step."""

    costs: OrderCosts
    cuts: Cuts
    step_ns: int

    @property
    def devices(self) -> tuple[DeviceId, ...]:
        return tuple(peer.device for peer in self.costs.peers)


@dataclass(slots=True, kw_only=True)
class SearchResult:
    """The best placement, and the best found with each peer."""

    best: Candidate | None = None
    with_device_ns: dict[DeviceId, int] = field(default_factory=dict)
    one_peer_ns: int | None = None
    simulated_count: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bounded:
    """A complete placement with a lower bound of its step."""

    bound_ns: int
    order_index: int
    cuts: Cuts


class Search:
    """One search over orders and cuts; deterministic, bounded by counts, never by a clock."""

    def __init__(
        self,
        *,
        model: CostModel,
        profiles: tuple[PeerProfile, ...],
        home: DeviceId,
        stages: int | None,
        microbatches: int,
    ) -> None:
        self._model = model
        self._profiles = tuple(sorted(profiles, key=lambda profile: profile.device))
        self._home = home
        self._stages = stages
        self._microbatches = microbatches
        self._equals: list[Candidate] = []
        self._simulated_actions = 0
        self._result = SearchResult()

    def run(self) -> SearchResult:
        """Search once."""
        orders = [self._model.order(peers) for peers in self._orders()]
        orders = [costs for costs in orders if self._simulate_bottleneck_cut(costs)]
        bounded = list(self._bounded(orders))
        bounded.sort(key=lambda one: (one.bound_ns, one.order_index, one.cuts))
        for candidate in bounded:
            if candidate.bound_ns > self._limit_ns():
                break
            if self._simulated_actions > SIMULATED_ACTIONS_MAX:
                break
            self._simulate(orders[candidate.order_index], candidate.cuts)
        limit_ns = self._limit_ns()
        equals = [one for one in self._equals if one.step_ns <= limit_ns]
        self._result.best = min(equals, key=self._preference, default=None)
        return self._result

    def feasible(self) -> bool:
        """Whether any placement fits the memory, without looking for the best."""
        orders = (self._model.order(peers) for peers in self._orders())
        return any(bottleneck_cuts(self._model, costs) is not None for costs in orders)

    def _orders(self) -> Iterator[tuple[PeerProfile, ...]]:
        most = min(len(self._profiles), self._model.segment_count)
        counts = range(1, most + 1) if self._stages is None else [self._stages]
        counts = [count for count in counts if count <= most]
        every = sum(_permutation_count(len(self._profiles), count) for count in counts)
        if every <= ORDERS_MAX:
            for count in counts:
                yield from itertools.permutations(self._profiles, count)
            return
        for count in _thinned(counts):
            yield from self._likely_orders(count)

    def _likely_orders(self, count: int) -> Iterator[tuple[PeerProfile, ...]]:
        """For many peers: the fastest and the roomiest `count`, in a few orders each."""
        by_speed = sorted(self._profiles, key=lambda p: (_pass_ns(p), p.device))
        by_room = sorted(self._profiles, key=lambda p: (-p.memory_bytes, p.device))
        seen = set()
        for ranking in (by_speed, by_room):
            chosen = ranking[:count]
            home_first = sorted(chosen, key=lambda p: p.device != self._home)
            for order in (chosen, chosen[::-1], home_first):
                if tuple(p.device for p in order) not in seen:
                    seen.add(tuple(p.device for p in order))
                    yield tuple(order)

    def _simulate_bottleneck_cut(self, costs: OrderCosts) -> bool:
        """Simulate the cut with the smallest bottleneck; False when no cut fits the memory."""
        cuts = bottleneck_cuts(self._model, costs)
        if cuts is not None:
            self._simulate(costs, cuts)
        return cuts is not None

    def _bounded(self, orders: list[OrderCosts]) -> Iterator[_Bounded]:
        extensions = 0
        for index, costs in enumerate(orders):
            if extensions > BEAM_EXTENSIONS_MAX:
                return
            beam = _Beam(self._model, costs, self._microbatches, self._limit_ns())
            for bound_ns, cuts in beam.run():
                yield _Bounded(bound_ns=bound_ns, order_index=index, cuts=cuts)
            extensions += beam.extensions

    def _simulate(self, costs: OrderCosts, cuts: Cuts) -> None:
        step_ns = self._model.play(costs, cuts).step_ns
        candidate = Candidate(costs=costs, cuts=cuts, step_ns=step_ns)
        self._simulated_actions += 2 * self._microbatches * len(cuts)
        result = self._result
        result.simulated_count += 1
        for device in candidate.devices:
            known_ns = result.with_device_ns.get(device)
            if known_ns is None or step_ns < known_ns:
                result.with_device_ns[device] = step_ns
        if len(cuts) == 1 and (result.one_peer_ns is None or step_ns < result.one_peer_ns):
            result.one_peer_ns = step_ns
        if result.best is None or step_ns < result.best.step_ns:
            result.best = candidate
        if step_ns <= self._limit_ns():
            self._equals.append(candidate)

    def _limit_ns(self) -> int:
        """Steps up to this count as equal to the best found so far."""
        if self._result.best is None:
            return 1 << 62
        best_ns = self._result.best.step_ns
        return best_ns + best_ns * EQUAL_PER_MILLE // 1000

    def _preference(self, one: Candidate) -> tuple[int, bool, int, tuple[DeviceId, ...], Cuts]:
        away = one.devices[0] != self._home
        return (len(one.cuts), away, one.step_ns, one.devices, one.cuts)


class _Beam:
    """Partial cuts of one order, stage by stage, kept by their lower bound."""

    def __init__(
        self, model: CostModel, costs: OrderCosts, microbatches: int, limit_ns: int
    ) -> None:
        self._model = model
        self._costs = costs
        self._microbatches = microbatches
        self._limit_ns = limit_ns
        self._stages = len(costs.peers)
        whole = model.segment_count**2 * self._stages
        self._width = max(1, min(BEAM_WIDTH_MAX, BEAM_EXTENSIONS_PER_ORDER // whole))
        self.extensions = 0

    def run(self) -> Iterator[tuple[int, Cuts]]:
        """Complete cuts with a lower bound of their step, within the limit."""
        partial: dict[int, list[tuple[int, int, Cuts]]] = {0: [(0, 0, ())]}
        for stage in range(self._stages):
            longer: dict[int, list[tuple[int, int, Cuts]]] = {}
            for first, states in sorted(partial.items()):
                self._extend(stage, first, states, longer)
            partial = {end: sorted(own)[: self._width] for end, own in longer.items()}
        for bound_ns, _, cuts in partial.get(self._model.segment_count, []):
            yield max(bound_ns, self._slots_bound_ns(cuts)), cuts

    def _extend(
        self,
        stage: int,
        first: int,
        states: list[tuple[int, int, Cuts]],
        longer: dict[int, list[tuple[int, int, Cuts]]],
    ) -> None:
        """Give stage `stage` every possible run of segments that starts at `first`."""
        last_stage = stage == self._stages - 1
        count = self._model.segment_count
        ends = range(count, count + 1)
        if not last_stage:
            ends = range(first + 1, count - (self._stages - 2 - stage))
        for end in ends:
            compute_ns = self._costs.compute_ns(stage, first, end)
            busy_ns = self._microbatches * compute_ns
            if busy_ns > self._limit_ns or not self._model.fits(self._costs, stage, first, end):
                return
            around_ns = 0 if last_stage else self._costs.around_ns(stage, first, end)
            for bound_ns, before_ns, cuts in states:
                self.extensions += 1
                # A stage can neither start before the first microbatch arrives nor end before
                # the last one has gone back.
                bound = max(bound_ns, before_ns + busy_ns)
                if bound <= self._limit_ns:
                    longer.setdefault(end, []).append((bound, before_ns + around_ns, (*cuts, end)))

    def _slots_bound_ns(self, cuts: Cuts) -> int:
        """A stage holds at most `in_flight` microbatches, each for one round trip behind it."""
        bound = trip_ns = 0
        firsts = (0, *cuts[:-1])
        for stage in reversed(range(self._stages)):
            trip_ns += self._costs.trip_ns(stage, firsts[stage], cuts[stage])
            room = self._costs.holds[stage].in_flight
            bound = max(bound, -(-self._microbatches * trip_ns // room))
            if stage > 0:
                trip_ns += 2 * self._costs.transfer_ns[stage - 1][cuts[stage - 1]]
        return bound


def bottleneck_cuts(model: CostModel, costs: OrderCosts) -> Cuts | None:
    """The cut whose busiest stage is least busy; None when the memory holds none.

    Dynamic programme over (stage, end): the smallest bottleneck of segments 0..end-1.
    """
    count, stages = model.segment_count, len(costs.peers)
    best: list[dict[int, tuple[int, int]]] = [{0: (0, 0)}]
    for stage in range(stages):
        row: dict[int, tuple[int, int]] = {}
        ends = [count] if stage == stages - 1 else range(stage + 1, count - (stages - 2 - stage))
        for end in ends:
            found: tuple[int, int] | None = None
            for first in range(end - 1, stage - 1, -1):
                own_ns = costs.compute_ns(stage, first, end)
                if found is not None and own_ns > found[0]:
                    break
                if not model.fits(costs, stage, first, end):
                    break
                if first in best[stage]:
                    option = (max(best[stage][first][0], own_ns), first)
                    found = option if found is None else min(found, option)
            if found is not None:
                row[end] = found
        best.append(row)
    if count not in best[stages]:
        return None
    cuts = [count]
    for stage in range(stages, 1, -1):
        cuts.append(best[stage][cuts[-1]][1])
    return tuple(reversed(cuts))


def _thinned(counts: list[int]) -> list[int]:
    """At most STAGE_COUNTS_MAX of these counts, small ones densely, the largest always."""
    kept = [count for count in counts if count <= STAGE_COUNTS_MAX // 2]
    rest = [count for count in counts if count > STAGE_COUNTS_MAX // 2]
    every = -(-len(rest) // (STAGE_COUNTS_MAX // 2)) if rest else 1
    return kept + sorted(rest[::-1][::every])


def _permutation_count(items: int, chosen: int) -> int:
    count = 1
    for index in range(chosen):
        count *= items - index
    return count


def _pass_ns(profile: PeerProfile) -> int:
    return sum(cost.forward_ns + cost.backward_ns for cost in profile.kinds.values())
