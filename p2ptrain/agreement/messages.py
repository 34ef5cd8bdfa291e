"""What peers say to each other to agree on the plan of a view.

Every message names (run, lineage, view) and the plan by its digest, so that a late or doubled
one is recognised.
"""

from __future__ import annotations

from dataclasses import dataclass

from p2ptrain import limits
from p2ptrain.ids import Digest, Lineage, RunId, ViewNumber
from p2ptrain.planner.plan import Plan
from p2ptrain.training.contract import Contract
from p2ptrain.wire.codec import message


@message("agreement.propose")
@dataclass(frozen=True, slots=True, kw_only=True)
class Propose:
    """The home peer asks a member to take part in this plan."""

    plan: Plan
    contract: Contract


@message("agreement.accept")
@dataclass(frozen=True, slots=True, kw_only=True)
class Accept:
    """A member takes part, and has made that durable; repeated until it is answered."""

    run: RunId
    lineage: Lineage
    view: ViewNumber
    plan: Digest


@message("agreement.refuse")
@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """A member does not take part, and why."""

    run: RunId
    lineage: Lineage
    view: ViewNumber
    plan: Digest
    reason: str
    view_seen: ViewNumber = ViewNumber(0)  # noqa: RUF009
    """The highest view this member holds for the run: propose above it."""

    def __post_init__(self) -> None:
        if len(self.reason) > limits.REASON_CHARACTERS_MAX:
            raise ValueError("the reason is too long")
        if not 0 <= self.view_seen <= limits.VIEW_MAX:
            raise ValueError("the view seen is out of range")


@message("agreement.decided")
@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """Every member accepted: the plan is the view's plan."""

    run: RunId
    lineage: Lineage
    view: ViewNumber
    plan: Digest


@message("agreement.withdraw")
@dataclass(frozen=True, slots=True, kw_only=True)
class Withdraw:
    """The proposal is closed without a decision and never will be decided."""

    run: RunId
    lineage: Lineage
    view: ViewNumber
    plan: Digest
    reason: str

    def __post_init__(self) -> None:
        if len(self.reason) > limits.REASON_CHARACTERS_MAX:
            raise ValueError("the reason is too long")
