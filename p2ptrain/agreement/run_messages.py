"""What members of a run's view say to each other to decide its next view and its steps.

Every message but `DecidedView` names the view its sender goes by: run, lineage, number of the
view and digest of its plan. The view that is decided about is the one after it.
"""

from __future__ import annotations

from dataclasses import dataclass

from p2ptrain import limits
from p2ptrain.agreement.ballot import Ballot
from p2ptrain.agreement.run_memory import Memory
from p2ptrain.agreement.view import View
from p2ptrain.ids import Digest, Lineage, RunId, ViewNumber
from p2ptrain.recovery.inventory import Inventory
from p2ptrain.training.step_record import StepRecord, check_consecutive
from p2ptrain.wire.codec import message


@message("view.prepare")
@dataclass(frozen=True, slots=True, kw_only=True)
class ViewPrepare:
    """A member wants to propose the next view under this ballot; repeated while it plans."""

    run: RunId
    lineage: Lineage
    view: ViewNumber
    plan: Digest
    ballot: Ballot
    hindrance: str = ""
    """Why the proposer's last ballot came to nothing, for everybody's status; mostly empty."""

    def __post_init__(self) -> None:
        if len(self.hindrance) > limits.REASON_CHARACTERS_MAX:
            raise ValueError("the reason is too long")


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptedView:
    """A view that an acceptor accepted, and under which ballot."""

    ballot: Ballot
    value: View


@message("view.promise")
@dataclass(frozen=True, slots=True, kw_only=True)
class ViewPromise:
    """A member takes part in no lower ballot and records no further step in its view.

    From a member without a vote it only tells what that one holds.
    """

    run: RunId
    lineage: Lineage
    view: ViewNumber
    plan: Digest
    ballot: Ballot
    accepted: AcceptedView | None
    memory: Memory
    """The one this promise is kept in; the next view gives its journal a vote."""
    votes: bool
    """Whether it counts for a quorum; if not, nothing is accepted and no record is told."""
    records: tuple[StepRecord, ...]
    """What it holds durably, consecutive; the newest ones when there are too many."""
    inventory: Inventory

    def __post_init__(self) -> None:
        _check_records(self.records)
        if not self.votes and (self.accepted is not None or self.records):
            raise ValueError("a member without a vote promises nothing")
        if max(len(self.inventory.states), len(self.inventory.logs)) > limits.HOLDINGS_MAX:
            raise ValueError("an inventory has too many entries")


@message("view.refuse")
@dataclass(frozen=True, slots=True, kw_only=True)
class ViewRefusal:
    """A member promised a higher ballot."""

    run: RunId
    lineage: Lineage
    view: ViewNumber
    plan: Digest
    ballot: Ballot
    promised: Ballot


@message("view.accept")
@dataclass(frozen=True, slots=True, kw_only=True)
class ViewAccept:
    """The proposer of a promised ballot asks for this view."""

    run: RunId
    lineage: Lineage
    view: ViewNumber
    plan: Digest
    ballot: Ballot
    value: View


@message("view.accepted")
@dataclass(frozen=True, slots=True, kw_only=True)
class ViewAccepted:
    """A member accepted, durably, what the ballot asked for."""

    run: RunId
    lineage: Lineage
    view: ViewNumber
    plan: Digest
    ballot: Ballot
    memory: Memory
    """The one it is kept in."""


@message("view.decided")
@dataclass(frozen=True, slots=True, kw_only=True)
class DecidedView:
    """The newest view known to be decided, to whoever may not know it."""

    value: View


@message("view.head")
@dataclass(frozen=True, slots=True, kw_only=True)
class ViewHead:
    """Where this peer stands; who stands further on tells it, who stands behind asks.

    View 0 with the plan `""`: it knows no view of the run.
    """

    run: RunId
    lineage: Lineage
    view: ViewNumber
    plan: Digest
    newest_step: int
    memory: Memory
    """The sender's, of the run; another journal than before: it was lost in between."""
    votes: bool
    """Whether the sender has a vote in the view."""
    reminders: tuple[Memory, ...] = ()
    """From which memories the receiver has spoken to the sender: it must know them all."""

    def __post_init__(self) -> None:
        if len(self.reminders) > limits.HEARD_STARTS_MAX:
            raise ValueError("too many reminders in one message")


@message("step.recorded")
@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecorded:
    """A member holds these records durably, and had not promised the next view before."""

    run: RunId
    lineage: Lineage
    view: ViewNumber
    plan: Digest
    records: tuple[StepRecord, ...]
    """Consecutive; may be empty."""
    since: int
    """The oldest step of which the sender still has the record; earlier ones are replicated."""
    after: int | None
    """Answer with your records after this step; None: no answer is wanted."""
    memory: Memory
    """The one they are kept in."""

    def __post_init__(self) -> None:
        _check_records(self.records)


RunMessage = (
    ViewPrepare
    | ViewPromise
    | ViewRefusal
    | ViewAccept
    | ViewAccepted
    | DecidedView
    | ViewHead
    | StepRecorded
)
RUN_MESSAGES = (
    ViewPrepare, ViewPromise, ViewRefusal, ViewAccept, ViewAccepted, DecidedView, ViewHead,
    StepRecorded,
)  # fmt: skip


def run_of(told: RunMessage) -> RunId:
    """The run whose machine the message is for."""
    return told.value.run if isinstance(told, DecidedView) else told.run


def _check_records(records: tuple[StepRecord, ...]) -> None:
    if len(records) > limits.STEP_RECORDS_MAX:
        raise ValueError("too many records in one message")
    check_consecutive(records)
