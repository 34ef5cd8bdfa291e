"""What one ordered choice of peers costs: compute, transfers, memory. All integers."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from p2ptrain.ids import DeviceId
from p2ptrain.planner.input import (
    OTHER_HOST_BYTES_PER_S,
    OTHER_HOST_LATENCY_NS,
    SAME_HOST_BYTES_PER_S,
    SAME_HOST_LATENCY_NS,
    LinkEstimate,
    PlanningInput,
)
from p2ptrain.planner.plan import StagePlan
from p2ptrain.planner.profile import KindCost, PeerProfile
from p2ptrain.schedule.actions import Action, Held, all_actions, held
from p2ptrain.schedule.simulator import PartsTime, Timeline, simulate
from p2ptrain.training.tensor_codec import encoded_bytes

Cuts = tuple[int, ...]
"""The end (exclusive) of every stage's segments; the last is the number of segments."""
_TIMES: Final[tuple[Callable[[KindCost], int], ...]] = (
    lambda cost: cost.forward_ns,
    lambda cost: cost.backward_ns,
    lambda cost: cost.first_ns,
    lambda cost: cost.gradients_ns,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderCosts:
    """One ordered choice of peers, with the costs of every cut looked up by prefix sums."""

    peers: tuple[PeerProfile, ...]
    forward_ns: tuple[tuple[int, ...], ...]
    """By stage: prefix sums over segments of one microbatch's time, host sharing included."""
    backward_ns: tuple[tuple[int, ...], ...]
    cotangents_ns: tuple[tuple[int, ...], ...]
    """Of backwards whose gradients are delayed, until the cotangents may leave."""
    gradients_ns: tuple[tuple[int, ...], ...]
    """The rest of these backwards."""
    transfer_ns: tuple[tuple[int, ...], ...]
    """By boundary between stages, then by end segment: time of one tensor."""
    holds: tuple[Held, ...]
    """By stage: microbatches in flight, and without gradients."""

    def compute_ns(self, stage: int, first: int, end: int) -> int:
        """One microbatch forward and backward through segments first..end-1 on this stage."""
        times = [self.forward_ns[stage], self.backward_ns[stage]]
        if self.holds[stage].delayed:
            times[1:] = [self.cotangents_ns[stage], self.gradients_ns[stage]]
        return sum(own[end] - own[first] for own in times)

    def trip_ns(self, stage: int, first: int, end: int) -> int:
        """From when a microbatch enters these segments until its cotangents leave them, at least,
        without what lies behind."""
        forward, back = self.forward_ns[stage], self.backward_ns[stage]
        if self.holds[stage].delayed:
            back = self.cotangents_ns[stage]
        return forward[end] - forward[first] + back[end] - back[first]

    def around_ns(self, stage: int, first: int, end: int) -> int:
        """What these segments and the boundary behind them add, at least, to the time in which no
        later stage is busy; where gradients are delayed, later stages are busy to the end."""
        transfer = self.transfer_ns[stage][end]
        if any(holds.delayed for holds in self.holds):
            return self.forward_ns[stage][end] - self.forward_ns[stage][first] + transfer
        return self.compute_ns(stage, first, end) + 2 * transfer

    def parts(self, stage: int, first: int, end: int) -> PartsTime:
        """One microbatch's backward through these segments, where its gradients are delayed."""
        cotangents, gradients = self.cotangents_ns[stage], self.gradients_ns[stage]
        return PartsTime(
            cotangents_ns=cotangents[end] - cotangents[first],
            gradients_ns=gradients[end] - gradients[first],
        )


class CostModel:
    """Turns a planning input into costs; remembers what it has asked the memory model."""

    def __init__(self, planning: PlanningInput) -> None:
        self._planning = planning
        self._segment_count = len(planning.manifest.segments)
        self._links = {frozenset((link.first, link.second)): link for link in planning.links}
        self._memory: dict[tuple[int, int, Held], int] = {}
        self._actions: dict[int, tuple[tuple[Action, ...], ...]] = {}
        self._kinds = tuple(segment.kind for segment in planning.manifest.segments)
        batch = planning.contract.microbatch_size
        self._boundary_bytes = tuple(
            _sent_bytes(planning, index, batch) for index in range(self._segment_count - 1)
        )

    @property
    def segment_count(self) -> int:
        return self._segment_count

    def actions(self, stages: int) -> tuple[tuple[Action, ...], ...]:
        """The schedule's actions for a number of stages."""
        if stages not in self._actions:
            self._actions[stages] = all_actions(
                self._planning.schedule, stages, self._planning.contract.microbatches
            )
        return self._actions[stages]

    def sent_bytes(self, boundary: int) -> int:
        """What one microbatch's activations take on a link after segment `boundary`."""
        return self._boundary_bytes[boundary]

    def memory_bytes(self, first: int, end: int, holds: Held) -> int:
        """Peak memory of segments first..end-1 with room for this many microbatches."""
        key = (first, end, holds)
        if key not in self._memory:
            self._memory[key] = self._planning.stage_memory(
                range(first, end), holds.in_flight, holds.delayed
            )
        return self._memory[key]

    def order(self, peers: tuple[PeerProfile, ...]) -> OrderCosts:
        """The costs of running consecutive stages on these peers in this order."""
        used = Counter(peer.host for peer in peers)
        sums: list[list[tuple[int, ...]]] = [[], [], [], []]
        for peer in peers:
            busy = max(used[peer.host] * self._planning.contract.threads, peer.cores)
            for own, of in zip(sums, _TIMES, strict=True):
                times = [of(peer.kinds[name]) for name in self._kinds]
                own.append(_prefix_sums(times, busy, peer.cores))
        forward, backward, cotangents, gradients = (tuple(own) for own in sums)
        return OrderCosts(
            peers=peers,
            forward_ns=forward,
            backward_ns=backward,
            cotangents_ns=cotangents,
            gradients_ns=gradients,
            transfer_ns=self._all_transfers(peers),
            holds=tuple(held(own) for own in self.actions(len(peers))),
        )

    def fits(self, costs: OrderCosts, stage: int, first: int, end: int) -> bool:
        """Whether this stage's memory holds these segments."""
        needed = self.memory_bytes(first, end, costs.holds[stage])
        return needed <= costs.peers[stage].memory_bytes

    def stage_plan(self, costs: OrderCosts, stage: int, first: int, end: int) -> StagePlan:
        """Segments first..end-1 on this stage, with what they are expected to cost there."""
        planning = self._planning
        tensors = [t for i in range(first, end) for t in planning.manifest.segment_tensors(i)]
        return StagePlan(
            device=costs.peers[stage].device,
            first_segment=first,
            segment_count=end - first,
            in_flight_max=costs.holds[stage].in_flight,
            step_compute_ns=costs.compute_ns(stage, first, end) * planning.contract.microbatches,
            memory_bytes=self.memory_bytes(first, end, costs.holds[stage]),
            parameter_count=sum(tensor.elements for tensor in tensors),
        )

    def play(self, costs: OrderCosts, cuts: Cuts) -> Timeline:
        """Simulate one step of a complete placement."""
        firsts = (0, *cuts[:-1])
        spans = list(zip(firsts, cuts, strict=True))
        return simulate(
            self.actions(len(cuts)),
            forward_ns=[t[e] - t[f] for t, (f, e) in zip(costs.forward_ns, spans, strict=True)],
            backward_ns=[t[e] - t[f] for t, (f, e) in zip(costs.backward_ns, spans, strict=True)],
            transfer_ns=[t[e] for t, e in zip(costs.transfer_ns, cuts[:-1], strict=True)],
            parts=[costs.parts(stage, f, e) for stage, (f, e) in enumerate(spans)],
        )

    def link(self, first: PeerProfile, second: PeerProfile) -> LinkEstimate:
        """The measured link of two peers, or the assumption for its kind."""
        measured = self._links.get(frozenset((first.device, second.device)))
        if measured is not None:
            return measured
        near = first.host == second.host
        return LinkEstimate(
            first=first.device,
            second=second.device,
            latency_ns=SAME_HOST_LATENCY_NS if near else OTHER_HOST_LATENCY_NS,
            bytes_per_s=SAME_HOST_BYTES_PER_S if near else OTHER_HOST_BYTES_PER_S,
            rate_measured=False,
            latency_measured=False,
        )

    def is_measured(self, first: DeviceId, second: DeviceId) -> bool:
        """Whether the rate of two devices' link was measured."""
        measured = self._links.get(frozenset((first, second)))
        return measured is not None and measured.rate_measured

    def _all_transfers(self, peers: tuple[PeerProfile, ...]) -> tuple[tuple[int, ...], ...]:
        """By link between neighbours, then by end segment. Links on one medium share it, as if
        all had something to send at the same time."""
        links = [self.link(a, b) for a, b in itertools.pairwise(peers)]
        shared = Counter(link.medium for link in links if link.medium)
        costs = []
        for link in links:
            users = max(1, shared[link.medium])
            costs.append((0, *(link.transfer_ns(users * size) for size in self._boundary_bytes)))
        return tuple(costs)


def _sent_bytes(planning: PlanningInput, index: int, batch: int) -> int:
    """What one microbatch's activations take on a link, in the contract's codec."""
    manifest, codec = planning.manifest, planning.contract.codec
    return sum(
        encoded_bytes(codec, dtype=v.dtype, elements=math.prod(manifest.shape(v, batch=batch)))
        for v in manifest.boundary(index)
    )


def _prefix_sums(times: list[int], busy: int, cores: int) -> tuple[int, ...]:
    """Prefix sums of times stretched by busy / cores, rounded up."""
    stretched = (-(-time * busy // cores) for time in times)
    return tuple(itertools.accumulate(stretched, initial=0))
