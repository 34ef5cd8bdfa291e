"""Plan the next view of a run for the machine that wants one, or because a person forces it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import trio

from p2ptrain.agreement.run_events import ProposalWanted
from p2ptrain.agreement.run_machine import RunMachine
from p2ptrain.agreement.view import View
from p2ptrain.errors import PlanInfeasible
from p2ptrain.planner.profile import PeerProfile
from p2ptrain.runtime.driver import Driver
from p2ptrain.runtime.keeping.holdings import Holdings
from p2ptrain.runtime.keeping.run_state import RunState
from p2ptrain.runtime.planning.replanning import NextView, forced_view, next_view


class Proposing:
    """One member's answers to `ProposalWanted`; all planning happens in a thread."""

    def __init__(
        self,
        state: RunState,
        driver: Driver[RunMachine],
        newcomers: Callable[[], tuple[PeerProfile, ...]],
    ) -> None:
        """`newcomers`: who may be taken in now."""
        self._state, self._driver, self._newcomers = state, driver, newcomers
        self.holdings = Holdings(state=state, records=lambda: driver.machine.records)

    async def propose(self, wanted: ProposalWanted) -> None:
        """Plan the next view and hand it, or why there is none, to the machine."""
        machine = self._driver.machine
        reason = ", ".join(machine.wanted) or "the view before lost its proposer"
        given = self._given(wanted, reason, self._newcomers())
        answer = await trio.to_thread.run_sync(next_view, given)
        if isinstance(answer, str):
            answer = await self._with_outsiders(given) or answer
        now = self._driver.now()
        if machine.view is not wanted.base:
            return  # decided meanwhile; an equal ballot may be open for the view after it
        if isinstance(answer, View):
            self._driver.call(RunMachine.propose, answer, now, ballot=wanted.ballot)
        else:
            self._driver.call(RunMachine.cannot_propose, answer, now, ballot=wanted.ballot)

    async def _with_outsiders(self, given: NextView) -> View | None:
        """The view that is possible with what others keep, or else with more replay than of what
        is lost; None: none."""
        outsiders = await self.holdings.outside(given.wanted.base)
        given = replace(given, outsiders=outsiders, newcomers=())
        for remakes_live in (False, True) if outsiders else (True,):
            wider = replace(given, remakes_live=remakes_live)
            answer = await trio.to_thread.run_sync(next_view, wider)
            if isinstance(answer, View):
                return answer
        return None

    async def forced(self) -> View:
        """The first view of a new lineage with whoever can be reached.

        Raises:
            PlanInfeasible: not even that is possible; the sentence says what is lacking.
        """
        base = self._driver.machine.view
        if base is None:
            raise PlanInfeasible("the run has not begun")
        wanted = await self.holdings.ask(base)
        given = self._given(wanted, "forced by a person", newcomers=())
        view = await trio.to_thread.run_sync(forced_view, given)
        if isinstance(view, str):
            raise PlanInfeasible(view, hint="start the missing peers, or --resume a checkpoint")
        return view

    def _given(
        self, wanted: ProposalWanted, reason: str, newcomers: tuple[PeerProfile, ...]
    ) -> NextView:
        return NextView(
            wanted=wanted,
            manifest=self._state.manifest,
            leaving=self._state.services.directory.leaving(),
            newcomers=newcomers,
            reason=reason,
            paces=self._state.pacing.paces(),
        )
