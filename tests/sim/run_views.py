"""Small valid views and records for machines that only compare them."""

from __future__ import annotations

import itertools
from dataclasses import replace

from p2ptrain.agreement.run_events import ProposalWanted
from p2ptrain.agreement.view import View
from p2ptrain.ids import DeviceId, ViewNumber
from p2ptrain.planner.plan import Plan, StagePlan
from p2ptrain.planner.profile import KindCost, PeerProfile
from p2ptrain.recovery.inventory import Inventory, SegmentSpan
from p2ptrain.recovery.restoration import Restoration, SpanAt
from p2ptrain.training.step_record import StepRecord
from tests.sim.plans import BUILD, make_contract, make_plan

CONTRACT = make_contract()
NOTHING = Inventory(live=None, states=(), logs=(), has_data=False, linked=())


def make_step(step: int, loss: float = 1.0) -> StepRecord:
    return StepRecord(step=step, loss=loss, gradient_norm=1.0, clip_scale=0.5)


def make_profile(device: DeviceId) -> PeerProfile:
    return PeerProfile(
        device=device, kinds={"block": KindCost(forward_ns=1, backward_ns=2)},
        memory_bytes=1 << 30, host="host", cores=2, build=BUILD,
    )  # fmt: skip


def first_view(*members: DeviceId, home: DeviceId | None = None, lineage: int = 0) -> View:
    """A lineage's first view: one segment and one stage for each member."""
    return View(
        plan=make_plan(*members, home=home, contract=CONTRACT, lineage=lineage),
        contract=CONTRACT, profiles=tuple(make_profile(d) for d in sorted(members)),
        previous=None, resume_step=0, records=(), restoration=None,
    )  # fmt: skip


def next_view(wanted: ProposalWanted, *members: DeviceId, reason: str = "") -> View:
    """What a shell could answer: these members, the first of them (or the old one) at home."""
    base = wanted.base
    home = base.plan.home if base.plan.home in members else members[0]
    plan = make_plan(
        *members, home=home, view=wanted.number, lineage=base.lineage, contract=CONTRACT,
        reason=reason,
    )  # fmt: skip
    sources = tuple(
        SpanAt(span=SegmentSpan(first=stage.first_segment, count=1), device=stage.device)
        for stage in plan.stages
    )
    return View(
        plan=plan, contract=CONTRACT, profiles=tuple(make_profile(d) for d in plan.members),
        previous=base.plan.digest, resume_step=wanted.resume_step, records=wanted.records,
        restoration=Restoration(replays=(), sources=sources),
    )  # fmt: skip


def staged_view(*stages: tuple[DeviceId, int], reserves: tuple[DeviceId, ...] = ()) -> View:
    """A first view of stages with so many segments each, the first device at home."""
    plan = staged_plan(make_plan(*(device for device, _ in stages), *reserves), *stages)
    return View(
        plan=plan, contract=CONTRACT, profiles=tuple(make_profile(d) for d in plan.members),
        previous=None, resume_step=0, records=(), restoration=None,
    )  # fmt: skip


def staged_plan(plan: Plan, *stages: tuple[DeviceId, int], **changes: object) -> Plan:
    """The plan with these stages and other changes."""
    planned = planned_stages(*stages)
    return replace(plan, stages=planned, **changes)  # type: ignore[arg-type]  # by field name


def planned_stages(*stages: tuple[DeviceId, int]) -> tuple[StagePlan, ...]:
    """Stages of so many segments each."""
    firsts = itertools.accumulate((count for _, count in stages), initial=0)
    return tuple(
        StagePlan(
            device=device, first_segment=first, segment_count=count, in_flight_max=1,
            step_compute_ns=count, memory_bytes=count, parameter_count=count,
        )
        for (device, count), first in zip(stages, firsts, strict=False)
    )  # fmt: skip


def followed(base: View, *stages: tuple[DeviceId, int], resume_step: int) -> View:
    """A next view with these stages, every one of which has its state already."""
    members = tuple(sorted({device for device, _ in stages}))
    number = ViewNumber(base.number + 1)
    plan = staged_plan(base.plan, *stages, view=number, members=members)
    sources = tuple(
        SpanAt(
            span=SegmentSpan(first=stage.first_segment, count=stage.segment_count),
            device=stage.device,
        )
        for stage in plan.stages
    )
    return View(
        plan=plan, contract=CONTRACT, profiles=tuple(make_profile(d) for d in members),
        previous=base.plan.digest, resume_step=resume_step, records=(),
        restoration=Restoration(replays=(), sources=sources),
    )  # fmt: skip
