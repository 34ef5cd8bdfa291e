"""Between a peer's agreement machine and its runs: ask, answer, and take what was decided."""

from __future__ import annotations

from collections.abc import Callable

from p2ptrain.agreement.events import (
    PlanDecided,
    ProposalFailed,
    ProposalReceived,
    ProposalWithdrawn,
)
from p2ptrain.agreement.machine import Agreement
from p2ptrain.ids import Digest, Lineage, RunId, ViewNumber
from p2ptrain.planner.plan import Plan
from p2ptrain.runtime.driver import Driver
from p2ptrain.runtime.runs.run_service import RunService
from p2ptrain.training.contract import Contract


class Ballots:
    """What a home peer asks of its members (runtime.services.Proposals)."""

    def __init__(self, agreement: Callable[[], Driver[Agreement]]) -> None:
        self._agreement = agreement

    def propose(self, plan: Plan, contract: Contract) -> None:
        """Ask every member; LocalProtocolError when the view is taken."""
        driver = self._agreement()
        driver.call(Agreement.propose, plan, contract, driver.now())

    def withdraw(self, plan: Digest, reason: str) -> None:
        """Take back what is not decided yet."""
        driver = self._agreement()
        driver.call(Agreement.withdraw, plan, reason, driver.now())

    def next_view(self, run: RunId, lineage: Lineage) -> ViewNumber:
        """The lowest view nobody is known to have been asked about."""
        return self._agreement().machine.next_view(run, lineage)


def follow_ballot(event: object, *, runs: RunService, agreement: Driver[Agreement]) -> None:
    """Act on one event of the agreement machine."""
    match event:
        case ProposalReceived(plan=plan, contract=contract):
            reason = runs.consider(plan, contract)
            if reason is None:
                agreement.call(Agreement.accept, plan.digest, agreement.now())
            else:
                agreement.call(Agreement.refuse, plan.digest, reason, agreement.now())
        case ProposalWithdrawn(plan=plan):
            runs.withdrawn(plan)
        case PlanDecided(plan=plan, contract=contract):
            runs.decided(plan, contract)
        case ProposalFailed(plan=plan, reason=reason, devices=devices):
            runs.proposal_failed(plan, reason, devices)
