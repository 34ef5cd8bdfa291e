"""Choose the plan of a run's view: which peers, which segments where, and why.

Pure and deterministic: costs are integers, ties are broken by device id, the search is bounded by
counts. Whoever plans with equal input proposes an equal plan. It is the search of what-if
questions (`planner.explore`), on what members have measured.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from p2ptrain.ids import short
from p2ptrain.planner.asked import Known, asked_candidate
from p2ptrain.planner.drafting import Drafting
from p2ptrain.planner.explore import Candidate, Explorer, Found
from p2ptrain.planner.infeasible import infeasible
from p2ptrain.planner.input import LeftOut, PlanChoice, PlanningInput
from p2ptrain.planner.kinds import BY_NAME_ONLY, refuse_what_if
from p2ptrain.planner.outsiders import nothing_with
from p2ptrain.planner.plan import Plan
from p2ptrain.planner.plan_file import AskedPlan
from p2ptrain.planner.pricing import Pricing
from p2ptrain.planner.profile import PeerProfile, Power
from p2ptrain.planner.question import Device, Question
from p2ptrain.units import NS_PER_S, UJ_PER_J, format_joules, format_seconds

EQUAL_PER_MILLE: Final = 5
"""Predicted steps that differ by less are equal: fewer peers, then the home peer first."""
GAIN_PERCENT: Final = 10
"""By how much a step under another kind of parallelism must be shorter to be worth a word."""
UNKNOWN_POWER: Final = Power(idle_uw=0, busy_uw=0, pj_per_byte=0)


def run_question(planning: PlanningInput) -> Question:
    """The question of a run: who of those that have measured the whole model runs what."""
    return Question(
        manifest=planning.manifest,
        contract=planning.contract,
        devices=tuple(
            Device(
                profile=profile,
                power=profile.power or UNKNOWN_POWER,
                battery_uj=None if profile.battery is None else profile.battery.spendable_uj,
            )
            for profile in planning.profiles
            if _unable(planning, profile) is None
        ),
        stage_memory=planning.stage_memory,
        links=planning.links,
        objective=planning.objective,
        schedules=(planning.schedule, *planning.further_schedules),
        kinds=planning.kinds,
        stages=planning.stages,
        home=planning.home,
        private=planning.private,
        for_run=True,
        replica_every=planning.replica_every,
        steps_left=planning.steps_left,
        equal_per_mille=EQUAL_PER_MILLE,
    )


def choose_plan(planning: PlanningInput) -> PlanChoice:
    """The best plan that every peer's memory holds.

    Raises:
        PlanInfeasible: nothing fits; the message says what is short, the hint the nearest change.
        ConfigError: the schedule is unknown.
    """
    pricing = Pricing(run_question(planning))
    found = Explorer(pricing).run()
    if found.best is None:
        raise infeasible(planning, pricing, found)
    refuse_what_if(found.best.kind)
    chosen = _Chosen(planning, pricing, found, found.best)
    return PlanChoice(plan=chosen.plan(), left_out=chosen.left_out())


def asked_plan(planning: PlanningInput, asked: AskedPlan, known: Known) -> PlanChoice:
    """The plan that a person asks for, on what its devices have measured.

    Raises:
        ConfigError: it does not match the devices that are there, or the model.
        PlanInfeasible: it does not fit the memory, the bundle cannot be divided that way, or this
            version cannot run such plans.
    """
    pricing = Pricing(run_question(planning))
    explorer = Explorer(pricing)
    candidate = asked_candidate(asked, explorer=explorer, pricing=pricing, known=known)
    refuse_what_if(candidate.kind)
    draft = Drafting(planning, pricing, candidate)
    step = format_seconds(candidate.price.step_ns / NS_PER_S)
    count, everyone = len(candidate.devices), len(planning.profiles)
    headline = f"{count} of {everyone} peers compute as asked: a step is predicted to take {step}"
    taken = {pricing.devices[i].id for i in candidate.devices}
    left_out = tuple(
        LeftOut(device=device, reason="the plan that was asked for does without it")
        for device in sorted(p.device for p in planning.profiles if p.device not in taken)
    )
    return PlanChoice(plan=draft.plan([headline, *draft.stage_reasons()]), left_out=left_out)


class _Chosen:
    """The best candidate, what to say of it, and of those that it does without."""

    def __init__(
        self, planning: PlanningInput, pricing: Pricing, found: Found, best: Candidate
    ) -> None:
        self._planning, self._pricing, self._found, self._best = planning, pricing, found, best
        self._draft = Drafting(planning, pricing, best)

    def plan(self) -> Plan:
        """The plan with everything that is said of it."""
        left_out = [f"{short(one.device)} left out: {one.reason}" for one in self.left_out()]
        reasons = [
            self._headline(),
            *self._private(),
            *self._draft.stage_reasons(),
            *left_out,
            *self._other_kind(),
        ]
        return self._draft.plan(reasons)

    def _headline(self) -> str:
        price, known = self._best.price, len(self._planning.profiles)
        count = len(set(self._best.devices))
        step = format_seconds(price.step_ns / NS_PER_S)
        asked = " as asked" if self._planning.stages is not None else ""
        text = (
            f"{count} of {known} peers compute{asked}{self._for()}: "
            f"a step is predicted to take {step}"
        )
        if count == 1:
            return text
        alone = self._found.by_kind.get("one device")
        if alone is not None:
            ratio = alone.price.step_ns / max(price.step_ns, 1)
            alone_is = "the data's owner" if self._planning.private else "the best single peer"
            return f"{text}, {ratio:.2f} times the speed of {alone_is}"
        if self._planning.stages is None and "one device" in self._planning.kinds:
            return f"{text}; the model fits no single peer"
        return text

    def _private(self) -> list[str]:
        """What privacy asks of the plan."""
        if not self._planning.private:
            return []
        home = short(self._planning.home)
        if len(set(self._best.devices)) > 1:
            return [f"private: {home} has the first and the last stage, others see no data"]
        why = self._found.objections.get("pipeline")
        return [f"private: {home} trains alone{f': {why}' if why else ''}"]

    def _for(self) -> str:
        return " for least energy" if self._planning.objective.goal == "energy" else ""

    def left_out(self) -> tuple[LeftOut, ...]:
        """Peers without a part, and why."""
        chosen = {self._pricing.devices[i].id for i in self._best.devices}
        profiles = sorted(self._planning.profiles, key=lambda profile: profile.device)
        return tuple(
            LeftOut(device=profile.device, reason=self._reason_against(profile))
            for profile in profiles
            if profile.device not in chosen
        )

    def _reason_against(self, profile: PeerProfile) -> str:
        unable = _unable(self._planning, profile)
        if unable is not None:
            return unable
        index = next(i for i, d in enumerate(self._pricing.devices) if d.id == profile.device)
        with_it = self._found.with_device.get(index)
        if with_it is None:
            return nothing_with(self._pricing, self._found, index)
        if self._planning.objective.goal == "energy":
            joules = format_joules(with_it.price.total_uj / UJ_PER_J)
            return f"the best step found with it costs {joules}"
        step = format_seconds(with_it.price.step_ns / NS_PER_S)
        return f"the best step found with it takes {step}{self._shares_cores(profile)}"

    def _shares_cores(self, profile: PeerProfile) -> str:
        peers = [self._pricing.devices[i].profile for i in dict.fromkeys(self._best.devices)]
        same = sum(peer.cores_identity == profile.cores_identity for peer in peers)
        needed = (same + 1) * self._planning.contract.threads
        if same and needed > profile.cores:
            return f", its host would need {needed} threads on {profile.cores} cores"
        return ""

    def _other_kind(self) -> list[str]:
        """Another kind of parallelism that is clearly faster and that nobody has asked for."""
        kinds = self._planning.compared
        if not kinds or self._planning.stages is not None:
            return []
        if self._planning.objective.goal != "time":
            return []
        question = dataclasses.replace(self._pricing.question, kinds=kinds)
        other = Explorer(Pricing(question)).run().best
        own_ns = self._best.price.step_ns
        if other is None or other.price.step_ns * 100 > own_ns * (100 - GAIN_PERCENT):
            return []
        step = format_seconds(other.price.step_ns / NS_PER_S)
        allows = "--parallelism auto allows it"
        if other.kind in BY_NAME_ONLY:
            allows = f"--parallelism {other.kind} allows it, but {BY_NAME_ONLY[other.kind]}"
        return [
            f"{other.kind} parallelism would take {step} a step, and give other bits than one "
            f"peer: {allows}"
        ]


def _unable(planning: PlanningInput, profile: PeerProfile) -> str | None:
    """Why a peer can have no part at all; None: it can."""
    if any(segment.kind not in profile.kinds for segment in planning.manifest.segments):
        return "it has not measured this model"
    if planning.objective.needs_watts and profile.power is None:
        return "it does not say what it draws"
    return None
