"""Who feeds its own data in a run, and how many microbatches of each step.

Every device that has told of data takes part, as long as it can hold the model and numbers its
classes like the others. What comes of it goes into the numerics contract and never changes: a view
without one of the owners would be another run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.errors import DataError, PlanInfeasible
from p2ptrain.ids import DeviceId
from p2ptrain.planner.asked import Known
from p2ptrain.planner.input import LeftOut, StageMemory
from p2ptrain.planner.plan import Plan
from p2ptrain.planner.plan_file import AskedPlan, AskedStage
from p2ptrain.planner.profile import PeerProfile
from p2ptrain.schedule.actions import ONE
from p2ptrain.schedule.replicated import owners_by_weight
from p2ptrain.training.contract import Contract
from p2ptrain.training.owners import DataOwner, OwnedData, joint_digest, microbatch_shares
from p2ptrain.units import format_bytes

GIVE_DATA = "start it on another device: p2ptrain join --data PATH"
Told = Mapping[DeviceId, OwnedData]


def able_owners(
    profiles: Sequence[PeerProfile], told: Told, memory: StageMemory, manifest: Manifest
) -> tuple[tuple[PeerProfile, ...], tuple[LeftOut, ...]]:
    """Who of these can be an owner, by device, and who cannot.

    Raises:
        PlanInfeasible: fewer than two can.
    """
    able: list[PeerProfile] = []
    out: list[LeftOut] = []
    needs = memory(range(len(manifest.segments)), ONE)
    having = sorted((p for p in profiles if p.device in told), key=lambda p: p.device)
    for profile in having:
        reason = None
        if profile.memory_bytes < needs:
            room = format_bytes(profile.memory_bytes)
            reason = f"the whole model needs {format_bytes(needs)} of its {room}"
        elif able and told[profile.device].classes != told[able[0].device].classes:
            reason = "its data numbers the classes otherwise: use a model that names them"
        if reason is None:
            able.append(profile)
        else:
            out.append(LeftOut(device=profile.device, reason=reason))
    if len(able) < 2:
        others = "; ".join(each.reason for each in out)
        raise PlanInfeasible(
            f"{len(able)} of the peers have data for this run, and it takes two"
            + (f" ({others})" if others else ""),
            hint=GIVE_DATA if able else "start p2ptrain join --data PATH on two devices or more",
        )
    return tuple(able), tuple(out)


def asked_of(profiles: Sequence[PeerProfile], contract: Contract, manifest: Manifest) -> AskedPlan:
    """The plan of these owners: microbatches by how quick each is, at least one for everybody.

    Raises:
        PlanInfeasible: a step has fewer microbatches.
    """
    if contract.microbatches < len(profiles):
        raise PlanInfeasible(
            f"{len(profiles)} devices have data, but a step has {contract.microbatches} "
            "microbatches",
            hint=f"use --microbatches {len(profiles)} or more",
        )
    kinds = [segment.kind for segment in manifest.segments]
    times = [
        sum(p.kinds[kind].forward_ns + p.kinds[kind].backward_ns for kind in kinds)
        for p in profiles
    ]
    shares = microbatch_shares(times, contract.microbatches)
    return _asked("--own-data", [profile.device for profile in profiles], shares, manifest)


def recorded(contract: Contract, manifest: Manifest, told: Told, known: Known) -> AskedPlan:
    """The plan of a run that is resumed: the same owners, with the same data.

    Raises:
        PlanInfeasible: one is not there.
        DataError: one has other data than the run was begun with.
    """
    for owner in contract.owners:
        name = known.name_of(owner.device)
        if owner.device in told and not owner.has(told[owner.device]):
            raise DataError(
                f"the data of {name} has changed since the run began",
                hint=f"restore it on {name}, or start a new run without --resume",
            )
        why = known.absent.get(owner.device)
        if why is not None or owner.device not in told:
            why = why or "it is not there"
            raise PlanInfeasible(
                f"the run trains on the data of {name}: {why}",
                hint=f"start the peer of {name} with its data, or begin a new run without it",
            )
    shares = [owner.microbatches for owner in contract.owners]
    return _asked("--resume", [owner.device for owner in contract.owners], shares, manifest)


def owned_contract(contract: Contract, plan: Plan, told: Told) -> Contract:
    """The contract with the owners of a plan, by rank.

    Raises:
        PlanInfeasible: the plan leaves one without a microbatch.
    """
    stage = plan.stages[0]
    shared = owners_by_weight(stage.weights, contract.microbatches)
    counts = [shared.count(rank) for rank in range(len(stage.devices))]
    if min(counts) < 1:
        raise PlanInfeasible(
            f"an owner gets none of {contract.microbatches} microbatches",
            hint="use more --microbatches, or more even weights",
        )
    owners = tuple(
        DataOwner(
            device=device,
            training=told[device].training,
            heldout=told[device].heldout,
            records=told[device].records,
            unit=told[device].unit,
            microbatches=count,
        )
        for device, count in zip(stage.devices, counts, strict=True)
    )
    return replace(
        contract,
        owners=owners,
        training_data=joint_digest(owner.training for owner in owners),
        heldout_data=joint_digest(owner.heldout for owner in owners),
        heldout_microbatches=max(contract.heldout_microbatches, contract.microbatches),
    )


def counted_plan(plan: Plan, contract: Contract) -> Plan:
    """The plan as it says the same as the owners do: their microbatches as weights, no reserves."""
    stage = plan.stages[0]
    shares = tuple(
        replace(share, weight=owner.microbatches)
        for share, owner in zip(stage.shares, contract.owners, strict=True)
    )
    count = len(contract.owners)
    headline = f"{count} peers feed their own data: each runs the whole model on its own records"
    return replace(
        plan,
        members=tuple(sorted({plan.home, *stage.devices})),
        stages=(replace(stage, shares=shares),),
        reasons=(headline, *plan.reasons),
    )


def is_of_owners(plan: Plan, owners: Sequence[DataOwner]) -> bool:
    """Whether a plan gives each owner, by rank, its microbatches whole, nobody else anything, and
    lets the data stay."""
    if len(plan.stages) != 1 or not plan.keep_data_here:
        return False
    stage = plan.stages[0]
    wanted = [(owner.device, owner.microbatches) for owner in owners]
    given = list(zip(stage.devices, stage.weights, strict=True))
    return stage.split == "replicas" and given == wanted


def _asked(
    file: str, devices: Sequence[DeviceId], shares: Sequence[int], manifest: Manifest
) -> AskedPlan:
    stage = AskedStage(
        devices=tuple(devices),
        segments=len(manifest.segments),
        split="replicas",
        weights=tuple(shares),
    )
    return AskedPlan(file=file, schedule=None, stages=(stage,))
