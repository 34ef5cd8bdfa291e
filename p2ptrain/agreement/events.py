"""What the agreement machine tells the shell."""

from __future__ import annotations

from dataclasses import dataclass

from p2ptrain.ids import DeviceId
from p2ptrain.planner.plan import Plan
from p2ptrain.training.contract import Contract


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposalReceived:
    """A valid proposal waits for `accept(plan.digest)` or `refuse(plan.digest, reason)`."""

    plan: Plan
    contract: Contract


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposalWithdrawn:
    """A proposal that this member was asked about will not be decided."""

    plan: Plan
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposalFailed:
    """At the proposer: the plan is not decided; `devices` refused, left or did not answer."""

    plan: Plan
    reason: str
    devices: tuple[DeviceId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanDecided:
    """At every member, once: this is the plan of its view."""

    plan: Plan
    contract: Contract


AgreementEvent = ProposalReceived | ProposalWithdrawn | ProposalFailed | PlanDecided
