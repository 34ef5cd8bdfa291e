"""A decided plan as a person reads it, on every member alike."""

from __future__ import annotations

from collections.abc import Callable

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.ids import DeviceId
from p2ptrain.planner.input import stage_shares
from p2ptrain.planner.plan import Plan
from p2ptrain.planner.segment_costs import crossing_bytes
from p2ptrain.runtime.reports import OwnerReport, PlanReport, StageReport
from p2ptrain.training.contract import Contract
from p2ptrain.units import NS_PER_S, UJ_PER_J


def predicted_boundary_bytes(plan: Plan, contract: Contract, manifest: Manifest) -> int:
    """Activations and cotangents that a step sends between peers, as tensors, without framing."""
    ends = [stage.segments[-1] for stage in plan.stages[:-1]]
    each = (sum(crossing_bytes(manifest, contract, end)) for end in ends)
    return contract.microbatches * sum(each)


def plan_report(
    plan: Plan, contract: Contract, manifest: Manifest, name_of: Callable[[DeviceId], str]
) -> PlanReport:
    """The plan with its peers' names, its segments' names and its reasons."""
    shares = stage_shares(plan)
    stages = tuple(
        StageReport(
            device=device,
            name=name_of(device),
            stage=index,
            first_segment=stage.first_segment,
            last_segment=stage.segments[-1],
            segments=tuple(manifest.segments[i].name for i in stage.segments),
            parameters=stage.parameter_count,
            memory_bytes=stage.memory_of(device),
            share=shares[index],
            split=stage.split,
            part=weight / sum(stage.weights),
        )
        for index, stage in enumerate(plan.stages)
        for device, weight in zip(stage.devices, stage.weights, strict=True)
    )
    return PlanReport(
        run=plan.run,
        bundle=manifest.name,
        plan=plan.digest,
        view=plan.view,
        schedule=plan.schedule,
        stages=stages,
        predicted_step_s=plan.step_ns / NS_PER_S,
        predicted_boundary_bytes=predicted_boundary_bytes(plan, contract, manifest),
        predicted_step_joules=None if plan.step_uj is None else plan.step_uj / UJ_PER_J,
        exactness=contract.exactness,
        reasons=plan.reasons,
        owners=owner_reports(contract, name_of),
    )


def owner_reports(
    contract: Contract, name_of: Callable[[DeviceId], str]
) -> tuple[OwnerReport, ...]:
    """Whose own data a run trains on; empty where one device feeds all."""
    return tuple(
        OwnerReport(
            device=owner.device,
            name=name_of(owner.device),
            records=owner.records,
            unit=owner.unit,
            microbatches=owner.microbatches,
        )
        for owner in contract.owners
    )
