"""Choose the plan of a view: which peers, which segments where, and why.

Pure and deterministic: costs are integers, ties are broken by device id, the search is bounded
by counts. Whoever plans with equal input proposes an equal plan. This version pipelines whole
stages and minimises the time of a step; the data the home peer sends to the first and the last
stage is small beside the boundaries and not counted.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter

from p2ptrain.errors import InvariantBroken
from p2ptrain.ids import short
from p2ptrain.planner.costs import CostModel
from p2ptrain.planner.infeasible import infeasible
from p2ptrain.planner.input import (
    OTHER_HOST_BYTES_PER_S,
    SAME_HOST_BYTES_PER_S,
    LeftOut,
    PlanChoice,
    PlanningInput,
    stage_shares,
)
from p2ptrain.planner.keepers import data_holders, replica_keepers
from p2ptrain.planner.plan import Plan, StagePlan
from p2ptrain.planner.profile import PeerProfile
from p2ptrain.planner.replica_interval import StageCosts, replica_interval
from p2ptrain.planner.search import Candidate, Search, SearchResult
from p2ptrain.schedule.simulator import ceiling
from p2ptrain.training.segment_state import residual_shapes
from p2ptrain.units import NS_PER_S, format_bytes, format_seconds

FLOAT32_BYTES = 4


def choose_plan(planning: PlanningInput) -> PlanChoice:
    """The placement with the shortest predicted step that every peer's memory holds.

    Raises:
        PlanInfeasible: nothing fits; the message says what is short, the hint the nearest change.
        ConfigError: the schedule is unknown.
    """
    model = CostModel(planning)
    usable = tuple(profile for profile in planning.profiles if _measured(planning, profile))
    search = Search(
        model=model,
        profiles=usable,
        home=planning.home,
        stages=planning.stages,
        microbatches=planning.contract.microbatches,
    )
    found = search.run()
    if found.best is None:
        raise infeasible(planning, model, usable)
    return _Chosen(planning, model, found, found.best).choice()


class _Chosen:
    """The chosen candidate on its way to a plan with reasons."""

    def __init__(
        self, planning: PlanningInput, model: CostModel, found: SearchResult, best: Candidate
    ) -> None:
        self._planning = planning
        self._model = model
        self._found = found
        self._best = best
        self._interval = replica_interval(
            [self._stage_costs(index) for index in range(len(best.cuts))], step_ns=best.step_ns
        )

    def choice(self) -> PlanChoice:
        timeline = self._model.play(self._best.costs, self._best.cuts)
        if timeline.step_ns != self._best.step_ns:
            raise InvariantBroken("the simulator gave two times for one placement")
        bare = self._plan(reasons=())
        stage_reasons = self._stage_reasons(bare)
        left_out = self._left_out()
        reasons = [self._headline(), *stage_reasons]
        reasons += [f"{short(one.device)} left out: {one.reason}" for one in left_out]
        if len(bare.members) > 1 and self._planning.replica_every is None:
            reasons.append(self._replica_reason())
        reasons += self._assumptions()
        return PlanChoice(
            plan=self._plan(reasons=tuple(reasons)),
            stage_reasons=stage_reasons,
            left_out=left_out,
            timeline=timeline,
            ceiling=self._ceiling(),
            one_peer_ns=self._found.one_peer_ns,
            simulated_count=self._found.simulated_count,
        )

    def _plan(self, *, reasons: tuple[str, ...]) -> Plan:
        planning = self._planning
        stages = tuple(self._stage(index) for index in range(len(self._best.cuts)))
        members = tuple(sorted({*(p.device for p in planning.profiles), planning.home}))
        return Plan(
            run=planning.run,
            lineage=planning.lineage,
            view=planning.view,
            members=members,
            home=planning.home,
            holders=data_holders(
                planning.home,
                stages,
                members,
                keep_data_here=planning.keep_data_here,
                holding=planning.holding,
            ),
            keep_data_here=planning.keep_data_here,
            replica_every=planning.replica_every or self._interval.steps,
            contract=planning.contract.digest,
            schedule=planning.schedule,
            stages=stages,
            replicas=replica_keepers(stages, members),
            step_ns=self._best.step_ns,
            reasons=reasons,
        )

    def _stage(self, index: int) -> StagePlan:
        first, end = self._bounds(index)
        return self._model.stage_plan(self._best.costs, index, first, end)

    def _stage_costs(self, index: int) -> StageCosts:
        """What replicating and recovering one stage costs."""
        planning, costs = self._planning, self._best.costs
        manifest, contract = planning.manifest, planning.contract
        first, end = self._bounds(index)
        tensors = [t for i in range(first, end) for t in manifest.segment_tensors(i)]
        trained = sum(t.elements for t in tensors if t.binding == "trainable")
        rule = manifest.updates.get(contract.optimizer.name)
        vectors = 1 + (0 if rule is None else len(rule.state))
        kept = [residual_shapes(manifest, contract, i).values() for i in range(first, end)]
        lost = sum(math.prod(shape) for shapes in kept for shape in shapes)
        inner = [b for b in (first, end) if 0 < b < len(manifest.segments)]
        crossing = [self._model.sent_bytes(b - 1) for b in inner]
        others = [p for p in planning.profiles if p.device != costs.peers[index].device]
        links = [self._model.link(costs.peers[index], other) for other in others]
        return StageCosts(
            state_bytes=FLOAT32_BYTES * (vectors * trained + lost),
            log_bytes=sum(crossing) * contract.microbatches,
            compute_ns=costs.compute_ns(index, first, end) * contract.microbatches,
            bytes_per_s=min((link.bytes_per_s for link in links), default=SAME_HOST_BYTES_PER_S),
        )

    def _replica_reason(self) -> str:
        interval = self._interval
        recovery = format_seconds(interval.replay_ns / NS_PER_S)
        return (
            f"replica sets every {interval.steps} steps, {interval.reason}: "
            f"a lost stage is predicted to be back within {recovery}"
        )

    def _bounds(self, index: int) -> tuple[int, int]:
        cuts = self._best.cuts
        return (cuts[index - 1] if index else 0, cuts[index])

    def _ceiling(self) -> float:
        costs = self._best.costs
        spans = [self._bounds(index) for index in range(len(self._best.cuts))]
        return ceiling(
            self._model.actions(len(spans)),
            forward_ns=[t[e] - t[f] for t, (f, e) in zip(costs.forward_ns, spans, strict=True)],
            backward_ns=[t[e] - t[f] for t, (f, e) in zip(costs.backward_ns, spans, strict=True)],
            parts=[costs.parts(stage, f, e) for stage, (f, e) in enumerate(spans)],
        )

    def _headline(self) -> str:
        used, known = len(self._best.cuts), len(self._planning.profiles)
        step = format_seconds(self._best.step_ns / NS_PER_S)
        asked = " as asked" if self._planning.stages is not None else ""
        text = f"{used} of {known} peers compute{asked}: a step is predicted to take {step}"
        if used == 1:
            return text
        if self._found.one_peer_ns is not None:
            ratio = self._found.one_peer_ns / max(self._best.step_ns, 1)
            return f"{text}, {ratio:.2f} times the speed of the best single peer"
        if self._planning.stages is None:
            return f"{text}; the model fits no single peer"
        return text

    def _stage_reasons(self, plan: Plan) -> tuple[str, ...]:
        shares = stage_shares(plan)
        sentences = []
        for index, (stage, share) in enumerate(zip(plan.stages, shares, strict=True)):
            room = format_bytes(self._best.costs.peers[index].memory_bytes)
            home = ", owns the data" if stage.device == plan.home else ""
            sentences.append(
                f"stage {index} on {short(stage.device)}: segments {stage.first_segment} to "
                f"{stage.segments[-1]}, {100 * share:.0f} % of the compute, "
                f"{format_bytes(stage.memory_bytes)} of {room}{home}"
            )
        return tuple(sentences)

    def _left_out(self) -> tuple[LeftOut, ...]:
        chosen = set(self._best.devices)
        profiles = sorted(self._planning.profiles, key=lambda profile: profile.device)
        return tuple(
            LeftOut(device=profile.device, reason=self._reason_against(profile))
            for profile in profiles
            if profile.device not in chosen
        )

    def _reason_against(self, profile: PeerProfile) -> str:
        if not _measured(self._planning, profile):
            return "it has not measured this model"
        with_it_ns = self._found.with_device_ns.get(profile.device)
        if with_it_ns is None:
            return f"no placement fits its {format_bytes(profile.memory_bytes)}"
        step = format_seconds(with_it_ns / NS_PER_S)
        shared = self._shares_cores(profile)
        return f"the best step found with it takes {step}{shared}"

    def _shares_cores(self, profile: PeerProfile) -> str:
        same = sum(peer.host == profile.host for peer in self._best.costs.peers)
        needed = (same + 1) * self._planning.contract.threads
        if same and needed > profile.cores:
            return f", its host would need {needed} threads on {profile.cores} cores"
        return ""

    def _assumptions(self) -> list[str]:
        peers = self._best.costs.peers
        sentences = []
        used = Counter(peer.host for peer in peers)
        for peer in sorted(peers, key=lambda p: p.device):
            needed = used.pop(peer.host, 0) * self._planning.contract.threads
            if needed > peer.cores:
                sentences.append(
                    f"{needed} threads share the {peer.cores} cores of one host: "
                    f"times there are stretched {needed / peer.cores:.1f} times"
                )
        unknown = [
            (a, b)
            for a, b in itertools.pairwise(peers)
            if not self._model.is_measured(a.device, b.device)
        ]
        if any(a.host == b.host for a, b in unknown):
            rate = format_bytes(SAME_HOST_BYTES_PER_S)
            sentences.append(f"links on one host are assumed to carry {rate} per second")
        if any(a.host != b.host for a, b in unknown):
            rate = format_bytes(OTHER_HOST_BYTES_PER_S)
            sentences.append(f"links between hosts are assumed to carry {rate} per second")
        return [*sentences, *self._measurements()]

    def _measurements(self) -> list[str]:
        """What was measured of the links that the pipeline uses, and what of them is shared."""
        sentences = []
        links = [self._model.link(a, b) for a, b in itertools.pairwise(self._best.costs.peers)]
        for link in links:
            known = []
            if link.rate_measured:
                known.append(f"{format_bytes(link.bytes_per_s)} per second")
            if link.latency_measured:
                known.append(f"round trip {2e-6 * link.latency_ns:.1f} ms")
            if known:
                ends = f"{short(link.first)} to {short(link.second)}"
                sentences.append(f"link {ends}: {', '.join(known)}, measured")
        for medium, count in sorted(Counter(each.medium for each in links if each.medium).items()):
            if count > 1:
                sentences.append(f"{count} links share the air of {medium}")
        return sentences


def _measured(planning: PlanningInput, profile: PeerProfile) -> bool:
    return all(segment.kind in profile.kinds for segment in planning.manifest.segments)
