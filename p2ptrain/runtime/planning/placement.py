"""From measured profiles to a plan and the complete numerics contract of its run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.errors import PlanInfeasible
from p2ptrain.ids import DeviceId
from p2ptrain.planner.asked import Known
from p2ptrain.planner.choose import asked_plan, choose_plan
from p2ptrain.planner.delaying import against_delaying
from p2ptrain.planner.input import LeftOut, PlanningInput, StageMemory
from p2ptrain.planner.kinds import kinds_at_start, kinds_compared
from p2ptrain.planner.links import LinkFigure, link_estimates
from p2ptrain.planner.plan import Plan
from p2ptrain.planner.plan_file import AskedPlan
from p2ptrain.planner.profile import PeerProfile
from p2ptrain.runtime.planning.job import Job, wanted_objective
from p2ptrain.runtime.planning.own_placement import (
    able_owners,
    asked_of,
    counted_plan,
    owned_contract,
    recorded,
)
from p2ptrain.runtime.planning.variants import Way, best, chosen, contracts
from p2ptrain.runtime.reports import TrainRequest
from p2ptrain.schedule.actions import Held, choices, delays_gradients
from p2ptrain.training.contract import Contract, RuntimeBuild
from p2ptrain.training.memory import MemoryModel
from p2ptrain.training.owners import OwnedData


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What the home peer proposes."""

    plan: Plan
    contract: Contract
    left_out: tuple[LeftOut, ...]
    profiles: Mapping[DeviceId, PeerProfile]
    """For the microbatch size of the contract."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """What is known of a run's group when its first plan is made."""

    profiles: Mapping[DeviceId, PeerProfile]
    """Of those that can take part."""
    home: DeviceId
    links: Mapping[DeviceId, Iterable[LinkFigure]] = field(default_factory=dict)
    """What each device has measured."""
    known: Known = field(default_factory=Known)
    """How people call devices, and why some have no part."""
    data: Mapping[DeviceId, OwnedData] = field(default_factory=dict)
    """What they have told of their own, where each feeds its own."""


def place(request: TrainRequest, job: Job, group: Group) -> Placement:
    """Choose a plan, or take the one that is asked for; blocking, pure computation.

    A resumed run takes only peers whose runtime build its contract names: another would change
    the bits.

    Raises:
        PlanInfeasible: no placement fits; the sentence names the nearest change.
        ConfigError: a plan that is asked for names devices or segments that are not there.
        DataError: an owner's data is not what a resumed run was begun with.
    """
    outsiders = _outsiders(job, group.profiles.values())
    out = {outsider.device: outsider.reason for outsider in outsiders}
    able = tuple(p for p in group.profiles.values() if p.device not in out)
    if not able:
        raise PlanInfeasible("no peer can take part in this run")
    known = replace(group.known, absent={**group.known.absent, **out})
    group = replace(group, known=known)
    ways, refusals = [], []
    for contract in (job.contract,) if job.resumed else contracts(request, job.contract):
        try:
            ways.append(_way(request, job, group, able, contract))
        except PlanInfeasible as error:
            refusals.append(error)
    if not ways:
        raise refusals[0]
    way = best(ways)
    plan, contract = way.plan, way.contract
    if not job.resumed:
        contract = replace(contract, parallelism=_parallelism(contract, plan))
        contract = with_builds(contract, (p.build for p in able if p.device in plan.devices))
    reasons = plan.reasons
    if len(ways) + len(refusals) > 1:
        reasons += (chosen(way, len(ways) + len(refusals)),)
    return Placement(
        plan=replace(plan, contract=contract.digest, reasons=reasons),
        contract=contract,
        left_out=(*outsiders, *way.left_out),
        profiles={profile.device: profile for profile in way.profiles},
    )


