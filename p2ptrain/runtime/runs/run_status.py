"""Where a run stands, for `p2ptrain status`: view, members, last commit, replicas, what waits."""

from __future__ import annotations

from collections.abc import Collection

from p2ptrain import limits
from p2ptrain.agreement.run_events import Paused
from p2ptrain.errors import P2PTrainError
from p2ptrain.ids import DeviceId, short
from p2ptrain.planner.plan import Plan
from p2ptrain.runtime.reports import RunStatusReport
from p2ptrain.runtime.runs.first_view import stages_in_words
from p2ptrain.runtime.runs.run_member import RunMember


def run_status_report(member: RunMember) -> RunStatusReport:
    """The state of one run at one of its members."""
    state, machine, plan = member.state, member.machine, member.plan
    name_of = state.services.directory.name_of
    log, held = state.log.statistics(), state.replicas.statistics()
    members = () if plan is None else plan.members
    owners = tuple(owner.device for owner in state.contract.owners)
    holders = () if plan is None else owners or plan.holders
    return RunStatusReport(
        run=state.run,
        lineage=0 if plan is None else plan.lineage,
        view=0 if machine.view is None else machine.view.number,
        members=tuple(
            f"{name_of(d)}: {part_of(plan, d, owners)}" for d in members if plan is not None
        ),
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
        data_holders=tuple(map(name_of, holders)),
        last_recovery=member.recovery.last,
        prediction=None if member.home is None else member.home.progress.prediction(),
    )


def part_of(plan: Plan, device: DeviceId, owners: Collection[DeviceId] = ()) -> str:
    """What a member does under a plan, one phrase; `owners`: who feeds data of its own."""
    stages = stages_in_words(plan, device)
    parts = [] if stages is None else [stages]
    if device in owners:
        parts.append("feeds its own data")
    elif device == plan.home and owners:
        parts.append("conducts the run")
    elif device == plan.home:
        parts.append("feeds the data")
    elif device in plan.holders:
        parts.append("has a copy of the data")
    return ", ".join(parts) or "in reserve"


def waits_for(member: RunMember) -> str | None:
    """Why nothing moves, and what helps; None while it does."""
    name_of = member.state.services.directory.name_of
    paused = member.paused
    if paused is not None:
        reason = f"{_named(member, paused.reason)}{_remedy(member, paused)}"
        return f"paused: {reason}{_own_problem(member)}"
    if member.machine.wanted:
        return f"agreeing on a new view: {member.machine.wanted[0]}"
    work = member.work
    if work is not None and work.waits_for:
        return f"getting ready: {', '.join(map(name_of, work.waits_for))}"
    if work is None:
        return "waiting for its home peer to begin"
    return None


def _named(member: RunMember, reason: str) -> str:
    """What a core says, with names in the place of short device ids."""
    plan = member.plan
    for device in () if plan is None else plan.members:
        reason = reason.replace(short(device), member.state.services.directory.name_of(device))
    return reason


def _remedy(member: RunMember, paused: Paused) -> str:
    """What ends a pause for want of members, who are named before; nothing for other pauses."""
    if not paused.missing:
        return ""
    who = "it is" if len(paused.missing) == 1 else "enough of them are"
    if member.state.contract.owners:
        return f"; goes on when {who} back"
    forced = f"--resume {member.state.run[:8]} --force-view"
    return f"; goes on when {who} back, or start it anew here with {forced}"


def _own_problem(member: RunMember) -> str:
    """Why this device cannot feed what it owns of the run's data, in its own words."""
    problem = member.state.own_problem
    if problem is None:
        return ""
    cause = problem.__cause__ if isinstance(problem.__cause__, P2PTrainError) else problem
    return f" (here: {cause.message})"
