"""Whether any one device may vanish now without losing a committed step (DESIGN 7, rule 2)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from p2ptrain import limits
from p2ptrain.agreement.view import View
from p2ptrain.ids import DeviceId
from p2ptrain.planner.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Protected:
    """Committed steps survive the loss of any one device."""

    replica_step: int
    """The whole set from which a lost stage would be replayed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provisional:
    """Training goes on, but a further loss may redo steps; and why."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Safeguards:
    """What is known here of everything that protects."""

    present: Collection[DeviceId]
    """Members that can be reached and have not restarted since the view began, as far as is
    known, this peer included: who restarted may have lost its disk, and with it what it kept."""
    whole_step: int | None
    """`ReplicaSets.whole_step` of those present."""
    data_copies: Collection[DeviceId]
    """Members known to have the run's data."""
    log_full: bool
    """Some member's log has reached its bound."""
    record_count: int
    """Step records retained: replays longer than a view can carry are not possible."""
    newest_step: int
    """The newest committed step."""
    replicated_step: int
    """The newest step whose record at least two members hold durably."""


def protection(plan: Plan, known: Safeguards) -> Protected | Provisional:
    """The verdict on the newest committed step."""
    reason = _weakness(plan, known)
    if reason is not None or known.whole_step is None:
        return Provisional(reason=reason or "the next replica set is not yet whole")
    return Protected(replica_step=known.whole_step)


def is_kept_in_vain(view: View, whole_step: int | None) -> bool:
    """Whether replicas of before a view are of no more use: a later set is whole without them, or
    none will be made.

    Args:
        whole_step: `ReplicaSets.releasable_step` in that view.
    """
    return _lacks_keeper(view.plan) or (whole_step is not None and whole_step >= view.resume_step)


def _lacks_keeper(plan: Plan) -> bool:
    """Whether no replica set can be whole: nobody keeps a stage that has no siblings either."""
    kept = zip(plan.stages, plan.replicas, strict=False)
    lacking = any(keeper is None and stage.split != "replicas" for stage, keeper in kept)
    return lacking or not plan.replicas


def _weakness(plan: Plan, known: Safeguards) -> str | None:
    present = set(plan.members) & set(known.present)
    if len(present) < 2:
        return "this device trains alone"
    if _lacks_keeper(plan):
        return "no other device keeps a replica"
    if known.whole_step is None:
        return "the next replica set is not yet whole"
    if not plan.keep_data_here and len(present & set(known.data_copies)) < 2:
        return "the run's data has no second copy yet"
    if known.log_full:
        return "a log of sent tensors has reached its bound"
    if known.record_count > limits.STEP_RECORDS_MAX:
        return "more steps since the last replica set than can be replayed"
    if known.replicated_step < known.newest_step:
        return f"step {known.newest_step} is recorded on one device only"
    return None