def _way(
    request: TrainRequest,
    job: Job,
    group: Group,
    able: tuple[PeerProfile, ...],
    contract: Contract,
) -> Way:
    """The best plan under one contract, or the one that is asked for."""
    manifest, size = job.bundle.manifest, contract.microbatch_size
    sized = [_at_size(profile, size, job.contract) for profile in able]
    profiles = tuple(profile for profile in sized if profile is not None)
    schedule, further, notes = _settled(job.wanted_schedule(request), manifest, contract)
    asked, planned, lacking = job.asked, profiles, tuple[LeftOut, ...]()
    if job.own_data:
        asked, planned, lacking = _owners(job, group, profiles, contract)
    planning = PlanningInput(
        manifest=manifest,
        contract=contract,
        profiles=tuple(planning_profile(profile, contract) for profile in planned),
        home=group.home,
        stage_memory=predicted_memory(manifest, contract),
        memory_of=lambda other: predicted_memory(manifest, other),
        run=job.run,
        lineage=job.lineage,
        view=job.view,
        schedule=schedule,
        further_schedules=further,
        stages=request.stages,
        objective=wanted_objective(request),
        kinds=kinds_at_start(contract.parallelism),
        compared=() if job.private else kinds_compared(contract.parallelism),
        keep_data_here=request.keep_data_here or job.private or job.own_data,
        private=job.private,
        own_data=job.own_data,
        replica_every=request.replicate_every,
        steps_left=contract.steps - job.first_step,
        links=link_estimates(group.links, {p.device: p.host for p in profiles}),
    )
    if asked is None:
        choice = choose_plan(planning)
    else:
        choice = asked_plan(planning, replace(asked, schedule=schedule), group.known)
    plan = replace(choice.plan, reasons=(*choice.plan.reasons, *notes))
    if job.own_data:
        contract = owned_contract(contract, plan, group.data)
        plan = counted_plan(plan, contract)
    left_out = (*lacking, *choice.left_out)
    return Way(contract=contract, plan=plan, left_out=left_out, profiles=profiles)


def _owners(
    job: Job, group: Group, profiles: tuple[PeerProfile, ...], contract: Contract
) -> tuple[AskedPlan, tuple[PeerProfile, ...], tuple[LeftOut, ...]]:
    """The plan to ask for where each feeds its own, the owners who may be in it, and who cannot."""
    manifest = job.bundle.manifest
    if job.resumed:
        asked = recorded(contract, manifest, group.data, group.known)
        devices = {owner.device for owner in contract.owners}
        return asked, tuple(p for p in profiles if p.device in devices), ()
    memory = predicted_memory(manifest, contract)
    able, lacking = able_owners(profiles, group.data, memory, manifest)
    return job.asked or asked_of(able, contract, manifest), able, lacking


def _at_size(profile: PeerProfile, size: int, measured: Contract) -> PeerProfile | None:
    if size == measured.microbatch_size:
        return replace(profile, other_sizes=())
    return profile.at_size(size)


def _parallelism(contract: Contract, plan: Plan) -> str:
    """What was asked for; what a plan of one's own shows where nothing was."""
    splits = {stage.split for stage in plan.stages} - {"none"}
    if contract.parallelism != "pipeline" or not splits:
        return contract.parallelism
    if splits == {"replicas"}:
        return "data" if len(plan.stages) == 1 else "hybrid"
    return splits.pop()


def predicted_memory(manifest: Manifest, contract: Contract) -> StageMemory:
    """The memory of a stage as the planner asks for it."""
    model = MemoryModel(manifest, contract)

    def predict(segments: range, holds: Held) -> int:
        return model.stage(segments, holds).total

    return predict


def _settled(
    asked: str, manifest: Manifest, contract: Contract
) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """The schedule that a run can have, what else may be chosen, and what the plan says of it."""
    against = against_delaying(manifest, contract)
    schedule, *further = choices(asked, delayable=against is None)
    if against is None or not delays_gradients(asked):
        return schedule, tuple(further), ()
    return schedule, tuple(further), (f"schedule {schedule}, not {asked}: {against}",)


def with_builds(contract: Contract, builds: Iterable[RuntimeBuild]) -> Contract:
    """The contract of a new run, complete with the distinct runtime builds that take part."""
    return replace(contract, builds=tuple(sorted(set(builds), key=repr)))


def planning_profile(profile: PeerProfile, contract: Contract) -> PeerProfile:
    """The profile with the forward counted into each backward, where that runs it again."""
    if not contract.rematerialise:
        return profile
    kinds = {
        name: replace(
            cost, backward_ns=cost.forward_ns + cost.backward_ns, cotangents_ns=None, gradients_ns=0
        )
        for name, cost in profile.kinds.items()
    }
    return replace(profile, kinds=kinds)


def _outsiders(job: Job, profiles: Iterable[PeerProfile]) -> tuple[LeftOut, ...]:
    if not job.resumed:
        return ()
    reason = "its runtime build is not in the run's numerics contract"
    return tuple(
        LeftOut(device=profile.device, reason=reason)
        for profile in profiles
        if profile.build not in job.contract.builds
    )
