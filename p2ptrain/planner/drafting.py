"""From a priced candidate to the plan of a run's view, with its reasons in words."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

from p2ptrain import limits
from p2ptrain.errors import PlanInfeasible
from p2ptrain.ids import short
from p2ptrain.planner.explore import Candidate
from p2ptrain.planner.input import (
    SAME_HOST_BYTES_PER_S,
    PlanningInput,
    stage_shares,
)
from p2ptrain.planner.keepers import data_holders, replica_keepers
from p2ptrain.planner.plan import Plan, Split, StagePlan, StageShare
from p2ptrain.planner.pricing import Pricing, spans
from p2ptrain.planner.profile import Power
from p2ptrain.planner.replica_interval import REPLICA_EVERY_MIN, StageCosts, replica_interval
from p2ptrain.units import NS_PER_S, UJ_PER_J, format_bytes, format_joules, format_seconds


class Drafting:
    """One candidate on its way to a plan."""

    def __init__(self, planning: PlanningInput, pricing: Pricing, candidate: Candidate) -> None:
        self._planning, self._pricing, self._candidate = planning, pricing, candidate
        self._names = {i: each.id for i, each in enumerate(pricing.devices)}

    def plan(self, reasons: Sequence[str] = ()) -> Plan:
        """The plan; its reasons are these, how far replica sets are apart, and what was assumed.

        Raises:
            PlanInfeasible: its steps would not end within days, by what was measured.
        """
        self._check_time()
        planning, stages = self._planning, self.stages()
        members = tuple(sorted({*(p.device for p in planning.profiles), planning.home}))
        every, why = self._replica_every(len(members))
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
                keep_data_here=planning.keep_data_here or planning.private,
                holding=planning.holding,
            ),
            keep_data_here=planning.keep_data_here or planning.private,
            private=planning.private,
            replica_every=every,
            contract=planning.contract.digest,
            schedule=self._candidate.schedule or "1f1b",
            stages=stages,
            replicas=replica_keepers(
                stages, members, private_home=planning.home if planning.private else None
            ),
            step_ns=self._candidate.price.step_ns,
            step_uj=self.step_uj(),
            goal=planning.objective.goal,
            reasons=(*reasons, *why, *self.assumptions()) if reasons else (),
        )

    def _check_time(self) -> None:
        step_ns = self._candidate.price.step_ns
        if step_ns > limits.STEP_NS_MAX:
            raise PlanInfeasible(
                f"a step would take {format_seconds(step_ns / NS_PER_S)}",
                hint="look which device or link measures so slowly, and train without it",
            )

    def step_uj(self) -> int | None:
        """Predicted microjoules of a step; None where somebody does not say what it draws."""
        price = self._candidate.price
        powers = [
            self._pricing.devices[i].profile.power for i in dict.fromkeys(self._candidate.devices)
        ]
        return None if None in powers else price.total_uj

    def stages(self) -> tuple[StagePlan, ...]:
        """Every stage, with what it is expected to cost."""
        candidate = self._candidate
        if candidate.arrangement is None:
            count = self._pricing.segment_count
            split: Split = "tensor" if candidate.kind == "tensor" else "sequence"
            return (self._stage(0, (0, count), split, candidate.weights),)
        weights = candidate.arrangement.weights
        return tuple(
            self._stage(index, span, "replicas" if len(own) > 1 else "none", own)
            for index, (span, own) in enumerate(zip(spans(candidate.cuts), weights, strict=True))
        )

    def _stage(
        self, index: int, span: tuple[int, int], split: Split, weights: tuple[int, ...]
    ) -> StagePlan:
        first, end = span
        candidate, manifest = self._candidate, self._planning.manifest
        own = [i for i, share in enumerate(candidate.price.shares) if share.stage == index]
        prices = [candidate.price.shares[i] for i in own]
        tensors = [t for i in range(first, end) for t in manifest.segment_tensors(i)]
        shares = tuple(
            StageShare(
                device=self._names[price.device],
                weight=weight,
                step_compute_ns=price.passes_ns,
                memory_bytes=candidate.memory_bytes[i],
            )
            for price, weight, i in zip(prices, weights, own, strict=True)
        )
        return StagePlan(
            device=self._names[prices[0].device],
            first_segment=first,
            segment_count=end - first,
            in_flight_max=self._in_flight(index),
            step_compute_ns=max(price.passes_ns for price in prices),
            memory_bytes=max(candidate.memory_bytes[i] for i in own),
            parameter_count=sum(tensor.elements for tensor in tensors),
            split=split,
            shares=shares if split != "none" else (),
        )

    def _in_flight(self, index: int) -> int:
        arrangement = self._candidate.arrangement
        if arrangement is None:
            return 1
        return max(replica.holds.in_flight for replica in arrangement.stages[index])

    def _replica_every(self, members: int) -> tuple[int, list[str]]:
        candidate = self._candidate
        asked = self._planning.replica_every
        if candidate.arrangement is None:
            return asked or self._slices_every(), []
        step_ns = candidate.price.step_ns
        found = self._pricing.interval(candidate.arrangement, candidate.cuts, step_ns)
        if asked is not None or members < 2:
            return asked or found.steps, []
        recovery = format_seconds(found.replay_ns / NS_PER_S)
        return found.steps, [
            f"replica sets every {found.steps} steps, {found.reason}: "
            f"a lost stage is predicted to be back within {recovery}"
        ]

    def _slices_every(self) -> int:
        """Steps between replica sets of shards, of which two peers fetch everybody's slices; after
        a loss one peer makes the steps of all shards again."""
        candidate, pricing = self._candidate, self._pricing
        if candidate.kind != "tensor":
            return REPLICA_EVERY_MIN
        costs = StageCosts(
            state_bytes=pricing.state_bytes,
            log_bytes=0,
            compute_ns=sum(share.passes_ns for share in candidate.price.shares),
            bytes_per_s=min(pricing.link(a, b).bytes_per_s for a, b in self._pairs()),
        )
        return replica_interval([costs], step_ns=candidate.price.step_ns).steps

    def stage_reasons(self) -> tuple[str, ...]:
        """One sentence per stage and device."""
        plan = self.plan()
        sentences = []
        for index, (stage, share) in enumerate(zip(plan.stages, stage_shares(plan), strict=True)):
            work = f"segments {stage.first_segment} to {stage.segments[-1]}"
            for rank, device in enumerate(stage.devices):
                room = format_bytes(self._room(device))
                owns = device == plan.home and not self._planning.own_data
                home = ", owns the data" if owns else ""
                sentences.append(
                    f"stage {index} on {short(device)}: {work}, {_part(stage, rank)}"
                    f"{100 * share:.0f} % of the compute, "
                    f"{format_bytes(stage.memory_of(device))} of {room}{home}"
                )
        return tuple(sentences)

    def _room(self, device: str) -> int:
        own = (each.profile.memory_bytes for each in self._pricing.devices if each.id == device)
        return next(own)

    def assumptions(self) -> list[str]:
        """What the prediction takes for granted: shared cores, links that nobody has measured;
        and what was measured of links that are used."""
        peers = [self._pricing.devices[i].profile for i in dict.fromkeys(self._candidate.devices)]
        sentences = self._joules()
        used = Counter(peer.cores_identity for peer in peers)
        for peer in sorted(peers, key=lambda p: p.device):
            needed = used.pop(peer.cores_identity, 0) * self._planning.contract.threads
            if needed > peer.cores:
                sentences.append(
                    f"{needed} threads share the {peer.cores} cores of one host: "
                    f"times there are stretched {needed / peer.cores:.1f} times"
                )
        links = [(self._pricing.link(a, b), a, b) for a, b in self._pairs()]
        hosts = [each.profile.host for each in self._pricing.devices]
        unknown = [(link, hosts[a] == hosts[b]) for link, a, b in links if not link.rate_measured]
        if any(together for _, together in unknown):
            rate = format_bytes(SAME_HOST_BYTES_PER_S)
            sentences.append(f"links on one host are assumed to carry {rate} per second")
        apart = [link.bytes_per_s for link, together in unknown if not together]
        if apart:
            rate = format_bytes(min(apart))
            sentences.append(f"links between hosts are assumed to carry {rate} per second")
        return [*sentences, *self._measurements()]

    def _joules(self) -> list[str]:
        """What a step is predicted to cost, and how well the watts are known."""
        step_uj = self.step_uj()
        if step_uj is None:
            return []
        powers = [
            self._pricing.devices[i].profile.power for i in dict.fromkeys(self._candidate.devices)
        ]
        how = _known_watts([power for power in powers if power is not None])
        samples = self._planning.contract.minibatch_size
        joules = format_joules(step_uj / UJ_PER_J / samples)
        expected = f"{joules} a sample expected, idle time included; watts are {how}"
        return [expected, *self._batteries()]

    def _batteries(self) -> list[str]:
        """What the steps that are left take of each battery."""
        price, sentences = self._candidate.price, []
        for share, step_uj in zip(price.shares, price.device_uj, strict=True):
            device = self._pricing.devices[share.device]
            if device.battery_uj is not None:
                taken = format_joules(step_uj * self._pricing.question.steps / UJ_PER_J)
                has = format_joules(device.battery_uj / UJ_PER_J)
                sentences.append(
                    f"the run takes {taken} of the {has} that the battery of {short(device.id)} "
                    "has above its reserve"
                )
        return sentences

    def _pairs(self) -> list[tuple[int, int]]:
        """Devices that exchange tensors: of neighbouring stages, and of one stage."""
        arrangement = self._candidate.arrangement
        groups = (self._candidate.devices,) if arrangement is None else arrangement.groups
        within = [pair for group in groups for pair in itertools.combinations(group, 2)]
        across = [
            pair for one, next_ in itertools.pairwise(groups)
            for pair in itertools.product(one, next_)
        ]  # fmt: skip
        return across + within

    def _measurements(self) -> list[str]:
        sentences = []
        links = [self._pricing.link(a, b) for a, b in self._pairs()]
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


def _known_watts(powers: Sequence[Power]) -> str:
    """How many peers' watts above idle were measured, and how far the others' may be off."""
    modelled = [power for power in powers if not power.measured]
    bands = [power.error_permille for power in modelled if power.error_permille is not None]
    within = f" within {max(bands) / 10:.0f} %" if bands else ""
    if len(modelled) == len(powers):
        return f"all modelled{within}"
    if not modelled:
        return "all measured"
    measured = len(powers) - len(modelled)
    return f"measured on {measured} of {len(powers)} peers, else modelled{within}"


def _part(stage: StagePlan, rank: int) -> str:
    """What a peer of a shared stage does of it."""
    if stage.split == "none":
        return ""
    whole = sum(stage.weights)
    what = {"replicas": "of the microbatches", "tensor": "of heads and columns"}
    return f"{stage.weights[rank]} of {whole} parts {what.get(stage.split, 'of the positions')}, "
