"""Where a run stands, for `p2ptrain status`: view, members, last commit, replicas, what waits."""

from __future__ import annotations

from p2ptrain import limits
from p2ptrain.ids import DeviceId
from p2ptrain.planner.plan import Plan
from p2ptrain.runtime.reports import RunStatusReport
from p2ptrain.runtime.run_member import RunMember


def run_status_report(member: RunMember) -> RunStatusReport:
    """The state of one run at one of its members."""
    state, machine, plan = member.state, member.machine, member.plan
    name_of = state.services.directory.name_of
    log, held = state.log.statistics(), state.replicas.statistics()
    members = () if plan is None else plan.members
    return RunStatusReport(
        run=state.run,
        lineage=0 if plan is None else plan.lineage,
        view=0 if machine.view is None else machine.view.number,
        members=tuple(f"{name_of(d)}: {part_of(plan, d)}" for d in members if plan is not None),
        step=machine.statistics().committed_step,
        steps=state.contract.steps,
        safety=member.safety(),
        waits_for=waits_for(member),
        replica_step=state.whole_step,
        replica_every=0 if plan is None else plan.replica_every,
        log_steps=0 if log.last_step is None else log.last_step - (log.first_step or 0) + 1,
        log_bytes=log.held_bytes,
        log_bytes_max=limits.STEP_LOG_BYTES_MAX,
        replica_bytes=held.stored_bytes,
        data_holders=() if plan is None else tuple(map(name_of, plan.holders)),
        last_recovery=member.recovery.last,
    )


def part_of(plan: Plan, device: DeviceId) -> str:
    """What a member does under a plan, one phrase."""
    index = plan.stage_of(device)
    parts = [] if index is None else [f"stage {index + 1} of {len(plan.stages)}"]
    if device == plan.home:
        parts.append("feeds the data")
    elif device in plan.holders:
        parts.append("has a copy of the data")
    return ", ".join(parts) or "in reserve"


def waits_for(member: RunMember) -> str | None:
    """Why nothing moves, and what helps; None while it does."""
    name_of = member.state.services.directory.name_of
    paused = member.paused
    if paused is not None:
        missing = ", ".join(map(name_of, paused.missing))
        return f"paused: {paused.reason}" + (
            f"; goes on when {missing} is back, or start it anew here with --resume "
            f"{member.state.run[:8]} --force-view"
            if missing
            else ""
        )
    if member.machine.wanted:
        return f"agreeing on a new view: {member.machine.wanted[0]}"
    work = member.work
    if work is not None and work.waits_for:
        return f"getting ready: {', '.join(map(name_of, work.waits_for))}"
    if work is None:
        return "waiting for its home peer to begin"
    return None
